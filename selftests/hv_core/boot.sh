#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A child partition boots the unmodified stock cloud kernel to user space, computes, and powers off.
# Beds: svm vmx
# Child: stock
# Timeout: 240
. "$(dirname "$0")/../ktap.sh"

log=/tmp/child.log
sum=$(dd if=/dev/zero bs=1M count=64 2>/dev/null | sha256sum)

# Boots a child with $1 VPs; its console goes to $log.
boot() {
	vmwp --kernel /child/vmlinuz --initrd /child/initrd --memory 256M --vps "$1" \
		--cmdline 'console=ttyS0 quiet panic=-1' --console stdio </dev/null >$log 2>&1
	status=$?
	sed 's/^/# /' $log
	return $status
}

# Every one of $1 VPs computed the sum that the root computed.
sums() {
	i=0
	while [ "$i" -lt "$1" ]; do
		grep -q "^child: VP $i sum $sum" $log || return 1
		i=$((i + 1))
	done
}

ktap_print_header
# Bochs takes minutes for one boot.
case $HV_BED in
svm) counts="1 2" ;;
*) counts=2 ;;
esac

# shellcheck disable=SC2086 # a list
set -- $counts
ktap_set_plan $((3 + 3 * $#))
ktap_test_result "module_loads" modprobe hv_core
for vps; do
	ktap_test_result "child_with_${vps}_vps_powers_off" boot $vps
	ktap_test_result "child_with_${vps}_vps_sees_hyper_v" grep -q '^child: Hypervisor detected: Microsoft Hyper-V' $log
	ktap_test_result "child_with_${vps}_vps_computes" sums $vps
done
ktap_test_result "partitions_are_gone" grep -q '"partitions":\[\]' /sys/kernel/debug/hv_core/status
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_finished
