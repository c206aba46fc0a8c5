#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A child partition boots the unmodified stock cloud kernel to user space, computes, and powers off.
# Beds: svm vmx
# Child: stock
# Timeout: 240
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../child.sh"
compute_sum "$(dirname "$0")/checksum"

ktap_print_header
ktap_set_plan 10
# A kernel that panics restarts the machine: 3 is a reset (vmwp(1)).
panic_ends_in_a_reset() {
	child_arguments=rdinit=/nothing
	child 1 vmwp
	[ $? = 3 ] && grep -q 'Kernel panic' $log
}
ktap_test_result "module_loads" modprobe hv_core
# The first stays in xAPIC mode, the other changes to x2APIC mode.
child_arguments=nox2apic
for vps in 1 2; do
	ktap_test_result "child_with_${vps}_vps_powers_off" child $vps vmwp
	ktap_test_result "child_with_${vps}_vps_sees_hyper_v" grep -q '^child: Hypervisor detected: Microsoft Hyper-V' $log
	ktap_test_result "child_with_${vps}_vps_computes" sums $vps
	child_arguments=
done
case $HV_BED in
svm) ktap_test_result "panic_ends_in_a_reset" panic_ends_in_a_reset ;;
*) ktap_test_skip "panic_ends_in_a_reset" "the same on VT-x, where it takes minutes" ;;
esac
ktap_test_result "partitions_are_gone" grep -q '"partitions":\[\]' /sys/kernel/debug/hv_core/status
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_finished
