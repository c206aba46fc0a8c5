#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The outside judge of transparency: the kernel's own tools/testing/selftests/x86 say the same natively and launched.
# Beds: svm vmx
# Timeout: 300
# Dmesg: (segfault at|general protection|traps:|invalid opcode|process .* attempted|vsyscall|divide error|stack segment|alignment check|exc_debug_kernel|Modules linked in:|Call Trace:)
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

programs=$(dirname "$0")/../x86
[ -d "$programs" ] || ktap_skip_all "the kernel's x86 selftests are not built (selftests/build)"

# One line for each program: its status, and how often it was content and was not.
judge() {
	for program in "$programs"/*; do
		# Natively, too: QEMU sets RF at an int3 in one run of twenty. (Bochs traps in the kernel's SYSENTER entry, which Linux
		# only warns of.)
		case "$HV_BED ${program##*/}" in
		"svm sigreturn_64") continue ;;
		esac
		timeout 100 "$program" >/tmp/out 2>&1
		echo "$(basename "$program") status $? ok $(grep -c -E '\[OK\]|^ok ' /tmp/out)" \
			"not ok $(grep -c -E '\[FAIL\]|^not ok ' /tmp/out) skipped $(grep -c -E '\[SKIP\]|# SKIP' /tmp/out)"
		cp /tmp/out "/tmp/$1.$(basename "$program")"
	done
}

says_the_same() {
	diff /tmp/native /tmp/"$1" && return
	for program in $(diff /tmp/native /tmp/"$1" | sed -n 's/^+\([a-z]*[^ ]*\) status.*/\1/p'); do
		diff "/tmp/native.$program" "/tmp/$1.$program"
	done
	return 1
}

ktap_print_header
ktap_set_plan 5
judge native >/tmp/native
sed 's/^/# /' /tmp/native
ktap_test_result "some_pass_natively" grep -q 'status 0 ok [1-9]' /tmp/native
ktap_test_result "launch" modprobe hv_core
judge launched >/tmp/launched
ktap_test_result "launched_says_the_same" says_the_same launched
ktap_test_result "leave" modprobe -r hv_core
judge after >/tmp/after
ktap_test_result "after_leave_says_the_same" says_the_same after
ktap_finished
