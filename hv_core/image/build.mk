# SPDX-License-Identifier: GPL-2.0
# Builds the flat hypervisor image: core, the two shared crates and the image, all for a bare x86-64
# target with soft float and no red zone, linked at a fixed address and stripped of ELF.
#
#   make -f build.mk OUT=DIR [RUSTC=rustc] [LD=ld]
#
# It does not use the kernel's flags on purpose: return thunks, alternatives, ftrace and IBT of the kernel
# have no place in code that does not run as part of it.
RUSTC ?= rustc
LD := ld
OBJCOPY := objcopy
OUT ?= .
here := $(dir $(lastword $(MAKEFILE_LIST)))
crates := $(here)..
core := $(shell $(RUSTC) --print sysroot)/lib/rustlib/src/rust/library/core/src/lib.rs
edition := $(shell grep -m1 '^edition' $(dir $(core))../Cargo.toml | grep -o '20[0-9]*')

target := --target x86_64-unknown-none -Cpanic=abort -Ccode-model=small -Crelocation-model=pic \
	-Copt-level=2 -Ccodegen-units=1 -Cembed-bitcode=no -Cforce-unwind-tables=no
lints := -Dwarnings -Dmissing_docs -Dunsafe_op_in_unsafe_fn
# The same image, wherever the tree lies.
paths := --remap-path-prefix $(abspath $(here)../..)=.
compile = RUSTC_BOOTSTRAP=1 $(RUSTC) $(target) $(paths) -L $(OUT) --sysroot=$(OUT)/no-sysroot --out-dir $(OUT)

$(OUT)/image.bin: $(OUT)/image.elf
	$(OBJCOPY) -O binary $< $@

$(OUT)/image.sha256: $(OUT)/image.bin
	sha256sum <$< | head -c 64 >$@

$(OUT)/image.elf: $(OUT)/libhv_image.a $(here)image.ld
	$(LD) --gc-sections -z noexecstack -nostdlib -static -T $(here)image.ld -o $@ $<

$(OUT)/libhv_image.a: $(shell find $(here)src -name '*.rs' -o -name '*.S') $(OUT)/libhv_abi.rlib $(OUT)/libhv_x86.rlib
	$(compile) --edition 2021 $(lints) --crate-type staticlib --crate-name hv_image \
		--extern hv_abi=$(OUT)/libhv_abi.rlib --extern hv_x86=$(OUT)/libhv_x86.rlib $(here)src/lib.rs

$(OUT)/libhv_abi.rlib: $(wildcard $(crates)/abi/src/*.rs) $(OUT)/libcore.rlib
	$(compile) --edition 2021 $(lints) --crate-type rlib --crate-name hv_abi $(crates)/abi/src/lib.rs

$(OUT)/libhv_x86.rlib: $(wildcard $(crates)/x86/src/*.rs) $(OUT)/libcore.rlib
	$(compile) --edition 2021 $(lints) --crate-type rlib --crate-name hv_x86 $(crates)/x86/src/lib.rs

$(OUT)/libcore.rlib: $(core)
	mkdir -p $(OUT)/no-sysroot
	$(compile) --edition $(edition) --cap-lints allow --crate-type rlib --crate-name core $(core)
	RUSTC_BOOTSTRAP=1 $(RUSTC) $(target) --edition 2021 --crate-type rlib --crate-name compiler_builtins \
		--sysroot=$(OUT)/no-sysroot -L $(OUT) --out-dir $(OUT) -Cmetadata=hv $(here)compiler_builtins.rs
