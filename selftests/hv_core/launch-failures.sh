#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A launch that fails at any step on any CPU leaves Linux native and whole, and the next launch works. Wrong ones are refused.
# Beds: svm vmx
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

# Step 6 is what follows the last CPU, so it has no CPU.
fails_clean() {
	mark
	! modprobe hv_core fail_cpu=$1 fail_step=$2 2>/tmp/error || { modprobe -r hv_core; echo "launched"; return 1; }
	cat /tmp/error
	! grep -q '^hv_core ' /proc/modules || { echo "still loaded"; return 1; }
	log_has 'hv_core: launch failed, all CPUs are native again' || { log_since; return 1; }
	state_is /tmp/state.native
}

ktap_print_header
ktap_set_plan 15
state /tmp/state.native
for step in 1 2 3 4 5 6; do
	for cpu in 0 1; do
		ktap_test_result "launch_fails_at_step_${step}_on_cpu_${cpu}_and_unwinds" fails_clean $cpu $step
	done
done
ktap_test_result "launch_works_afterwards" modprobe hv_core
ktap_test_result "leave" modprobe -r hv_core
ktap_test_result "state_is_the_same_after_all" state_is /tmp/state.native
ktap_finished
