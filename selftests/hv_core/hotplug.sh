#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A CPU that goes offline and comes back is beneath the image again.
# Timeout: 90
# Beds: svm vmx
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

cpu1=/sys/devices/system/cpu/cpu1/online
[ -e $cpu1 ] || ktap_skip_all "CPU 1 cannot go offline"

offline() { echo 0 >$cpu1 && [ "$(cat $cpu1)" = 0 ]; }
online() { echo 1 >$cpu1 && [ "$(cat $cpu1)" = 1 ]; }
cycle() {
	local i=0
	while [ $i -lt 3 ]; do
		offline && online && cpus_are launched && state_is /tmp/state.native || return 1
		i=$((i + 1))
	done
}
offline_cpu_is_native() { offline && status state | tail -n 1 | grep -x native; }

ktap_print_header
ktap_set_plan 14
# The first offline and online changes a few registers natively (microcode, MISC_ENABLE): compare with what follows it.
offline && online
state /tmp/state.native
ktap_test_result "launch" modprobe hv_core
ktap_test_result "cpu_goes_and_comes_beneath_the_image" cycle
ktap_test_result "offline_cpu_is_native" offline_cpu_is_native
ktap_test_result "leave_while_offline" modprobe -r hv_core
ktap_test_result "online_native" online
ktap_test_result "state_is_the_same" state_is /tmp/state.native
ktap_test_result "offline" offline
ktap_test_result "launch_while_offline" modprobe hv_core
ktap_test_result "online_beneath_the_image" online
ktap_test_result "cpus_are_launched" cpus_are launched
ktap_test_result "state_is_the_same_launched" state_is /tmp/state.native
ktap_test_result "work_is_right_on_both_cpus" $probe load 0.3
ktap_test_result "leave" modprobe -r hv_core
ktap_test_result "state_is_the_same_after_leave" state_is /tmp/state.native
ktap_finished
