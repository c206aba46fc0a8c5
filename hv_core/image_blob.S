/* SPDX-License-Identifier: GPL-2.0 */
/* The hypervisor image as data: it is never executed where it lies. */
#include <linux/linkage.h>

	.section .rodata, "a"
	.balign 8
	.globl hv_image_start, hv_image_end, hv_image_hash
hv_image_start:
	.incbin IMAGE_BIN
hv_image_end:
/* Its SHA-256, 64 hexadecimal digits. */
hv_image_hash:
	.incbin IMAGE_HASH
