# SPDX-License-Identifier: GPL-2.0
# launch.sh: what tests that launch the hypervisor share. Sourced after ktap.sh.

probe=$(dirname "$0")/probe
status_file=/sys/kernel/debug/hv_core/status

[ -x "$probe" ] || ktap_skip_all "the program probe is not built (selftests/build)"
modprobe hv_state 2>/dev/null || ktap_skip_all "the test module hv_state is not built"

# The registers that a launch must not change, of all CPUs, into a file.
state() { cat /dev/hv_state >"$1"; }

# state_is FILE: they are still as in FILE. What differs is printed.
state_is() {
	state /tmp/state.now && diff "$1" /tmp/state.now
}

# status NAME: all numbers or words with that name in the status, one a line.
status() { tr ',{}[]' '\n' <$status_file | sed -n "s/^\"$1\":\"\{0,1\}\([^\"]*\)\"\{0,1\}\$/\1/p"; }

# sum NAME: their sum.
sum() { status "$1" | awk '{ s += $1 } END { print s + 0 }'; }

# cpus_are STATE: that is the state of every online CPU.
cpus_are() {
	tr '{' '\n' <$status_file | sed -n 's/^"cpu":\([0-9]*\),"state":"\([a-z]*\)".*/\1 \2/p' >/tmp/cpus
	while read -r cpu is; do
		[ "$(cat /sys/devices/system/cpu/cpu$cpu/online 2>/dev/null || echo 1)" = 0 ] || [ "$is" = "$1" ] || {
			echo "cpu $cpu is $is, not $1"
			return 1
		}
	done </tmp/cpus
	[ -s /tmp/cpus ]
}

# Marks the kernel log; `log_since` prints what came after the last mark.
mark() {
	read -r ktap_up _ </proc/uptime
	echo "$ktap_up" >/tmp/mark
	echo "hvtest: mark $ktap_up" >/dev/kmsg
}
log_since() { dmesg | sed "1,/hvtest: mark $(cat /tmp/mark)\$/d"; }
log_has() { log_since | grep -E "$1"; }

# Free memory with what the kernel gives back on demand (caches, reclaimable slab, the lists of free pages of each CPU), in
# KiB; then the slab that it cannot give back.
memory() {
	sync
	echo 3 >/proc/sys/vm/drop_caches
	sleep 2
	awk '$1 == "count:" { free += $2 * 4 } /^(MemFree|Cached|Buffers|SReclaimable):/ { free += $2 } /^SUnreclaim:/ { slab = $2 } END { print free, slab }' /proc/meminfo /proc/zoneinfo
}

# nothing_leaked KIB: between /tmp/memory.before and /tmp/memory.after less than that was lost. The tolerance is for pages and
# slabs that are not full.
nothing_leaked() {
	local free slab free_after slab_after
	read -r free slab </tmp/memory.before
	read -r free_after slab_after </tmp/memory.after
	echo "free $free, then $free_after KiB; slab $slab, then $slab_after KiB"
	[ $((free - free_after)) -lt "$1" ] && [ $((slab_after - slab)) -lt "$1" ]
}

no_partition_is_left() { grep -o '"partitions":\[[^]]*\]' $status_file && grep -q '"partitions":\[\]' $status_file; }

launched() { [ -e $status_file ] && [ "$(status state | head -n 1)" = launched ]; }
