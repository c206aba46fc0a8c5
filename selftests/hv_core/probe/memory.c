// SPDX-License-Identifier: GPL-2.0
/* Memory that belongs to the image, seen from the root. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "probe.h"

static void write_there(void *page)
{
	*(volatile uint64_t *)page = ~0ull;
}

static void jump_there(void *page)
{
	((void (*)(void))page)();
}

/* Prints what a user program finds in the page: its reads, and the signals of a write and a jump. */
int probe_sealed(int argc, char **argv)
{
	int file = open("/dev/hv_state", O_RDWR);
	int nonzero = 0;
	uint64_t *page;

	if (argc != 1)
		return 2;
	if (file < 0)
		die("/dev/hv_state");
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED, file, (off_t)strtoull(argv[0], NULL, 0));
	if (page == MAP_FAILED)
		die("mmap");
	for (int i = 0; i < 512; i++)
		nonzero += page[i] != 0;
	printf("nonzero %d\n", nonzero);
	printf("write signal %d\n", signal_of(write_there, page));
	printf("jump signal %d\n", signal_of(jump_there, page));
	return 0;
}

/*
 * Reads what /proc/kcore offers of the direct map, that is all RAM: every byte within 4 MiB of ADDRESS, and elsewhere 4 KiB
 * of each STEP.
 */
int probe_kcore(int argc, char **argv)
{
	static char page[4096];
	unsigned long long pages = 0, unreadable = 0;
	int file = open("/proc/kcore", O_RDONLY);
	uint64_t address, step;
	Elf64_Ehdr header;
	Elf64_Phdr part;

	if (argc != 2)
		return 2;
	address = strtoull(argv[0], NULL, 0);
	step = strtoull(argv[1], NULL, 0);
	if (file < 0 || read(file, &header, sizeof(header)) != sizeof(header))
		die("/proc/kcore");
	for (int i = 0; i < header.e_phnum; i++) {
		if (pread(file, &part, sizeof(part), (off_t)(header.e_phoff + (unsigned)i * sizeof(part))) != sizeof(part))
			die("program header");
		/* Of the others (vmalloc, vmemmap, text) only text has a physical address, and is RAM, too. */
		if (part.p_type != PT_LOAD || part.p_paddr == (Elf64_Addr)-1)
			continue;
		for (uint64_t at = 0; at < part.p_filesz; at += sizeof(page)) {
			uint64_t distance = part.p_paddr + at - address + (4 << 20);

			if (distance >= 8 << 20 && at % step)
				continue;
			if (pread(file, page, sizeof(page), (off_t)(part.p_offset + at)) == sizeof(page))
				pages++;
			else
				unreadable++;
		}
	}
	printf("read %llu pages, unreadable %llu\n", pages, unreadable);
	return unreadable || !pages;
}
