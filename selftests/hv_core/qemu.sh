#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The unmodified stock QEMU boots the unmodified stock cloud kernel on /dev/mshv to user space: the older of its PC machines, its default
# processor, a disk that interrupts by a pin (level-triggered), and power-off.
# Beds: svm vmx
# Child: stock virtio_blk virtio_net
# Qemu: stock
# Timeout: 600
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../child.sh"
. "$(dirname "$0")/../qemu.sh"
compute_sum "$(dirname "$0")/checksum"

powers_off() {
	qemu -M pc -drive file=$disk,format=raw,if=none,id=disk -device virtio-blk-pci,drive=disk,vectors=0
	status=$?
	cat "$log"
	return $status
}

ktap_print_header
ktap_set_plan 7
ktap_test_result "module_loads" modprobe hv_core
new_disk 3
ktap_test_result "guest_powers_off" powers_off
ktap_test_result "guest_sees_hyper_v" grep -q '^child: Hypervisor detected: Microsoft Hyper-V' "$log"
ktap_test_result "disk_is_read" grep -q "^child: boot 3, disk $disk_sum" "$log"
# More than one, so its end reached the I/O APIC.
ktap_test_result "disk_interrupts_by_a_pin" grep -q '^child: interrupts [1-9][0-9]* .*IO-APIC.*fasteoi.*virtio' "$log"
ktap_test_result "guest_computes" sums 1
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_finished
