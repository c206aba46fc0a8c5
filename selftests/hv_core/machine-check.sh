#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A machine check that arrives while the image runs goes on to Linux, on the same CPU. On AMD-V it waits for the next VMRUN, so there
# is nothing to see. No bank of these machines reports anything: Linux is told not to look and says only that it came.
# Beds: vmx
# Kernel: mce=off
# Dmesg: Unexpected int18 \(Machine Check\)
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

# machine_checks COUNT CPU: so many came to that CPU since the mark.
machine_checks() {
	log_since | grep 'Unexpected int18'
	[ "$(log_since | grep -c "CPU#$2: Unexpected int18")" = "$1" ] && [ "$(log_since | grep -c 'Unexpected int18')" = "$1" ]
}
under_a_program() {
	mark
	$probe fault 1 3 && $probe fault 1 3 && machine_checks 2 1
}
during_a_hypercall() {
	mark
	modprobe hv_core provoke=3 && machine_checks 1 0
}

ktap_print_header
ktap_set_plan 7
ktap_test_result "launch" modprobe hv_core provoke=4
ktap_test_result "linux_gets_it_under_a_program" under_a_program
ktap_test_result "cpus_are_beneath_the_image" cpus_are launched
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_test_result "linux_gets_it_during_a_hypercall" during_a_hypercall
ktap_test_result "cpus_are_beneath_the_image_again" cpus_are launched
ktap_test_result "leave" modprobe -r hv_core
ktap_finished
