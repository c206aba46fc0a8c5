#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Random ioctls on /dev/mshv: no warning, no leak, the image lives. A fixed number of rounds from a fixed seed; `make
# fuzz-mshv` gives a time instead (fuzz_seconds) and a seed (fuzz_seed), a new one if empty. To see a finding again:
# fuzz_first is the round that the kernel log named, fuzz_rounds=1 does it alone.
# Beds: svm vmx
# Boot: own
# Timeout: 240
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

fuzz="$(dirname "$0")/mshv_fuzz"
[ -x "$fuzz" ] || ktap_skip_all "mshv_fuzz was not built"
case $HV_BED in
svm) rounds=${fuzz_rounds:-12} ;;
*) rounds=${fuzz_rounds:-4} ;;
esac
if [ -n "${fuzz_seconds:-}" ]; then
	length="seconds=$fuzz_seconds"
	seed=${fuzz_seed:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
else
	length="rounds=$rounds"
	seed=${fuzz_seed:-1}
fi

image_holds_as_much_as_before() { echo "$1, then $(status pool_used_bytes)" && [ "$(status pool_used_bytes)" = "$1" ]; }
no_page_is_pinned() {
	echo 1 >/proc/sys/vm/stat_refresh # else each CPU has some of the numbers
	awk '/^nr_foll_pin_acquired / { a = $2 } /^nr_foll_pin_released / { r = $2 } END { print a, r; exit a != r }' /proc/vmstat
}
log_is_quiet() { ! log_since | grep -E -f "$(dirname "$0")/../bad-log"; }

ktap_print_header
ktap_set_plan 9
# What is allocated once.
modprobe hv_core && { "$fuzz" seed=2 rounds=2 >/dev/null 2>&1; modprobe -r hv_core; }
memory >/tmp/memory.before
mark
ktap_test_result "module_loads" modprobe hv_core
"$fuzz" seed=3 rounds=1 >/dev/null 2>&1
used=$(status pool_used_bytes)
ktap_test_result "random_calls_do_no_harm" "$fuzz" "seed=$seed" "first=${fuzz_first:-0}" "$length"
ktap_test_result "no_partition_is_left" no_partition_is_left
ktap_test_result "image_holds_as_much_as_before" image_holds_as_much_as_before "$used"
ktap_test_result "no_page_is_pinned" no_page_is_pinned
ktap_test_result "cpus_are_beneath_the_image" cpus_are launched
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_test_result "kernel_log_is_quiet" log_is_quiet
memory >/tmp/memory.after
ktap_test_result "nothing_leaked" nothing_leaked 1024
ktap_finished
