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

launched() { [ -e $status_file ] && [ "$(status state | head -n 1)" = launched ]; }
