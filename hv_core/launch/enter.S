/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The instructions with which a CPU goes beneath the image and comes back, and hypercalls.
 *
 * Only hv_svm_enter and hv_leave execute with the image's page tables loaded, and only around the change of CR3:
 * the loader maps the hv_trampoline_bytes that begin with hv_svm_enter at the same address in the image.
 */
#include <linux/linkage.h>
#include <linux/objtool.h>
#include <asm/asm.h>
#include <asm/nospec-branch.h>
#include <asm/unwind_hints.h>

	.text

/*
 * long hv_vmx_launch(void)
 * The VMCS is current and complete but for RSP, RIP and RFLAGS. Returns 0 from the guest, 1 for VMfailInvalid and
 * 2 for VMfailValid. An entry that fails later is an exit: the image leaves, and that also returns 0.
 */
SYM_FUNC_START(hv_vmx_launch)
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	mov	$0x681c, %eax			/* guest RSP */
	vmwrite	%rsp, %rax
	mov	$0x681e, %eax			/* guest RIP */
	lea	1f(%rip), %rcx
	vmwrite	%rcx, %rax
	pushfq
	pop	%rcx
	mov	$0x6820, %eax			/* guest RFLAGS */
	vmwrite	%rcx, %rax
	xor	%eax, %eax			/* the entry keeps it: 0 in the guest */
	vmlaunch
	mov	$1, %eax
	jc	1f
	mov	$2, %eax
1:	ANNOTATE_NOENDBR
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
	RET
SYM_FUNC_END(hv_vmx_launch)

/*
 * void hv_svm_enter(vmcb, svm_start, cr3, area, frame)
 * Interrupts are off. Stores RSP, RIP, RFLAGS and RAX in the VMCB and the first three in the LeaveFrame, clears GIF,
 * changes to the image's tables and jumps to the image. Returns from the guest, or by hv_leave from the frame.
 */
SYM_CODE_START(hv_svm_enter)
	UNWIND_HINT_FUNC
	ENDBR
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	mov	%rsp, 0x5d8(%rdi)
	lea	1f(%rip), %rax
	mov	%rax, 0x578(%rdi)
	mov	%rsp, 0x90(%r8)
	mov	%rax, 0x78(%r8)
	pushfq
	pop	%rax
	mov	%rax, 0x570(%rdi)
	mov	%rax, 0x88(%r8)
	movq	$0, 0x5f8(%rdi)
	mov	%rcx, %rdi
	clgi
	mov	%rdx, %cr3
	ANNOTATE_RETPOLINE_SAFE
	jmp	*%rsi
1:	UNWIND_HINT_UNDEFINED
	ANNOTATE_NOENDBR
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
	ANNOTATE_UNRET_SAFE
	ret
	int3
SYM_CODE_END(hv_svm_enter)

/*
 * hv_leave: %rdi = LeaveFrame in Linux' direct map, %rsi = CR3, %rdx = CR4 without PGE, %rcx = CR0.
 * Entered from the image with interrupts off (AMD-V: GIF clear). Offsets are those of `LeaveFrame`.
 * The edge of CR4.PGE drops translations older than the launch. SS comes with the IRETQ.
 */
SYM_CODE_START(hv_leave)
	UNWIND_HINT_UNDEFINED
	ANNOTATE_NOENDBR
	mov	%rcx, %cr0
	mov	%rdx, %cr4
	mov	%rsi, %cr3
	mov	0xb0(%rdi), %rax
	mov	%rax, %cr4
	cmpq	$0, 0x140(%rdi)
	je	1f
	lgdt	0x136(%rdi)
	ltr	0x10a(%rdi)
	lgdt	0x116(%rdi)
	lldt	0x108(%rdi)
	jmp	2f
1:	lgdt	0x116(%rdi)
2:	mov	0x100(%rdi), %ds
	mov	0x102(%rdi), %es
	mov	0x104(%rdi), %fs
	mov	0x106(%rdi), %gs
	mov	$0xc0000100, %ecx		/* FS base */
	mov	0xd0(%rdi), %eax
	mov	0xd4(%rdi), %edx
	wrmsr
	inc	%ecx				/* GS base */
	mov	0xd8(%rdi), %eax
	mov	0xdc(%rdi), %edx
	wrmsr
	mov	$0x277, %ecx			/* PAT */
	mov	0xe0(%rdi), %eax
	mov	0xe4(%rdi), %edx
	wrmsr
	cmpq	$0, 0xf8(%rdi)
	je	3f
	mov	$0x6a2, %ecx			/* S_CET */
	mov	0xe8(%rdi), %eax
	mov	0xec(%rdi), %edx
	wrmsr
	mov	$0x6a8, %ecx			/* interrupt SSP table */
	mov	0xf0(%rdi), %eax
	mov	0xf4(%rdi), %edx
	wrmsr
3:	mov	0xc0(%rdi), %rax
	mov	%rax, %db7
	lidt	0x126(%rdi)
	cmpq	$0, 0x140(%rdi)
	je	4f
	mov	$0x1d9, %ecx			/* DEBUGCTL */
	mov	0xc8(%rdi), %eax
	mov	0xcc(%rdi), %edx
	wrmsr
	jmp	5f
4:	stgi
5:	mov	$0xc0000080, %ecx		/* EFER */
	mov	0xb8(%rdi), %eax
	mov	0xbc(%rdi), %edx
	wrmsr
	mov	%rdi, %rsp
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%r11
	pop	%r10
	pop	%r9
	pop	%r8
	pop	%rdi
	pop	%rsi
	pop	%rbp
	pop	%rbx
	pop	%rdx
	pop	%rcx
	pop	%rax
	iretq
	int3
.Lleave_end:
SYM_CODE_END(hv_leave)

	.pushsection .rodata, "a"
	.balign 8
SYM_DATA(hv_trampoline_bytes, .quad .Lleave_end - hv_svm_enter)
	.popsection

/*
 * struct { u64 result, value; } hv_vmcall(u64 control, u64 input, u64 output), and hv_vmmcall likewise
 * The TLFS register convention. Where no hypervisor answers, the instruction is undefined and the result is the
 * status HYPERVISOR_FAULT.
 */
.macro HYPERCALL name, instruction
SYM_FUNC_START(\name)
	mov	%rdi, %rcx
	mov	%rdx, %r8
	mov	%rsi, %rdx
1:	\instruction
	RET
2:	mov	$0xff, %eax
	RET
	_ASM_EXTABLE(1b, 2b)
SYM_FUNC_END(\name)
.endm
	HYPERCALL hv_vmcall, vmcall
	HYPERCALL hv_vmmcall, vmmcall
