#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Many launches and leaves under load: a busy program on each CPU that checks its FPU registers under signals. Nothing is
# different, nothing leaks, nothing is printed.
# Beds: svm vmx
# Timeout: 300
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

# A cycle takes 0.3 s on QEMU. Bochs executes a thirtieth of the instructions in a second, so it gets a tenth of the cycles.
case $HV_BED in
svm) cycles=100 ;;
*) cycles=10 ;;
esac

cycle() {
	local i=0
	while [ $i -lt $1 ]; do
		modprobe hv_core && modprobe -r hv_core || { echo "cycle $i"; return 1; }
		i=$((i + 1))
	done
}

# The clock watchdog asks another CPU for its time, which an emulator may not run for a while.
log_is_quiet() { ! log_since | grep -v -E 'hv_core: all CPUs (run beneath the hypervisor|are native again, each within [0-9]+ TSC ticks)$|hvtest:|drop_caches|clocksource: Watchdog remote CPU [0-9]+ read timed out$'; }

ktap_print_header
ktap_set_plan 6
state /tmp/state.native
cycle 2 # what is allocated once
memory >/tmp/memory.before
mark
$probe load 100000 >/tmp/load.out 2>&1 &
load=$!
ktap_test_result "${cycles}_cycles_under_load" cycle $cycles
killall -USR1 probe
wait $load
memory >/tmp/memory.after
ktap_test_result "registers_of_the_load_were_right" sh -c 'cat /tmp/load.out; [ $(grep -c " 0 wrong" /tmp/load.out) = $(nproc) ]'
ktap_test_result "kernel_log_is_quiet" log_is_quiet
ktap_test_result "state_is_the_same" state_is /tmp/state.native
# 5 KiB for each of 100 cycles, less than any of the image's parts.
ktap_test_result "nothing_leaked" nothing_leaked 512
ktap_test_result "launch_works_once_more" cycle 1
ktap_finished
