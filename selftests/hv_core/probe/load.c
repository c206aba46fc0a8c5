// SPDX-License-Identifier: GPL-2.0
/* Work for every CPU while the machine goes beneath the image and comes back. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "probe.h"

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static unsigned long signals, rounds, bad;
static volatile sig_atomic_t stopped;

static void stop(int number)
{
	(void)number;
	stopped = 1;
}

#define EACH16(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

/* The handler destroys the registers that the interrupted code checks: the kernel has to bring them back. */
static void alarmed(int number)
{
	(void)number;
	signals++;
#define CLEAR(n) "pxor %%xmm" #n ", %%xmm" #n "\n"
	__asm__ volatile("fninit\n" EACH16(CLEAR) : : : "memory");
}

/* Fills registers from `in`, waits a while (CPUID and a loop), stores them to `out`. */
static void round_sse(const uint8_t *in, uint8_t *out)
{
#define LOAD(n) "movups " #n "*16(%0), %%xmm" #n "\n"
#define STORE(n) "movups %%xmm" #n ", " #n "*16(%1)\n"
	__asm__ volatile(EACH16(LOAD) "fldpi\n mov $2000, %%r8d\n 1: dec %%r8d\n jnz 1b\n xor %%eax, %%eax\n cpuid\n"
			 "fstpt 16*16(%1)\n" EACH16(STORE)
			 : : "r" (in), "r" (out) : "rax", "rbx", "rcx", "rdx", "r8", "memory");
}

__attribute__((target("avx"))) static void round_avx(const uint8_t *in, uint8_t *out)
{
#define LOAD_Y(n) "vmovups " #n "*32(%0), %%ymm" #n "\n"
#define STORE_Y(n) "vmovups %%ymm" #n ", " #n "*32(%1)\n"
	__asm__ volatile(EACH16(LOAD_Y) "fldpi\n mov $2000, %%r8d\n 1: dec %%r8d\n jnz 1b\n xor %%eax, %%eax\n cpuid\n"
			 "fstpt 16*32(%1)\n" EACH16(STORE_Y) "vzeroupper\n"
			 : : "r" (in), "r" (out) : "rax", "rbx", "rcx", "rdx", "r8", "memory");
}

/* The upper half of the register file; the lower is AVX's. */
__attribute__((target("avx512f"))) static void round_avx512(const uint8_t *in, uint8_t *out)
{
#define LOAD_H(a, b) "vmovups " #a "*64(%0), %%zmm" #b "\n"
#define STORE_H(a, b) "vmovups %%zmm" #b ", " #a "*64(%1)\n"
#define HIGH(X) X(0, 16) X(1, 17) X(2, 18) X(3, 19) X(4, 20) X(5, 21) X(6, 22) X(7, 23) X(8, 24) X(9, 25) X(10, 26) \
	X(11, 27) X(12, 28) X(13, 29) X(14, 30) X(15, 31)
	__asm__ volatile(HIGH(LOAD_H) "kmovw (%0), %%k1\n fldpi\n mov $2000, %%r8d\n 1: dec %%r8d\n jnz 1b\n"
			 "xor %%eax, %%eax\n cpuid\n fstpt 16*64(%1)\n" HIGH(STORE_H) "vzeroupper\n"
			 : : "r" (in), "r" (out) : "rax", "rbx", "rcx", "rdx", "r8", "memory");
}

static void check_registers(int cpu, double until)
{
	struct sigaction action = { .sa_handler = alarmed, .sa_flags = SA_RESTART };
	struct itimerspec interval = { .it_interval = { 0, 5000000 }, .it_value = { 0, 5000000 } };
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM };
	static uint8_t in[17 * 64], out[17 * 64];
	void (*play)(const uint8_t *, uint8_t *) = round_sse;
	const long double pi = 3.14159265358979323846264338327950288L;
	size_t width = 16, i;
	timer_t timer;

	pin(cpu);
	if (__builtin_cpu_supports("avx512f"))
		play = round_avx512, width = 64;
	else if (__builtin_cpu_supports("avx"))
		play = round_avx, width = 32;
	sigaction(SIGALRM, &action, NULL);
	signal(SIGUSR1, stop);
	if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &interval, NULL))
		die("timer");
	for (i = 0; i < sizeof(in); i++)
		in[i] = (uint8_t)(i * 37 + (size_t)cpu + 1);
	while (!stopped && (rounds < 100 || now() < until)) {
		memset(out, 0, sizeof(out));
		play(in, out);
		if (memcmp(in, out, 16 * width) || memcmp(&pi, out + 16 * width, 10))
			bad++;
		rounds++;
	}
	printf("cpu%d: %lu rounds of %zu-byte registers, %lu signals, %lu wrong\n", cpu, rounds, width, signals, bad);
	exit(bad || !rounds ? 1 : 0);
}

/* One process for each CPU of `cpus` (all if none): calls `work`. Exit status 0 if all succeed. */
static int on_cpus(int argc, char **argv, void (*work)(int cpu, double until))
{
	double until;
	int status, failed = 0, cpu, count = argc > 1 ? argc - 1 : (int)sysconf(_SC_NPROCESSORS_ONLN);

	if (argc < 1)
		return 2;
	/* SIGUSR1 ends it early: the children print what they found. */
	signal(SIGUSR1, SIG_IGN);
	until = now() + atof(argv[0]);
	for (cpu = 0; cpu < count; cpu++)
		if (!fork())
			work(argc > 1 ? atoi(argv[1 + cpu]) : cpu, until);
	while (wait(&status) > 0)
		if (status)
			failed++;
	return failed != 0;
}

int probe_load(int argc, char **argv)
{
	return on_cpus(argc, argv, check_registers);
}

static void execute_cpuid(int cpu, double until)
{
	uint32_t first[4], r[4];
	int i;

	pin(cpu);
	cpuid(0, 0, first);
	while (now() < until)
		for (i = 0; i < 1000; i++) {
			cpuid(0, 0, r);
			if (memcmp(first, r, sizeof(r)))
				exit(1);
		}
	exit(0);
}

int probe_storm(int argc, char **argv)
{
	return on_cpus(argc, argv, execute_cpuid);
}
