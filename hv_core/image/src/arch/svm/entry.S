# SPDX-License-Identifier: GPL-2.0
# AMD-V: first entry and the VMRUN loop. GIF is clear whenever the image runs, so no interrupt, NMI, INIT
# or SMI arrives in it; they are taken by the guest at the next VMRUN.
#
# svm_start: rdi = CpuArea. The trampoline jumps here from Linux with CR3 switched to the image's tables
#   and GIF clear. Loads the image's stack and descriptor tables, then runs the root. TR stays Linux':
#   the image uses no interrupt stack table on AMD-V, so it needs none.
# The loop: VMRUN takes the VMCB's address in RAX; RAX, RSP, RIP and RFLAGS of the guest are in the VMCB.
#   svm_child_exit and svm_root_exit(rdi = CpuArea) return rax = the VpContext to run.

.pushsection .text.entry, "ax"
.macro load_context_and_run
	mov rcx, [rax + 8]
	mov rdx, [rax + 16]
	mov rbx, [rax + 24]
	mov rbp, [rax + 40]
	mov rsi, [rax + 48]
	mov rdi, [rax + 56]
	mov r8, [rax + 64]
	mov r9, [rax + 72]
	mov r10, [rax + 80]
	mov r11, [rax + 88]
	mov r12, [rax + 96]
	mov r13, [rax + 104]
	mov r14, [rax + 112]
	mov r15, [rax + 120]
	mov rax, [rax + 0x80]
	vmrun rax
	jmp 2b
.endm

.globl svm_start
.p2align 4
svm_start:
	endbr64
	mov rsp, [rdi + 0x10]
	lgdt [rdi + 0x38 + 6]
	lidt [rdi + 0x48 + 6]
	mov eax, {data}
	mov ds, eax
	mov es, eax
	mov ss, eax
	push {code}
	lea rax, [rip + 1f]
	push rax
	retfq
1:	sti			# with GIF clear: the host's IF decides on the interrupt exits of children
	lea rax, [rdi + 0x58]
	jmp 3f
	.p2align 4
2:	mov rax, [rsp]
	mov rax, [rax + 8]
	mov [rax + 8], rcx
	mov [rax + 16], rdx
	mov [rax + 24], rbx
	mov [rax + 40], rbp
	mov [rax + 48], rsi
	mov [rax + 56], rdi
	mov [rax + 64], r8
	mov [rax + 72], r9
	mov [rax + 80], r10
	mov [rax + 88], r11
	mov [rax + 96], r12
	mov [rax + 104], r13
	mov [rax + 112], r14
	mov [rax + 120], r15
	mov rdi, [rsp]
	cmp byte ptr [rax + 0x90], 0
	jne 4f
	call svm_child_exit
3:	load_context_and_run
4:	call svm_root_exit
	load_context_and_run
.popsection
