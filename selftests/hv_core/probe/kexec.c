// SPDX-License-Identifier: GPL-2.0
/*
 * kexec to a program of ours instead of a kernel. It runs where the next kernel would, looks whether the machine is native
 * (no Microsoft hypervisor in CPUID, the extension announced and off), prints two test points to COM2 and switches off.
 */
#define _GNU_SOURCE
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "probe.h"

#define WHERE 0x4000000ul /* 64 MiB: RAM on every bed */

extern const char next_start[], next_end[], next_digit1[], next_digit2[], next_digit3[];

/* 64-bit, identity-mapped, interrupts off. Position-independent; the number of the test points is at next_number. */
__asm__(".pushsection .rodata\n"
	"next_start:\n"
	"	lea next_stack(%rip), %rsp\n"
	"	lea next_ok1(%rip), %rsi\n"
	"	call next_print\n"
	"	mov $0x40000000, %eax\n"
	"	cpuid\n"
	"	cmp $0x7263694d, %ebx\n"	/* "Micr" */
	"	je 8f\n"
	"	mov %cr4, %rax\n"		/* VMXE */
	"	bt $13, %rax\n"
	"	jc 8f\n"
	"	mov $1, %eax\n"			/* VMX, or SVM and EFER.SVME clear */
	"	cpuid\n"
	"	bt $5, %ecx\n"
	"	jc 7f\n"
	"	mov $0x80000001, %eax\n"
	"	cpuid\n"
	"	bt $2, %ecx\n"
	"	jnc 8f\n"
	"	mov $0xc0000080, %ecx\n"
	"	rdmsr\n"
	"	bt $12, %eax\n"
	"	jc 8f\n"
	"7:	lea next_ok2(%rip), %rsi\n"
	"	call next_print\n"
	"	jmp 9f\n"
	"8:	lea next_bad2(%rip), %rsi\n"
	"	call next_print\n"
	"9:	mov $0x2fd, %edx\n"		/* until all is sent */
	"1:	in %dx, %al\n"
	"	test $0x40, %al\n"
	"	jz 1b\n"
	"	mov $0x2000, %eax\n"		/* ACPI power-off: PM1a_CNT of Q35, of Bochs; then reset */
	"	mov $0x604, %edx\n"
	"	out %ax, %dx\n"
	"	mov $0xb004, %edx\n"
	"	out %ax, %dx\n"
	"	mov $0xcf9, %edx\n"
	"	mov $6, %al\n"
	"	out %al, %dx\n"
	"	hlt\n"
	"	jmp 9b\n"
	"next_print:\n"
	"1:	mov $0x2fd, %edx\n"
	"2:	in %dx, %al\n"
	"	test $0x20, %al\n"
	"	jz 2b\n"
	"	lodsb\n"
	"	test %al, %al\n"
	"	jz 3f\n"
	"	mov $0x2f8, %edx\n"
	"	out %al, %dx\n"
	"	jmp 1b\n"
	"3:	ret\n"
	"next_ok1:	.ascii \"ok \"\n"
	"next_digit1:	.asciz \"0 next_kernel_starts\\n\"\n"
	"next_ok2:	.ascii \"ok \"\n"
	"next_digit2:	.asciz \"0 next_kernel_finds_a_native_machine\\n\"\n"
	"next_bad2:	.ascii \"not ok \"\n"
	"next_digit3:	.asciz \"0 next_kernel_finds_a_native_machine\\n\"\n"
	"	.balign 16\n"
	"	.skip 256\n"
	"next_stack:\n"
	"next_end:\n"
	".popsection\n");

int probe_kexec(int argc, char **argv)
{
	size_t size = (size_t)(next_end - next_start);
	int number = argc ? atoi(argv[0]) : 1;
	char *copy = malloc(size);
	struct kexec_segment segment = { .buf = copy, .bufsz = size, .mem = (void *)WHERE, .memsz = 4096 };

	memcpy(copy, next_start, size);
	copy[next_digit1 - next_start] = (char)('0' + number);
	copy[next_digit2 - next_start] = copy[next_digit3 - next_start] = (char)('1' + number);
	if (syscall(SYS_kexec_load, WHERE, 1ul, &segment, (unsigned long)KEXEC_ARCH_X86_64))
		die("kexec_load");
	printf("# kexec\n");
	fflush(stdout);
	sync();
	reboot(LINUX_REBOOT_CMD_KEXEC);
	die("reboot");
	return 1;
}
