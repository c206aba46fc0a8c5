# SPDX-License-Identifier: GPL-2.0
# VT-x: VM exit and entry, and the NMI that arrives in the image.
#
# vmx_exit: HOST_RIP. RSP = CpuArea.stack, the word there is the address of the CpuArea; all other
#   general registers are the guest's. Calls vmx_handle_exit(rdi = CpuArea), which returns rax = the
#   VpContext to resume and edx = 0 for VMRESUME, 1 for VMLAUNCH. Resumes with all registers loaded. An entry that
#   fails without an exit goes to vmx_entry_failed(rdi = CpuArea), which answers likewise.
# vmx_nmi: runs on its own interrupt stack inside the CPU's 2 MiB, so RSP finds the CpuArea. It sends the
#   NMI to this CPU again and returns without IRET: NMIs stay blocked until the VM entry unblocks them, and
#   the root takes the new one natively, as soon as it runs. So no window exists in which an NMI is lost.

.pushsection .text.entry, "ax"
.macro load_context_and instruction
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
	mov rax, [rax]
	\instruction
	mov rdi, [rsp]
	call vmx_entry_failed
	jmp 4b
.endm

.globl vmx_exit
.p2align 4
vmx_exit:
	endbr64
	push rax
	mov rax, [rsp + 8]
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
	pop rcx
	mov [rax], rcx
	mov rdi, [rsp]
	call vmx_handle_exit
4:	test edx, edx
	jnz 2f
	load_context_and vmresume
2:	load_context_and vmlaunch

.globl vmx_nmi
.p2align 4
vmx_nmi:
	push rax
	push rcx
	push rdx
	mov rcx, rsp
	and rcx, -0x200000
	mov edx, [rcx + 0x20]
	shl rdx, 12
	movabs rax, {nmis}
	inc qword ptr [rax + rdx]
	mov edx, [rcx + 0x24]
	cmp dword ptr [rcx + 0x28], 0
	je 1f
	mov eax, 0x4400
	mov ecx, 0x830
	wrmsr
	jmp 2f
1:	movabs rcx, {apic_page}
	shl edx, 24
	mov eax, [rcx + 0x310]
	push rax
	mov [rcx + 0x310], edx
	mov dword ptr [rcx + 0x300], 0x4400
3:	test dword ptr [rcx + 0x300], 0x1000
	jnz 3b
	pop rdx
	mov [rcx + 0x310], edx
2:	mov rdx, [rsp + 24 + 24]
	mov rcx, [rsp + 24]
	mov [rdx - 8], rcx
	mov rcx, [rsp + 24 + 16]
	mov [rdx - 16], rcx
	pop rdx
	pop rcx
	pop rax
	mov rsp, [rsp + 24]
	lea rsp, [rsp - 16]
	popfq
	ret
.popsection
