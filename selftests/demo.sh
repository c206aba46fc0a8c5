#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# What `make demo` shows, in the guest: the hypervisor goes in beneath the running kernel, a stock child boots, both go
# out again. "#### step" begins a chapter, "#### fact" is a line of the closing summary (selftests/run).
# Child: stock
# Timeout: 300
. "$(dirname "$0")/child.sh"

verbosity=loglevel=6

step() { echo "#### step $*"; }
fact() { echo "#### fact $*"; }
up() { read -r now _ </proc/uptime && echo "$now"; }
# The time since $1, by Linux' clock.
since() { awk -v then="$1" '{ printf "%.2f s", $1 - then }' /proc/uptime; }
fail() {
	fact "failed: $*"
	dmesg | tail -n 20
	exit 1
}

step "insmod hv_core.ko: $(uname -r) becomes the root partition"
began=$(up)
modprobe hv_core || fail "the hypervisor was not launched"
took=$(since "$began")
dmesg | grep 'hv_core: '

step "hvctl status"
hvctl status >/tmp/status || fail "no status"
cat /tmp/status
fact "launched: $(sed -n 's/^Hypervisor *launched (\(.*\))/\1/p' /tmp/status) beneath $(nproc) CPUs in $took"
fact "image: $(sed -n 's/^Image *//p' /tmp/status)"

step "a checksum over 64 MiB here, for comparison with the child's"
compute_sum "$(dirname "$0")/hv_core/checksum"
echo "$sum"

step "hvctl run: a stock Debian kernel boots as a child with 2 VPs"
child 2 hvctl run --name demo || fail "the child did not power off by itself"
sums 2 || fail "the child computed something else than the root"
fact "child: $(sed -n 's/^child: Linux \(.*\)/\1/p' $log)"
fact "child: $(sed -n 's/^child: \(Hypervisor detected.*\|user space .*\)/\1/p' $log | paste -s -d, | sed 's/,/, /')"
fact "child: $(sed -n 's/^vmwp: demo: //p' $log)"

step "hvctl status, afterwards"
hvctl status >/tmp/status
sed -n '/^CPU /,$p' /tmp/status
sed -n 's/^ *\([0-9]*\)  *launched  *\([0-9]*\).*/#### fact root: \2 exits of CPU \1/p' /tmp/status

step "rmmod hv_core"
began=$(up)
modprobe -r hv_core || fail "the hypervisor did not leave"
fact "leave: native again in $(since "$began")"
dmesg | grep 'hv_core: ' | tail -n 1
