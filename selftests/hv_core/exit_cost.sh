#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# What exits cost, in instructions from guest to guest: KVM's and ours, one after the other on the same machine. And what a
# launch and a leave cost, and how often the root exits.
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

# measure NAME: leaves its figures in /tmp/NAME.json.
measure() { $cost "$1" >"/tmp/$1.json"; }

# Exits of the root so far and the time in hundredths of a second, into $exits and $now. No program is started, because each
# executes CPUID.
look() {
	local line word
	read -r line <$status_file
	read -r now _ </proc/uptime
	now=${now%.*}${now#*.}
	line=${line#*\"cpus\":}
	line=${line%%\"partitions\"*}
	exits=0
	for word in $(IFS='{},'; set -f; echo $line); do
		case $word in
		\"cpu\":* | *_ticks\":* | *faults\":* | *nmis\":* | *accesses\":* | *state\":*) ;;
		*:[0-9]*) exits=$((exits + ${word##*:})) ;;
		esac
	done
}

# exits_per_second COMMAND...: of the root, while the command runs; into $rate.
exits_per_second() {
	local exits_before now_before
	look
	exits_before=$exits now_before=$now
	"$@"
	look
	rate=$(((exits - exits_before) * 100 / (now - now_before)))
}
idle() { read -r -t 5 _ <&8; true; }
busy() { local i=0; while [ $i -lt 300000 ]; do i=$((i + 1)); done; }

root_is_measured() {
	mkfifo /tmp/nothing && exec 8<>/tmp/nothing || return 1
	exits_per_second idle
	echo "\"root_exits_idle\":$rate" >/tmp/root
	exits_per_second busy
	echo "\"root_exits_busy\":$rate" >>/tmp/root
	echo "\"launch\":$(status launch_ticks)" >>/tmp/root
	cat /tmp/root
}

# All figures, ours with those of the root.
figures() {
	leave=$(log_has 'native again, each within' | sed -n 's/.*within \([0-9]*\) TSC.*/\1/p' | tail -n 1)
	[ -n "$leave" ] || return 1
	echo "\"leave\":$leave" >>/tmp/root
	cat /tmp/kvm.json
	sed "s/}\$/,$(paste -s -d , /tmp/root)}/" /tmp/mshv.json
}

# The root exits only where hardware forces it: not at all while nothing happens.
root_is_left_alone() { [ "$(sed -n 's/.*idle.:\(.*\)/\1/p' /tmp/root)" = 0 ] && [ "$(sed -n 's/.*busy.:\(.*\)/\1/p' /tmp/root)" = 0 ]; }

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
ktap_set_plan 11
mark
modprobe $kvm || ktap_skip_all "$kvm does not load"
ktap_test_result "kvm_is_measured" measure kvm
modprobe -r $kvm
ktap_test_result "launch" modprobe hv_core
ktap_test_result "root_is_measured" root_is_measured
ktap_test_result "root_is_left_alone" root_is_left_alone
ktap_test_result "hv_core_is_measured" measure mshv
ktap_test_result "exits_within_the_image" at_most 150 cpuid unknown_hypercall msr_read
ktap_test_result "exits_to_the_root_kernel" at_most 300 port_to_kernel
ktap_test_result "exits_to_user_space" at_most 2000 port_to_user
ktap_test_result "less_than_kvm" less_than_kvm
ktap_test_result "leave" modprobe -r hv_core
ktap_test_result "figures" figures
ktap_finished
