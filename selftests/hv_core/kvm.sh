#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# KVM and the image exclude each other, politely: whoever is first stays, and afterwards the other works.
# Modules: kvm_intel kvm_amd
# Beds: svm vmx
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

case $HV_BED in
svm*) kvm=kvm_amd ;;
*) kvm=kvm_intel ;;
esac

# refused MODULE PATTERN: it does not load, and the kernel says why.
refused() {
	mark
	! modprobe "$1" 2>/tmp/error || { echo "loaded"; return 1; }
	cat /tmp/error
	! grep -q "^$1 " /proc/modules || { echo "still loaded"; return 1; }
	log_has "$2"
}
launch_is_refused() { refused hv_core "hv_core: launch refused: .*Unload kvm_intel or kvm_amd" && grep -qi 'busy' /tmp/error; }

ktap_print_header
ktap_set_plan 10
modprobe $kvm || ktap_skip_all "$kvm does not load natively"
ktap_test_result "launch_is_refused_while_kvm_is_loaded" launch_is_refused
modprobe -r $kvm
state /tmp/state.native
ktap_test_result "launch_works_after_kvm_is_unloaded" modprobe hv_core
case $HV_BED in
svm*) why="hv_core: kvm_amd refused" ;;
*) why="(hv_core: kvm_intel refused|VMX not supported)" ;;
esac
ktap_test_result "kvm_is_refused_while_launched" refused $kvm "$why"
ktap_test_result "state_is_still_the_same" state_is /tmp/state.native
ktap_test_result "image_is_still_there" cpus_are launched
ktap_test_result "leave" modprobe -r hv_core
# Not later: a virtual machine of kvm_intel leaves the limit of the IDT at 64 KiB.
ktap_test_result "state_is_the_same_after_leave" state_is /tmp/state.native
ktap_test_result "kvm_loads_after_leave" modprobe $kvm
ktap_test_result "kvm_runs_a_virtual_machine_after_leave" $probe kvm
ktap_test_result "kvm_unloads" modprobe -r $kvm
state /tmp/state.native
ktap_finished
