#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Guest memory in pages of 2 MiB, by the hypercalls of the root's kernel: what must be refused, what becomes of parts of them,
# and what happens without memory for tables.
# Beds: svm vmx
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

smoke="$(dirname "$0")/mshv_smoke"
[ -x "$smoke" ] || ktap_skip_all "mshv_smoke was not built"
modprobe hv_core || ktap_skip_all "no launch"

ktap_print_header
ktap_set_plan 5
for part in wrong_large_pages parts_of_large_pages short_of_tables; do
	ktap_test_result "$part" "$smoke" "$part"
done
ktap_test_result "no_partition_is_left" no_partition_is_left
ktap_test_result "leave" modprobe -r hv_core
ktap_finished
