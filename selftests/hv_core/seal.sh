#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The image's memory is gone for Linux: reads find zeros, writes and jumps are refused, counted and logged, nothing dies.
# Beds: svm vmx vmx-skylake vmx-arrow svm-full
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

command() { echo "$1 $2" >/dev/hv_state; }
all_pages_read_as_zeros() {
	local at=$address
	while [ $at -lt $((address + size)) ]; do
		command read "$(printf %x $at)" || { printf 'page %x\n' $at; return 1; }
		at=$((at + 4096))
	done
}
refused() { ! command write "$(printf %x $address)" 2>/tmp/error && grep 'Bad address' /tmp/error; }

# The image that was built, on a bed or on this machine.
image=$(find /image "${MODULES:-/image}" -name image.bin 2>/dev/null | head -n 1)
hash_is_the_images() {
	set -- $(sha256sum "$image")
	echo "$1, status $(status hash)"
	[ "$1" = "$(status hash)" ]
}
# All of it, page-aligned.
image_lies_in_memory() {
	echo "$address $size"
	[ $((address % 4096)) = 0 ] && [ "$size" -ge "$(stat -c %s "${image:-/dev/null}")" ] &&
		sed -n 's/^\([0-9a-f]*\)-\([0-9a-f]*\) : System RAM$/\1 \2/p' /proc/iomem | {
			while read -r start end; do
				[ $((0x$start)) -gt $address ] || [ $((0x$end)) -lt $((address + size - 1)) ] || exit 0
			done
			exit 1
		}
}

ktap_print_header
ktap_set_plan 14
modprobe hv_core || ktap_skip_all "no launch"
address=$(($(status base))) size=$(status size)
ktap_test_result "status_gives_the_address" image_lies_in_memory
if [ -n "$image" ]; then
	ktap_test_result "status_gives_the_hash" hash_is_the_images
else
	ktap_test_skip "status_gives_the_hash" "the image that was built is not here"
fi
mark
ktap_test_result "all_pages_read_as_zeros" all_pages_read_as_zeros
ktap_test_result "reads_are_no_exits" [ "$(sum sealed_accesses)" = 0 ]
ktap_test_result "kernel_write_is_refused" refused
ktap_test_result "kernel_write_is_counted" [ "$(sum sealed_accesses)" = 1 ]
$probe sealed $address >/tmp/sealed
ktap_test_result "user_read_finds_zeros" grep -x 'nonzero 0' /tmp/sealed
ktap_test_result "user_write_is_refused" grep -x 'write signal 11' /tmp/sealed
ktap_test_result "user_jump_is_refused" grep -x 'jump signal 11' /tmp/sealed
ktap_test_result "each_refusal_is_counted" [ "$(sum sealed_accesses)" = 3 ]
ktap_test_result "each_refusal_is_logged" sh -c "dmesg | grep -c 'to sealed page 0x$(printf %x $address) refused' | grep -x 3"
# All of it takes Bochs twenty minutes.
case $HV_BED in
svm) step=4096 ;;
*) step=1048576 ;;
esac
ktap_test_result "kcore_walk_reads_all_memory" $probe kcore $address $step
ktap_test_result "image_still_works" cpus_are launched
ktap_test_result "leave" modprobe -r hv_core
ktap_finished
