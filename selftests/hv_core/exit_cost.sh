#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# What exits cost, in instructions from guest to guest: KVM's and ours, one after the other on the same machine.
# Beds: *-count
# Modules: kvm_intel kvm_amd
# Timeout: 200
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

cost=$(dirname "$0")/exit_cost
case $HV_BED in
svm*) kvm=kvm_amd ;;
*) kvm=kvm_intel ;;
esac

# measure NAME: leaves its figures in /tmp/NAME.json, and shows them.
measure() { $cost "$1" >"/tmp/$1.json" && cat "/tmp/$1.json"; }

# of NAME ROW: one figure.
of() { sed -n "s/.*\"$2\":\([0-9]*\).*/\1/p" "/tmp/$1.json"; }

# at_most LIMIT ROW...: ours are within it.
at_most() {
	local limit=$1 row bad=0
	shift
	for row; do
		[ "$(of mshv "$row")" -le "$limit" ] || { echo "$row: $(of mshv "$row") instructions, more than $limit"; bad=1; }
	done
	return $bad
}

# Each row costs less than KVM's.
less_than_kvm() {
	local row bad=0
	for row in cpuid unknown_hypercall msr_read port_to_kernel port_to_user mmio_to_user; do
		[ "$(of mshv $row)" -lt "$(of kvm $row)" ] || { echo "$row: $(of mshv $row), KVM $(of kvm $row)"; bad=1; }
	done
	return $bad
}

ktap_print_header
ktap_set_plan 8
modprobe $kvm || ktap_skip_all "$kvm does not load"
ktap_test_result "kvm_is_measured" measure kvm
modprobe -r $kvm
ktap_test_result "launch" modprobe hv_core
ktap_test_result "hv_core_is_measured" measure mshv
ktap_test_result "exits_within_the_image" at_most 150 cpuid unknown_hypercall msr_read
ktap_test_result "exits_to_the_root_kernel" at_most 300 port_to_kernel
ktap_test_result "exits_to_user_space" at_most 2000 port_to_user
ktap_test_result "less_than_kvm" less_than_kvm
ktap_test_result "leave" modprobe -r hv_core
ktap_finished
