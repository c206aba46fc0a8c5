#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A power-off while launched leaves first.
# Beds: svm vmx
# Ends: machine
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

ktap_print_header
ktap_set_plan 2
ktap_test_result "launch" modprobe hv_core
ktap_test_result "cpus_are_launched" cpus_are launched
sync
poweroff -f
sleep 60
