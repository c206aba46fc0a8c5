#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# kexec while launched leaves first: the next kernel (here a program that looks around) finds a native machine.
# Beds: svm vmx
# Ends: machine
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

ktap_print_header
ktap_set_plan 4
ktap_test_result "launch" modprobe hv_core
ktap_test_result "cpus_are_launched" cpus_are launched
$probe kexec 3
ktap_test_fail "kexec_returned"
