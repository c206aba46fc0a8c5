#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Linux finds every register of every CPU as it was, beneath the image and after it. What CPUID says differs where it should.
# Beds: svm vmx vmx-skylake vmx-arrow svm-full
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"
# Modules: msr

# The lines of a CPUID list that may differ: leaf 1 (VMX, hypervisor), 80000001 (SVM), 8000000a (SVM details), 400000xx.
differ_only_where_allowed() {
	diff /tmp/cpuid.native /tmp/cpuid.launched | sed -n 's/^[-+]cpu[0-9]* \([0-9a-f]*\)\.. .*/\1/p' | sort -u >/tmp/leaves
	! grep -v -x -E '00000001|80000001|8000000a|400000..' /tmp/leaves
}

# field FILE LEAF COLUMN: that register of CPU 0 (2 EAX, 3 EBX, 4 ECX, 5 EDX, after the leaf).
field() { echo $((0x$(awk -v l="$2.0" '$1 == "cpu0" && $2 == l { print $'$(($3 + 1))' }' "$1"))); }

only_the_extension_is_hidden() {
	local native launched
	native=$(field /tmp/cpuid.native 00000001 4) launched=$(field /tmp/cpuid.launched 00000001 4)
	# VMX (5) is off, hypervisor (31) is on.
	[ $launched = $((native & ~(1 << 5) | 1 << 31)) ] || { echo "leaf 1 ECX $native $launched"; return 1; }
	native=$(field /tmp/cpuid.native 80000001 4) launched=$(field /tmp/cpuid.launched 80000001 4)
	[ $launched = $((native & ~(1 << 2))) ] || { echo "leaf 80000001 ECX $native $launched"; return 1; }
}

# leaves mirror CR4: OSXSAVE is bit 18 of CR4 and bit 27 of leaf 1 ECX, PKE is bit 22 and bit 4 of leaf 7 ECX.
cr4_is_mirrored() {
	local cr4 one seven
	cr4=$((0x$(sed -n 's/^cpu0 cr4 //p' /tmp/state.native)))
	one=$(field /tmp/cpuid.launched 00000001 4) seven=$(field /tmp/cpuid.launched 00000007 4)
	[ $((cr4 >> 18 & 1)) = $((one >> 27 & 1)) ] && [ $((cr4 >> 22 & 1)) = $((seven >> 4 & 1)) ]
}

vendor_is_microsoft() { grep -q '^cpu0 40000000.0 [0-9a-f]* 7263694d 666f736f 76482074$' /tmp/cpuid.launched; }

# The registers by which software asks for the extension do not show that it is in use.
extension_is_hidden_in_msrs() {
	case $HV_BED in
	svm*)
		[ $((0x$($probe msr 0 c0000080) >> 12 & 1)) = 0 ] && [ "$($probe msr 0 c0010114)" = 0 ] &&
			[ "$($probe msr 0 c0010117)" = 0 ]
		;;
	*) [ $((0x$(sed -n 's/^cpu0 cr4 //p' /tmp/state.launched) >> 13 & 1)) = 0 ] ;;
	esac
}

# VT-x gives an instruction's length; AMD-V the address after it, where CPUID 8000_000Ah says so (EDX bit 3).
next_instruction_is_known() {
	case $HV_BED in
	svm*) [ $(($(field /tmp/cpuid.native 8000000a 5) >> 3 & 1)) = 1 ] ;;
	esac
}

# Bochs carries the trap of a single step of the root over an exit on AMD-V, into the image: there the image would fault.
steps() { [ "$HV_BED" = svm-full ] || $probe step; }

unknown_msr_faults() { ! $probe msr 0 40000000; }

# Which signal a user program gets. A difference on AMD-V is known: beneath the image EFER.SVME is set in hardware, so that
# CPL 3 raises #GP where a machine that does not use the extension raises #UD.
same_signals() {
	diff /tmp/illegal.native /tmp/illegal.launched | grep '^[-+][a-z]' >/tmp/signals
	case $HV_BED in
	svm*) ! grep -v -E '^[-+](vmrun|vmload|vmsave|stgi|clgi|skinit|invlpga) ' /tmp/signals ;;
	*) ! cat /tmp/signals | grep . ;;
	esac
}

xcr0=$(sed -n 's/^cpu0 xcr0 //p' /dev/hv_state)
# xsetbv is fine with its own value and faults with bad ones, native or not.
xsetbv_is_checked() {
	local value
	echo "xsetbv 0 $xcr0" >/dev/hv_state || return 1
	for value in 0 2 5 8000000000000001; do
		! echo "xsetbv 0 $value" >/dev/hv_state || { echo "xsetbv accepts $value"; return 1; }
	done
	! echo "xsetbv 1 1" >/dev/hv_state
}

ktap_print_header
ktap_set_plan 19
modprobe msr
state /tmp/state.native
ktap_test_result "state_is_stable" state_is /tmp/state.native
ktap_test_result "xsetbv_is_checked_native" xsetbv_is_checked
$probe cpuid >/tmp/cpuid.native
steps >/tmp/step.native
$probe illegal >/tmp/illegal.native

ktap_test_result "launch" modprobe hv_core
state /tmp/state.launched
ktap_test_result "state_is_the_same_launched" diff /tmp/state.native /tmp/state.launched
$probe cpuid >/tmp/cpuid.launched
steps >/tmp/step.launched
$probe illegal >/tmp/illegal.launched
ktap_test_result "cpuid_differs_only_where_allowed" differ_only_where_allowed
ktap_test_result "cpuid_hides_the_extension" only_the_extension_is_hidden
ktap_test_result "cpuid_mirrors_cr4" cr4_is_mirrored
ktap_test_result "cpuid_says_microsoft" vendor_is_microsoft
ktap_test_result "cpuid_says_root" grep -qx 'cpu0 40000003.0 0* 0*1005 0* 0*' /tmp/cpuid.launched
ktap_test_result "msrs_hide_the_extension" extension_is_hidden_in_msrs
ktap_test_result "unknown_msr_faults" unknown_msr_faults
if [ "$HV_BED" != svm-full ]; then
	ktap_test_result "single_step_traps_at_the_same_places" diff /tmp/step.native /tmp/step.launched
else
	ktap_test_skip "single_step_traps_at_the_same_places" "Bochs takes a single step's trap in the image if the step exits"
fi
if next_instruction_is_known; then
	ktap_test_result "prefixed_cpuid_works" $probe prefix
else
	ktap_test_skip "prefixed_cpuid_works" "this processor does not save the address of the next instruction"
fi
ktap_test_result "instructions_raise_the_same_signals" same_signals
ktap_test_result "xsetbv_is_checked_launched" xsetbv_is_checked

ktap_test_result "all_cpus_still_run_beneath" cpus_are launched

ktap_test_result "leave" modprobe -r hv_core
ktap_test_result "state_is_the_same_after_leave" state_is /tmp/state.native
$probe cpuid >/tmp/cpuid.after
ktap_test_result "cpuid_is_the_same_after_leave" diff /tmp/cpuid.native /tmp/cpuid.after
ktap_finished
