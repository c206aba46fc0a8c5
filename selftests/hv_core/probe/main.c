// SPDX-License-Identifier: GPL-2.0
/* probe: looks at the processor, and loads it, for the tests of hv_core. See the table for its parts. */
#define _GNU_SOURCE
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "probe.h"

static const struct {
	const char *name, *arguments, *does;
	int (*call)(int argc, char **argv);
} parts[] = {
	{ "cpuid", "", "prints all CPUID leaves of all CPUs", probe_cpuid },
	{ "step", "", "single-steps over CPUID and prints where each trap came", probe_step },
	{ "prefix", "", "executes CPUID with a prefix", probe_prefix },
	{ "fault", "CPU HOW", "makes the image fault by CPUID, where the module allows it", probe_fault },
	{ "illegal", "", "prints which signal each instruction of the virtualization extensions raises", probe_illegal },
	{ "msr", "CPU NUMBER", "prints an MSR (module msr), exit status 1 if reading it faults", probe_msr },
	{ "load", "SECONDS", "checks FPU registers on every CPU under signals and CPUID, until SIGUSR1", probe_load },
	{ "storm", "SECONDS [CPU...]", "executes CPUID without end on these CPUs", probe_storm },
	{ "sealed", "ADDRESS", "reads, writes and jumps to a physical page that should be sealed", probe_sealed },
	{ "kcore", "ADDRESS STEP", "reads memory through /proc/kcore: all around ADDRESS, and each STEP", probe_kcore },
	{ "kvm", "", "runs a virtual machine of three instructions", probe_kvm },
	{ "kexec", "N", "starts a program instead of the kernel; it prints test points N and N+1 to COM2", probe_kexec },
};

void die(const char *what)
{
	perror(what);
	exit(1);
}

void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
}

void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
	__asm__ volatile("cpuid" : "=a" (out[0]), "=b" (out[1]), "=c" (out[2]), "=d" (out[3]) : "a" (leaf), "c" (subleaf));
}

static sigjmp_buf jump;

static void caught(int number)
{
	siglongjmp(jump, number);
}

int signal_of(void (*call)(void *), void *data)
{
	static const int signals[] = { SIGILL, SIGSEGV, SIGBUS, SIGTRAP, SIGFPE };
	struct sigaction old[5], catch = { .sa_handler = caught };
	int i, number;

	for (i = 0; i < 5; i++)
		sigaction(signals[i], &catch, &old[i]);
	number = sigsetjmp(jump, 1);
	if (!number)
		call(data);
	for (i = 0; i < 5; i++)
		sigaction(signals[i], &old[i], NULL);
	return number;
}

int main(int argc, char **argv)
{
	size_t i;

	setvbuf(stdout, NULL, _IOLBF, 0);
	for (i = 0; argc > 1 && i < sizeof(parts) / sizeof(parts[0]); i++)
		if (!strcmp(argv[1], parts[i].name))
			return parts[i].call(argc - 2, argv + 2);
	for (i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
		fprintf(stderr, "probe %s %s: %s\n", parts[i].name, parts[i].arguments, parts[i].does);
	return 2;
}
