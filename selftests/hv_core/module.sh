#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The module goes in, is listed, and goes out again.
. "$(dirname "$0")/../ktap.sh"

ktap_print_header
ktap_set_plan 4
ktap_test_result "module_loads" modprobe hv_core
ktap_test_result "module_is_listed" grep -q '^hv_core ' /proc/modules
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_test_result "module_is_gone" sh -c '! grep -q "^hv_core " /proc/modules'
ktap_finished
