/* SPDX-License-Identifier: GPL-2.0 */
/* The parts of probe, a program for the guest. Each gets its arguments without its own name and returns an exit status. */
#ifndef PROBE_H
#define PROBE_H

#include <stdint.h>

int probe_cpuid(int argc, char **argv);
int probe_step(int argc, char **argv);
int probe_prefix(int argc, char **argv);
int probe_fault(int argc, char **argv);
int probe_illegal(int argc, char **argv);
int probe_msr(int argc, char **argv);
int probe_load(int argc, char **argv);
int probe_storm(int argc, char **argv);
int probe_sealed(int argc, char **argv);
int probe_kcore(int argc, char **argv);
int probe_kvm(int argc, char **argv);
int probe_kexec(int argc, char **argv);

void pin(int cpu);
/* Runs `call` and returns the signal that it raised, 0 for none. */
int signal_of(void (*call)(void *), void *data);
/* leaf, subleaf -> eax, ebx, ecx, edx */
void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
void die(const char *what);

#endif
