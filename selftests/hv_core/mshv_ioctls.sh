#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The tests of the mshv-ioctls crate, unmodified: one after the other, then all at once.
# Beds: svm vmx
# Timeout: 200
. "$(dirname "$0")/../ktap.sh"

tests="$(dirname "$0")/mshv_ioctls"
[ -x "$tests" ] || ktap_skip_all "mshv_ioctls was not built"
list() { "$tests" --list "$@" 2>/dev/null | sed -n 's/: test$//p'; }
names=$(list)

ktap_print_header
ktap_set_plan $(($(echo "$names" | wc -l) + 3))
ktap_test_result "module_loads" modprobe hv_core
for name in $names; do
	# Some are marked as ignored, because they need the device or what few hypervisors have.
	ktap_test_result "$name" "$tests" --exact "$name" --include-ignored --test-threads=1
done
# RUN_VP comes back after 20 ms of the root's time at the latest, and the tests take that for an error: in Bochs eight VPs
# at once need longer.
if grep -q hvbed=vmx /proc/cmdline; then
	ktap_test_skip "all_at_once" "the machine is too slow for eight VPs within the bound of RUN_VP"
else
	ktap_test_result "all_at_once" "$tests" --test-threads=8
fi
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_finished
