#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# When the image itself faults, its registers reach the kernel log, all CPUs are native again and Linux goes on.
# Dmesg: image: cpu [0-9]+: the image (faulted|panicked)
# Dmesg: the hypervisor stopped because of an internal fault
# Beds: svm vmx
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

provoked() {
	mark
	modprobe hv_core provoke=$1 || return 1
	log_since >/tmp/log.fault
	grep -E "$2" /tmp/log.fault && grep -q 'all CPUs are native again' /tmp/log.fault || { cat /tmp/log.fault; return 1; }
}
wait_until_native() {
	local i=0
	while ! log_since | grep -q 'all CPUs are native again'; do
		i=$((i + 1))
		[ $i -lt 30 ] || { log_since; return 1; }
		sleep 0.5
	done
}
# A user program makes the image fault on CPU 1; the module notices within seconds and takes CPU 0 back, too.
provoked_by_user() {
	mark
	modprobe hv_core provoke=4 && cpus_are launched || return 1
	$probe fault 1 0 || { echo "the program got signal or status $?"; return 1; }
	wait_until_native || return 1
	log_has 'image: cpu 1: the image faulted: vector 13'
}
# A guest makes the image fault on whatever CPU it runs.
provoked_by_guest() {
	mark
	modprobe hv_core provoke=4 && cpus_are launched || return 1
	"$(dirname "$0")/mshv_smoke" fault_under_a_guest || return 1
	wait_until_native || return 1
	log_has 'image: cpu [01]: the image faulted: vector 13'
}
dumps_registers() { grep -E "image: cpu 0: RIP 0xffff8" /tmp/log.fault && grep -E "image: cpu 0: RAX" /tmp/log.fault; }
status_says_faulted() { [ "$(status state | head -n 1)" = faulted ] && cpus_are native; }
linux_is_native() { state_is /tmp/state.native && $probe cpuid | cmp - /tmp/cpuid.native; }
linux_works() { $probe load 0.3; }

ktap_print_header
ktap_set_plan 27
state /tmp/state.native
$probe cpuid >/tmp/cpuid.native
for fault in "0 general_protection the.image.faulted:.vector.13" "1 page_fault the.image.faulted:.vector.14.error.0x0.CR2.0x1000" \
	"2 panic the.image.panicked.at.*provoked.by.a.test"; do
	# shellcheck disable=SC2086 # three words
	set -- $fault
	ktap_test_result "$2_is_logged_and_survived" provoked $1 "$3"
	[ $1 = 2 ] || ktap_test_result "$2_dumps_registers" dumps_registers
	ktap_test_result "$2_leaves_linux_native" linux_is_native
	ktap_test_result "$2_shows_in_status" status_says_faulted
	ktap_test_result "$2_module_unloads" modprobe -r hv_core
done
ktap_test_result "fault_under_a_user_program_is_survived" provoked_by_user
ktap_test_result "user_fault_leaves_linux_native" linux_is_native
ktap_test_result "user_fault_shows_in_status" status_says_faulted
ktap_test_result "user_fault_module_unloads" modprobe -r hv_core
ktap_test_result "fault_under_a_guest_is_survived" provoked_by_guest
ktap_test_result "guest_fault_leaves_linux_native" linux_is_native
ktap_test_result "guest_fault_shows_in_status" status_says_faulted
ktap_test_result "guest_fault_module_unloads" modprobe -r hv_core
ktap_test_result "linux_works" linux_works
ktap_test_result "launch_works_afterwards" modprobe hv_core
ktap_test_result "cpus_are_beneath_the_image" cpus_are launched
ktap_test_result "leave" modprobe -r hv_core
ktap_test_result "state_is_the_same_after_all" state_is /tmp/state.native
ktap_finished
