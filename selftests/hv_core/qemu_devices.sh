#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The unmodified stock QEMU runs the unmodified stock cloud kernel on /dev/mshv: its newer PC machine, 2 VPs with the host's processor model,
# disk and network with MSI-X, the guest restarted by itself and by the user, stopped, and looked at.
# Not on VT-x, where it would take an hour: qemu.sh boots there.
# Beds: svm
# Child: stock virtio_blk virtio_net
# Qemu: stock
# Timeout: 1800
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../child.sh"
. "$(dirname "$0")/../qemu.sh"
compute_sum "$(dirname "$0")/checksum"
web=/tmp/web monitor=/tmp/qmp

# within SECONDS COMMAND...: the command succeeds, if only after a while, as long as QEMU runs.
within() {
	patience=$1
	shift
	until "$@"; do
		[ "$patience" != 0 ] && kill -0 $pid || return 1
		patience=$((patience - 1))
		sleep 1
	done
}
says() { grep -q "^child: $1" "$log"; }
prints() { within 600 says "$1"; }

# qmp COMMAND [ARGUMENTS]: does it in QEMU and prints the answer. Events are passed over.
qmp() {
	echo "{\"execute\":\"$1\",\"arguments\":${2:-{\}}}" >&3
	while read -r -t 60 answer <&4; do
		case $answer in
		*'"return":'*) echo "qmp: $answer" && return ;;
		*'"error":'*) echo "qmp: $answer" && return 1 ;;
		esac
	done
	return 1
}

ticks() { grep -c '^child: tick' "$log"; }
ticked() { [ "$(ticks)" -gt $((seen + 2)) ]; }
goes_on() {
	seen=$(ticks)
	within 300 ticked
}
stops_and_continues() {
	prints tick && qmp stop && qmp query-status | grep '"paused"' || return 1
	stopped=$(ticks)
	sleep 2
	[ "$(ticks)" = "$stopped" ] && qmp cont && goes_on
}
# QEMU writes back all that it has read.
goes_on_while_looked_at() {
	looks=20
	while [ $looks != 0 ]; do
		qmp human-monitor-command '{"command-line":"info registers -a"}' | grep -q 'CPU#1.*RIP=' || return 1
		looks=$((looks - 1))
	done
	goes_on
}
time_went_forward() { sed -n 's/^child: tick //p' "$log" | sort -c -n; }
user_restarts() { qmp system_reset && prints 'boot 3,'; }
disk_has_what_was_written() {
	dd if=$disk bs=4k skip=512 2>/dev/null | head -c "$(stat -c %s /bin/busybox)" | cmp - /bin/busybox
}

ktap_print_header
ktap_set_plan 16
ktap_test_result "module_loads" modprobe hv_core
# The guest's network ends in QEMU, which connects to this machine.
ip link set lo up
mkdir $web
dd if=/dev/urandom of=$web/file bs=1k count=300 2>/dev/null
httpd -p 127.0.0.1:8000 -h $web
new_disk 1
mkfifo $monitor.in $monitor.out
exec 3<>$monitor.in 4<>$monitor.out
qemu -M q35 -smp 2 -cpu host -qmp pipe:$monitor -drive file=$disk,format=raw,if=virtio \
	-netdev user,id=net -device virtio-net-pci,netdev=net,romfile= &
pid=$!
ktap_test_result "monitor_answers" qmp qmp_capabilities
ktap_test_result "disk_is_read" prints "boot 1, disk $disk_sum"
ktap_test_result "network_answers" prints '3 packets transmitted, 3 packets received'
ktap_test_result "network_transfers" prints "network $(md5sum <$web/file)"
ktap_test_result "disk_interrupts_by_message" prints 'interrupts .*[1-9].* PCI-MSIX.*-req'
ktap_test_result "network_interrupts_by_message" prints 'interrupts .*[1-9].* PCI-MSIX.*-input'
ktap_test_result "guest_restarts" prints 'boot 2,'
ktap_test_result "disk_has_what_was_written" disk_has_what_was_written
ktap_test_result "guest_stops_and_continues" stops_and_continues
ktap_test_result "guest_goes_on_while_looked_at" goes_on_while_looked_at
ktap_test_result "time_went_forward" time_went_forward
ktap_test_result "user_restarts" user_restarts
# What hangs says at least how far it came.
[ "$ktap_fail" = 0 ] || kill $pid
wait $pid
status=$?
grep -v '^child: tick' "$log" | sed 's/^/# /'
ktap_test_result "guest_powers_off" [ $status = 0 ]
ktap_test_result "guest_computes" sums 2
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_finished
