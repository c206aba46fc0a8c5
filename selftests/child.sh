# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
# child.sh: what boots a stock child, for the test and the demo. Sourced; both have "Child: stock" in their head.

log=/tmp/child.log
verbosity=quiet
# More for the child's command line.
child_arguments=

# child VPS COMMAND...: COMMAND (vmwp, or hvctl run) boots a child with so many VPs. What child and worker say is printed as it
# comes, and kept in $log. The status is the command's.
child() {
	child_vps=$1
	shift
	{
		"$@" --kernel /child/vmlinuz --initrd /child/initrd --memory 256M --vps "$child_vps" \
			--cmdline "console=ttyS0 $verbosity panic=-1 $child_arguments" </dev/null 2>&1
		echo $? >/tmp/child.status
	} | tee $log
	return "$(cat /tmp/child.status)"
}

# compute_sum PROGRAM: the checksum over 64 MiB that the child computes with the same program, too, in $sum.
compute_sum() { sum=$("$1"); }

# Every one of $1 VPs computed the sum that the root computed.
sums() {
	i=0
	while [ "$i" -lt "$1" ]; do
		grep -q "^child: VP $i sum $sum" $log || return 1
		i=$((i + 1))
	done
}
