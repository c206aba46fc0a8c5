# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
# ktap.sh: prints test results as TAP. Sourced by the tests:
#
#   . "$(dirname "$0")/../ktap.sh"
#   ktap_print_header
#   ktap_set_plan 2
#   ktap_test_result "module_loads" modprobe hv_core
#   ktap_test_skip "unload_refused_while_partition_lives" "no partition can be made yet"
#   ktap_finished
#
# The names are those of the kernel's tools/testing/selftests/kselftest/ktap_helpers.sh.
# Exit status: 0 all passed, 1 one failed, 4 all skipped.

ktap_n=0 ktap_pass=0 ktap_fail=0 ktap_skip=0 ktap_plan=0

ktap_print_header() { echo "TAP version 13"; }

ktap_print_msg() { echo "# $*"; }

ktap_set_plan() {
	ktap_plan=$1
	echo "1..$1"
}

ktap_test_pass() {
	ktap_n=$((ktap_n + 1)) ktap_pass=$((ktap_pass + 1))
	echo "ok $ktap_n $1"
}

ktap_test_fail() {
	ktap_n=$((ktap_n + 1)) ktap_fail=$((ktap_fail + 1))
	echo "not ok $ktap_n $1"
}

# ktap_test_skip NAME REASON
ktap_test_skip() {
	ktap_n=$((ktap_n + 1)) ktap_skip=$((ktap_skip + 1))
	echo "ok $ktap_n $1 # SKIP $2"
}

# ktap_test_result NAME COMMAND...: a pass when COMMAND succeeds. Its output goes into the log as comments.
ktap_test_result() {
	ktap_name=$1
	shift
	ktap_out=$("$@" 2>&1) && ktap_rc=0 || ktap_rc=$?
	[ -z "$ktap_out" ] || echo "$ktap_out" | sed 's/^/# /'
	if [ "$ktap_rc" = 0 ]; then
		ktap_test_pass "$ktap_name"
	else
		ktap_print_msg "exit status $ktap_rc: $*"
		ktap_test_fail "$ktap_name"
	fi
}

# ktap_skip_all REASON: this machine cannot run the test at all.
ktap_skip_all() {
	echo "1..0 # SKIP $*"
	exit 4
}

ktap_finished() {
	echo "# Totals: pass:$ktap_pass fail:$ktap_fail xfail:0 xpass:0 skip:$ktap_skip error:0"
	[ "$ktap_fail" = 0 ] && [ "$ktap_n" = "$ktap_plan" ] || exit 1
	[ "$ktap_n" != "$ktap_skip" ] || exit 4
	exit 0
}
