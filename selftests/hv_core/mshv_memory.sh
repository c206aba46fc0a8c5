#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Owners of partitions that are killed while their VPs run, and that have too little memory: nothing leaks. The kernel says with
# a call trace when a memory cgroup has nobody to kill.
# Beds: svm vmx
# Boot: own
# Timeout: 120
# Dmesg: Call Trace:
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

smoke="$(dirname "$0")/mshv_smoke"
[ -x "$smoke" ] || ktap_skip_all "mshv_smoke was not built"
case $HV_BED in
svm) kills=50 ;;
*) kills=10 ;;
esac
group=/tmp/cgroup/starved

# Kills that many owners of running VPs.
killed_owners() { KILLS=$1 "$smoke" killed_owners; }

# Its allocations fail at a limit: nobody in the group may be killed for them.
starved() {
	echo "$1" >$group/memory.max || return 1
	sh -c "echo \$\$ >$group/cgroup.procs; echo -1000 >/proc/self/oom_score_adj; exec '$smoke' starved"
}
# Somewhere between no partition and some, wherever the allocations fail.
starved_anywhere() {
	local limit=256
	while [ $limit -lt 2048 ]; do
		starved ${limit}K || { echo "at $limit KiB"; return 1; }
		limit=$((limit + 64))
	done
}

mkdir -p /tmp/cgroup
mount -t cgroup2 cgroup /tmp/cgroup && echo +memory >/tmp/cgroup/cgroup.subtree_control || ktap_skip_all "no memory cgroups"
mkdir -p $group
ktap_print_header
ktap_set_plan 8
# What is allocated once.
modprobe hv_core && killed_owners 1 && starved 1M && modprobe -r hv_core
memory >/tmp/memory.before
ktap_test_result "module_loads" modprobe hv_core
ktap_test_result "${kills}_killed_owners_leave_nothing" killed_owners $kills
ktap_test_result "starved_owners_get_errors" starved_anywhere
ktap_test_result "the_limit_was_met" grep -E '^max [1-9]' $group/memory.events
ktap_test_result "no_partition_is_left" no_partition_is_left
ktap_test_result "a_partition_works_afterwards" "$smoke" guest_runs_code_and_writes_ports
ktap_test_result "module_unloads" modprobe -r hv_core
memory >/tmp/memory.after
ktap_test_result "nothing_leaked" nothing_leaked 1024
ktap_finished
