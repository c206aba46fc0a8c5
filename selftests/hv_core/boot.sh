#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Child partitions boot the unmodified stock cloud kernel to user space, compute, and power off: by turns with one and two VPs.
# `make soak` gives another number of them (child_boots) than two.
# Beds: svm vmx
# Child: stock
# Timeout: 240
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../child.sh"
compute_sum "$(dirname "$0")/checksum"

ktap_print_header
child_boots=${child_boots:-2}
ktap_set_plan $((5 + 4 * child_boots))
# A kernel that panics restarts the machine: 3 is a reset (vmwp(1)).
panic_ends_in_a_reset() {
	child_arguments=rdinit=/nothing
	child 1 vmwp
	[ $? = 3 ] && grep -q 'Kernel panic' $log
}
# Timers of the SynIC, and hypercalls to other VPs.
uses_enlightenments() {
	local one
	for one in 'timers .*Hyper-V clockevent' 'Hyper-V: Using IPI hypercalls' 'Hyper-V: Using hypercall for remote TLB flush'; do
		grep -q "^child: $one" $log || { echo "not in the log: $one"; return 1; }
	done
}
# The state of the child's memory, as long as it has any.
watch_memory() {
	while [ ! -e /tmp/watched ]; do
		grep -o '"mapped_pages":[0-9]*,"large_pages":[0-9]*' /sys/kernel/debug/hv_core/status >/tmp/memory.now && mv /tmp/memory.now /tmp/memory
		sleep 1
	done
}
# Most of it was in pages of 2 MiB, of 512 pages each.
memory_was_large() {
	cat /tmp/memory && tr -c '0-9\n' ' ' </tmp/memory | { read -r pages large && [ $((large * 1024)) -gt "$pages" ]; }
}
ktap_test_result "module_loads" modprobe hv_core
watch_memory &
watcher=$!
# The first stays in xAPIC mode, the other changes to x2APIC mode.
child_arguments=nox2apic
boot=0
while [ "$boot" -lt "$child_boots" ]; do
	vps=$((boot % 2 + 1)) boot=$((boot + 1))
	ktap_test_result "child_${boot}_with_${vps}_vps_powers_off" child $vps vmwp
	ktap_test_result "child_${boot}_with_${vps}_vps_sees_hyper_v" grep -q '^child: Hypervisor detected: Microsoft Hyper-V' $log
	ktap_test_result "child_${boot}_with_${vps}_vps_computes" sums $vps
	ktap_test_result "child_${boot}_with_${vps}_vps_uses_enlightenments" uses_enlightenments
	child_arguments=
done
touch /tmp/watched
wait "$watcher"
case $(cat /sys/devices/system/cpu/vulnerabilities/itlb_multihit) in
"Not affected") ktap_test_result "memory_of_children_is_large" memory_was_large ;;
*) ktap_test_skip "memory_of_children_is_large" "a child that executes from large pages could stop this processor (INTEL-SA-00210)" ;;
esac
case $HV_BED in
svm) ktap_test_result "panic_ends_in_a_reset" panic_ends_in_a_reset ;;
*) ktap_test_skip "panic_ends_in_a_reset" "the same on VT-x, where it takes minutes" ;;
esac
ktap_test_result "partitions_are_gone" grep -q '"partitions":\[\]' /sys/kernel/debug/hv_core/status
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_finished
