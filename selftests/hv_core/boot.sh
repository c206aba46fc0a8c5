#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A child partition boots a stock Debian kernel.
# Child: stock
# Timeout: 300
. "$(dirname "$0")/../ktap.sh"
here=$(dirname "$0")
ktap_print_header
ktap_set_plan 3
ktap_test_result "module_loads" modprobe hv_core
ktap_test_result "child_boots" sh -c "timeout -s INT 100 vmwp --kernel /child/vmlinuz --initrd /child/initrd --memory 256M --cmdline 'console=ttyS0 quiet panic=-1' --console stdio </dev/null; r=\$?; cat /sys/kernel/debug/hv_core/status > /dev/null; dmesg | tail -40; exit \$r"
ktap_test_result "module_unloads" modprobe -r hv_core
ktap_finished
