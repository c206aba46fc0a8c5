#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# /dev/mshv as clients use it: partitions with small guests, and everything that must be refused.
# Beds: svm vmx
# Timeout: 120
. "$(dirname "$0")/../ktap.sh"

smoke="$(dirname "$0")/mshv_smoke"
[ -x "$smoke" ] || ktap_skip_all "mshv_smoke was not built"
checks=$("$smoke")

ktap_print_header
ktap_set_plan $((5 + $(echo "$checks" | wc -l)))
ktap_test_result "module_loads" modprobe hv_core
ktap_test_result "device_is_there" test -c /dev/mshv
for check in $checks; do
	ktap_test_result "$check" "$smoke" "$check"
done
ktap_test_result "module_stays_while_the_device_is_open" sh -c 'exec 3</dev/mshv; ! rmmod hv_core 2>/dev/null'
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_test_result "device_is_gone" test ! -e /dev/mshv
ktap_finished
