// SPDX-License-Identifier: GPL-2.0
//! The image header, the boot information and the memory functions that the compiler calls.

#[cfg(target_os = "none")]
use core::arch::global_asm;
use core::mem::MaybeUninit;

use hv_abi::boot::BootInfo;
#[cfg(target_os = "none")]
use hv_abi::boot::IMAGE_MAGIC;

// The linker script defines the `image_*` values.
#[cfg(target_os = "none")]
global_asm!(
    ".pushsection .header, \"a\"",
    ".quad {magic}",
    ".quad image_text_end",
    ".quad image_rodata_end",
    ".quad image_file_end",
    ".quad image_memory_end",
    ".quad image_boot_info",
    ".quad vmx_exit",
    ".quad svm_start",
    ".quad exception_stubs",
    ".quad image_idt",
    ".popsection",
    magic = const IMAGE_MAGIC,
);

/// Filled by the loader before the first entry, never written after.
#[cfg_attr(target_os = "none", link_section = ".boot_info")]
#[no_mangle]
static mut BOOT_INFO: MaybeUninit<BootInfo> = MaybeUninit::uninit();

/// The page of the interrupt descriptor table; the loader fills it.
#[cfg(target_os = "none")]
#[repr(C, align(4096))]
struct Idt([u64; 512]);

#[cfg(target_os = "none")]
#[link_section = ".idt"]
#[used]
static mut IDT: Idt = Idt([0; 512]);

/// What the loader left for all CPUs.
pub fn boot() -> &'static BootInfo {
    let info = &raw const BOOT_INFO;
    // SAFETY: the loader wrote a valid value before it entered the image and nothing writes it after.
    unsafe { (*info).assume_init_ref() }
}

/// Plays the loader's part.
///
/// # Safety
/// Nobody looks at the value of before any more.
#[cfg(not(target_os = "none"))]
pub unsafe fn set_boot(info: BootInfo) {
    let place = &raw mut BOOT_INFO;
    // SAFETY: by the caller's promise.
    unsafe { (*place).write(info) };
}

// The compiler emits calls to these for copies and comparisons; `core` has no implementation without
// `compiler_builtins`. Plain string instructions: no vector registers, as these hold Linux' state. From eight bytes on they
// move words; the last word, which may overlap the one before, is read first and written last.
#[cfg(target_os = "none")]
global_asm!(
    ".pushsection .text.memory, \"ax\"",
    ".globl memcpy, memmove, memset, memcmp, bcmp",
    "memmove:",
    "mov rax, rdi",
    "sub rax, rsi",
    "cmp rax, rdx",
    "jb 2f",
    "memcpy:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "sub rdx, 8",
    "jb 4f",
    "mov r8, [rsi + rdx]",
    "lea r9, [rdi + rdx]",
    "shr rcx, 3",
    "rep movsq",
    "mov [r9], r8",
    "ret",
    "4: rep movsb",
    "ret",
    "2: mov rax, rdi",
    "mov rcx, rdx",
    "lea rsi, [rsi + rdx - 1]",
    "lea rdi, [rdi + rdx - 1]",
    "std",
    "rep movsb",
    "cld",
    "ret",
    "memset:",
    "mov r8, rdi",
    "movzx eax, sil",
    "mov rcx, rdx",
    "sub rdx, 8",
    "jb 5f",
    "mov r9, 0x0101010101010101",
    "imul rax, r9",
    "mov [rdi + rdx], rax",
    "shr rcx, 3",
    "rep stosq",
    "mov rax, r8",
    "ret",
    "5: rep stosb",
    "mov rax, r8",
    "ret",
    "bcmp:",
    "memcmp:",
    "xor eax, eax",
    "mov rcx, rdx",
    "cmp rax, rax",
    "repe cmpsb",
    "je 3f",
    "movzx eax, byte ptr [rdi - 1]",
    "movzx ecx, byte ptr [rsi - 1]",
    "sub eax, ecx",
    "3: ret",
    ".popsection",
);
