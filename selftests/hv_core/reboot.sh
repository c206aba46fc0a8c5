#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A reboot while launched leaves first. Bochs' firmware cannot boot a second time (native or not), so this is for QEMU.
# Beds: svm
# Ends: machine
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

ktap_print_header
ktap_set_plan 2
ktap_test_result "launch" modprobe hv_core
ktap_test_result "cpus_are_launched" cpus_are launched
sync
reboot -f
sleep 60
