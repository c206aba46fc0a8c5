#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# /dev/mshv as clients use it: partitions with small guests, and everything that must be refused.
# Not on svm-full: Bochs sets the guest's flags before it knows that it enters one, so V_INTR_MASKING does not count yet and a
# guest that starts with IF clear masks the root's interrupts until it changes IF.
# Beds: svm vmx vmx-skylake vmx-arrow
# Timeout: 120
. "$(dirname "$0")/../ktap.sh"

smoke="$(dirname "$0")/mshv_smoke"
[ -x "$smoke" ] || ktap_skip_all "mshv_smoke was not built"
modprobe hv_state 2>/dev/null
checks=$("$smoke")
status=/sys/kernel/debug/hv_core/status

# Dispatches of the only VP.
dispatches() { sed -n 's/.*"dispatches":\([0-9]*\).*/\1/p' "$status"; }

# A VP runs on CPU 1, which goes away and comes back.
vp_survives_the_loss_of_its_cpu() {
	online=/sys/devices/system/cpu/cpu1/online
	taskset 2 "$smoke" victim >/dev/null &
	pid=$!
	sleep 1
	echo 0 >"$online"
	before=$(dispatches)
	sleep 1
	after=$(dispatches)
	echo 1 >"$online"
	sleep 1
	last=$(dispatches)
	kill -9 $pid
	wait $pid
	echo "dispatches: $before $after $last"
	[ "$after" -gt "$before" ] && [ "$last" -gt "$after" ] && [ -z "$(dispatches)" ]
}

ktap_print_header
ktap_set_plan $((6 + $(echo "$checks" | wc -l)))
ktap_test_result "module_loads" modprobe hv_core
modprobe hv_port 2>/dev/null
ktap_test_result "device_is_there" test -c /dev/mshv
for check in $checks; do
	case $HV_BED/$check in
	svm/*_recurses_in_debug_exceptions_*)
		ktap_test_skip "$check" "QEMU aborts when a breakpoint is hit while it delivers an exception"
		continue
		;;
	*/messages_and_events_reach_another_module)
		[ -d /sys/module/hv_port ] || {
			ktap_test_skip "$check" "the test module hv_port is not built"
			continue
		}
		;;
	*/deleted_vp_is_gone)
		[ -e /dev/hv_state ] || {
			ktap_test_skip "$check" "the test module hv_state is not built"
			continue
		}
		;;
	esac
	ktap_test_result "$check" "$smoke" "$check"
done
ktap_test_result "vp_survives_the_loss_of_its_cpu" vp_survives_the_loss_of_its_cpu
ktap_test_result "module_stays_while_the_device_is_open" sh -c 'exec 3</dev/mshv; ! rmmod hv_core 2>/dev/null'
rmmod hv_port 2>/dev/null
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_test_result "device_is_gone" test ! -e /dev/mshv
ktap_finished
