# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
# qemu.sh: what runs the unmodified stock QEMU on /dev/mshv with a stock child. Sourced after child.sh; "Child: stock virtio_blk virtio_net"
# and "Qemu: stock" stand in the test's head.

disk=/tmp/disk

# new_disk BOOTS: random, but for a first line (selftests/child-devices). The checksum of what the child reads is in $disk_sum.
new_disk() {
	{ echo "$1" && dd if=/dev/urandom bs=1k count=4096; } 2>/dev/null | head -c 4194304 >$disk
	disk_sum=$(dd if=$disk bs=4k skip=1 count=511 2>/dev/null | md5sum)
}

# qemu ARGUMENT...: what QEMU and the child say is kept in $log.
# Without pci=lastbus=0, Linux probes all 256 buses of q35, and each of these accesses ends in QEMU: a third of the boot.
qemu() {
	timeout 1700 qemu-system-x86_64 -accel mshv -m 256M -nodefaults -no-user-config -display none -serial stdio \
		-kernel /child/vmlinuz -initrd /child/initrd -append "console=ttyS0 quiet panic=-1 pci=lastbus=0 child_does=devices" \
		"$@" </dev/null >"$log" 2>&1
}
