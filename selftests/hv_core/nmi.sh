#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# No NMI is lost, wherever it arrives: in Linux, in a user program, in the image (a CPUID storm keeps the CPUs there).
# Timeout: 120
# Dmesg: (NMI backtrace|Sending NMI|Call Trace:|Modules linked in:)
# Beds: svm vmx
. "$(dirname "$0")/../ktap.sh"
. "$(dirname "$0")/../launch.sh"

# The test module sends each when the one before was taken, and fails if one does not come.
nmis() { echo "nmi $1 $2" >/dev/hv_state; }
nmis_in_a_storm() {
	$probe storm 60 $1 &
	local storm=$! result=0
	taskset $((1 << (1 - $1))) sh -c "echo 'nmi $1 $2' >/dev/hv_state" || result=1
	kill -0 $storm || { echo "the storm ended"; result=1; }
	kill $storm
	killall probe 2>/dev/null
	return $result
}
backtraces() {
	local before i=0
	before=$(awk '$1 == "NMI:" { print $2 + $3 }' /proc/interrupts)
	$probe storm 60 &
	while [ $i -lt 5 ]; do
		echo l >/proc/sysrq-trigger
		i=$((i + 1))
	done
	killall probe
	# One CPU asks, which prints its own without an NMI; the other gets one each time.
	[ $(($(awk '$1 == "NMI:" { print $2 + $3 }' /proc/interrupts) - before)) -ge 5 ]
}

ktap_print_header
[ -e /sys/devices/system/cpu/cpu1 ] || ktap_skip_all "one CPU only"
ktap_set_plan 8
case $HV_BED in
svm*) count=800 ;;
*) count=200 ;;
esac
ktap_test_result "nmis_arrive_native" nmis_in_a_storm 1 $count
ktap_test_result "launch" modprobe hv_core
ktap_test_result "nmis_arrive_on_an_idle_cpu" nmis 1 $count
ktap_test_result "nmis_arrive_in_a_storm_on_cpu_0" nmis_in_a_storm 0 $count
ktap_test_result "nmis_arrive_in_a_storm_on_cpu_1" nmis_in_a_storm 1 $count
inside=$(sum host_nmis)
ktap_print_msg "$inside NMIs arrived in the image"
case $HV_BED in
svm*) ktap_test_result "none_arrives_in_the_image" [ "$inside" = 0 ] ;; # GIF is clear there
*) ktap_test_result "some_arrive_in_the_image" [ "$inside" -gt 0 ] ;;
esac
ktap_test_result "backtraces_of_all_cpus" backtraces
ktap_test_result "leave" modprobe -r hv_core
ktap_finished
