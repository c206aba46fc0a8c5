#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Runs the tests beside it on this machine, as root, in the manner of the kernel's script of that name:
#   run_kselftest.sh [-l] [-t FOLDER:TEST]...     -l lists them, -t runs one
# The modules are the installed ones, or those in the folder $MODULES. The status is 1 when a test failed.
[ -z "${MODULES:-}" ] || MODULES=$(cd "$MODULES" && pwd) || exit 1
cd "$(dirname "$0")" || exit 1
PATH=$PATH:/usr/sbin:/sbin
here=$PWD

list() { for t in */*.sh; do echo "${t%%/*}:${t##*/}"; done; }
tests=
while getopts lt: option; do
	case $option in
	l) list && exit ;;
	t) tests="$tests $OPTARG" ;;
	*) exit 2 ;;
	esac
done
[ -n "$tests" ] || tests=$(list)

if [ -n "${MODULES:-}" ]; then
	export MODULES PATH="$here/bin:$PATH"
	module=$(find "$MODULES/" -name hv_core.ko | head -n 1)
else
	module=$(modinfo -F filename hv_core 2>/dev/null)
fi
# Tests ask it which processor they are on.
case $(grep -m 1 ^vendor_id /proc/cpuinfo) in
*Intel) HV_BED=vmx-host ;;
*) HV_BED=svm-host ;;
esac
export HV_BED
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ "$(id -u)" = 0 ] && ! grep -q ' /sys/kernel/debug debugfs ' /proc/mounts; then
	mount -t debugfs debugfs /sys/kernel/debug
fi

# head_says FILE KEY: what the head of a test says (selftests/run explains it).
head_says() { sed -n "s/^# $2: *//p" "$1"; }

# Why test $1 cannot run here.
why_not() {
	if [ ! -e "$1" ]; then echo "there is no such test"; return; fi
	if [ "$(id -u)" != 0 ]; then echo "needs root"; return; fi
	if [ "$(head_says "$1" Ends)" = machine ]; then echo "ends the machine, so only a bed runs it"; return; fi
	if [ -n "$(head_says "$1" Child)" ] && [ ! -e /child/vmlinuz ]; then echo "no child's kernel in /child"; return; fi
	if [ -n "$(head_says "$1" Qemu)" ] && ! command -v qemu-system-x86_64 >/dev/null; then echo "QEMU is not installed"; return; fi
	for arg in $(head_says "$1" Kernel); do
		grep -qwF -e "$arg" /proc/cmdline || { echo "needs the kernel argument $arg"; return; }
	done
	if ! command -v modinfo >/dev/null; then echo "modinfo is not installed"; return; fi
	if [ -z "$module" ]; then echo "hv_core.ko is not installed, and not in MODULES"; return; fi
	built=$(modinfo -F vermagic "$module")
	if [ "${built%% *}" != "$(uname -r)" ]; then echo "hv_core.ko is for the kernel ${built%% *}"; return; fi
	loaded=$(sed -nE 's/^(hv_core|kvm_intel|kvm_amd) .*/\1/p' /proc/modules | head -n 1)
	if [ -n "$loaded" ]; then echo "$loaded is loaded: modprobe -r $loaded"; fi
}

echo "TAP version 13"
# shellcheck disable=SC2086 # a list
set -- $tests
echo "1..$#"
n=0 bad=0
for t; do
	n=$((n + 1))
	folder=${t%%:*} name="selftests: ${t%%:*}: ${t##*:}"
	echo "# $name"
	why=$(why_not "$folder/${t##*:}")
	if [ -n "$why" ]; then
		echo "ok $n $name # SKIP $why"
		continue
	fi
	timeout=$(sed -n 's/^timeout=//p' "$folder/settings" 2>/dev/null)
	timeout=${timeout:-45}
	echo "# timeout set to $timeout"
	{
		(cd "$folder" && exec timeout --foreground "$timeout" sh "./${t##*:}")
		echo $? >"$work/status"
	} 2>&1 | sed 's/^/# /'
	status=$(cat "$work/status")
	case $status in
	0) echo "ok $n $name" ;;
	4) echo "ok $n $name # SKIP" ;;
	124) bad=1 && echo "not ok $n $name # TIMEOUT $timeout seconds" ;;
	*) bad=1 && echo "not ok $n $name # exit=$status" ;;
	esac
done
exit $bad
