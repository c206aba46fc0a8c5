// SPDX-License-Identifier: GPL-2.0
/* What a user program sees of the processor. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include "probe.h"

int probe_cpuid(int argc, char **argv)
{
	static const uint32_t bases[] = { 0, 0x40000000, 0x80000000 };
	uint32_t r[4], top[4], leaf, sub;
	int cpu, b;

	(void)argc, (void)argv;
	for (cpu = 0; cpu < sysconf(_SC_NPROCESSORS_ONLN); cpu++) {
		pin(cpu);
		for (b = 0; b < 3; b++) {
			cpuid(bases[b], 0, top);
			/* A base that does not exist answers like another leaf. */
			if (top[0] < bases[b] || top[0] > bases[b] + 0xff)
				top[0] = bases[b];
			for (leaf = bases[b]; leaf <= top[0]; leaf++)
				for (sub = 0; sub < 4; sub++) {
					cpuid(leaf, sub, r);
					printf("cpu%d %08x.%x %08x %08x %08x %08x\n", cpu, leaf, sub, r[0], r[1], r[2], r[3]);
				}
		}
	}
	return 0;
}

static uintptr_t step_start;

static void stepped(int number, siginfo_t *info, void *context)
{
	ucontext_t *c = context;

	(void)number;
	printf("trap at +%" PRIuPTR " code %d\n", (uintptr_t)c->uc_mcontext.gregs[REG_RIP] - step_start, info->si_code);
}

int probe_step(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = stepped, .sa_flags = SA_SIGINFO };

	(void)argc, (void)argv;
	sigaction(SIGTRAP, &action, NULL);
	/* CPUID between instructions that do not exit, two in a row, and behind a load of SS (which holds traps back for
	 * one instruction). */
	__asm__ volatile("lea 1f(%%rip), %%rax\n"
			 "mov %%rax, %0\n"
			 "pushfq\n"
			 "orl $0x100, (%%rsp)\n"
			 "popfq\n"
			 "1: nop\n"
			 "xor %%eax, %%eax\n"
			 "cpuid\n"
			 "nop\n"
			 "nop\n"
			 "xor %%eax, %%eax\n"
			 "cpuid\n"
			 "cpuid\n"
			 "nop\n"
			 "mov %%ss, %%edx\n"
			 "mov %%edx, %%ss\n"
			 "cpuid\n"
			 "nop\n"
			 "pushfq\n"
			 "andl $~0x100, (%%rsp)\n"
			 "popfq\n"
			 : "=m" (step_start) : : "rax", "rbx", "rcx", "rdx", "memory", "cc");
	return 0;
}

/* A prefix that means nothing makes the instruction longer. */
int probe_prefix(int argc, char **argv)
{
	uint32_t r[4], p[4] = { 0 };

	(void)argc, (void)argv;
	cpuid(0, 0, r);
	__asm__ volatile(".byte 0x66\n cpuid" : "=a" (p[0]), "=b" (p[1]), "=c" (p[2]), "=d" (p[3]) : "a" (0), "c" (0));
	return memcmp(r, p, sizeof(r)) != 0;
}

int probe_fault(int argc, char **argv)
{
	uint32_t r[4];

	if (argc != 2)
		return 2;
	pin(atoi(argv[0]));
	cpuid(0x400000ff, (uint32_t)atoi(argv[1]), r);
	return 0;
}

static uint64_t operand[2];

#define INSTRUCTION(name, text) static void run_##name(void *d) { (void)d; __asm__ volatile(text : : "a" (0), "c" (0), "d" (0), "r" (operand) : "memory"); }
#define INSTRUCTIONS(X) \
	X(vmcall, "vmcall") X(vmlaunch, "vmlaunch") X(vmresume, "vmresume") X(vmxoff, "vmxoff") \
	X(vmxon, "vmxon (%3)") X(vmclear, "vmclear (%3)") X(vmptrld, "vmptrld (%3)") X(vmptrst, "vmptrst (%3)") \
	X(vmread, "vmread %%rax, %%rcx") X(vmwrite, "vmwrite %%rax, %%rcx") X(vmfunc, "vmfunc") \
	X(invept, "invept (%3), %%rax") X(invvpid, "invvpid (%3), %%rax") \
	X(vmmcall, "vmmcall") X(vmrun, "vmrun %%rax") X(vmload, "vmload %%rax") X(vmsave, "vmsave %%rax") \
	X(stgi, "stgi") X(clgi, "clgi") X(skinit, "skinit %%eax") X(invlpga, "invlpga %%rax, %%ecx") \
	X(xsetbv, "xsetbv") X(rdmsr, "rdmsr") X(wrmsr, "wrmsr") X(invd, "invd") X(wbinvd, "wbinvd") X(hlt, "hlt") \
	X(getsec, ".byte 0x0f, 0x37") X(mov_cr4, "mov %%rax, %%cr4") X(ud2, "ud2")
INSTRUCTIONS(INSTRUCTION)

int probe_illegal(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void *);
	} all[] = {
#define ENTRY(name, text) { #name, run_##name },
		INSTRUCTIONS(ENTRY)
	};

	(void)argc, (void)argv;
	for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
		printf("%s signal %d\n", all[i].name, signal_of(all[i].run, NULL));
	return 0;
}

int probe_msr(int argc, char **argv)
{
	char path[64];
	uint64_t value;
	int file;

	if (argc != 2)
		return 2;
	snprintf(path, sizeof(path), "/dev/cpu/%s/msr", argv[0]);
	file = open(path, O_RDONLY);
	if (file < 0)
		die(path);
	if (pread(file, &value, 8, strtoul(argv[1], NULL, 16)) != 8)
		return 1;
	printf("%" PRIx64 "\n", value);
	return 0;
}
