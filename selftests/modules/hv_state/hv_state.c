// SPDX-License-Identifier: GPL-2.0
/*
 * hv_state: what only a kernel can see or do, for tests of hv_core. The file /dev/hv_state:
 *
 *   read    the registers of every online CPU that a launch and a leave must not change, one a line
 *   write   one command a call; addresses and values in hexadecimal:
 *             read ADDRESS, write ADDRESS   8 bytes at a physical address, through the direct map
 *             xsetbv INDEX VALUE
 *             nmi CPU COUNT                 sends NMIs one after another and waits for each
 *             hypercall CONTROL WORD...     as the root, with up to 7 words of input; RAX is then the parameter "result"
 *           A fault that was caught is EFAULT, a read of anything but zeros EIO, an NMI that does not come
 *           ETIMEDOUT after a minute: on a busy emulator one may take seconds.
 *   mmap    physical memory, from the physical address given as the offset
 */
#include <linux/cpu.h>
#include <linux/delay.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/random.h>
#include <linux/seq_file.h>
#include <linux/smp.h>
#include <linux/uaccess.h>
#include <asm/apic.h>
#include <asm/asm.h>
#include <asm/debugreg.h>
#include <asm/desc.h>
#include <asm/fpu/xcr.h>
#include <asm/msr.h>
#include <asm/nmi.h>
#include <asm/segment.h>

static const struct {
	const char *name;
	u32 number;
} msrs[] = {
	{ "efer", MSR_EFER },
	{ "pat", MSR_IA32_CR_PAT },
	{ "debugctl", MSR_IA32_DEBUGCTLMSR },
	{ "sysenter_cs", MSR_IA32_SYSENTER_CS },
	{ "sysenter_esp", MSR_IA32_SYSENTER_ESP },
	{ "sysenter_eip", MSR_IA32_SYSENTER_EIP },
	{ "star", MSR_STAR },
	{ "lstar", MSR_LSTAR },
	{ "cstar", MSR_CSTAR },
	{ "syscall_mask", MSR_SYSCALL_MASK },
	{ "fs_base", MSR_FS_BASE },
	{ "gs_base", MSR_GS_BASE },
	{ "kernel_gs_base", MSR_KERNEL_GS_BASE },
	{ "tsc_aux", MSR_TSC_AUX },
	{ "apic_base", MSR_IA32_APICBASE },
	{ "misc_enable", MSR_IA32_MISC_ENABLE },
	{ "feature_control", MSR_IA32_FEAT_CTL },
	{ "spec_ctrl", MSR_IA32_SPEC_CTRL },
	{ "xss", MSR_IA32_XSS },
	{ "s_cet", MSR_IA32_S_CET },
	{ "u_cet", MSR_IA32_U_CET },
	{ "ssp_table", MSR_IA32_INT_SSP_TAB },
	{ "pl0_ssp", MSR_IA32_PL0_SSP },
	{ "mtrr_def_type", MSR_MTRRdefType },
};

struct snapshot {
	struct seq_file *seq;
	u64 cr0, cr4, cr8, dr7, xcr0;
	u64 msr[ARRAY_SIZE(msrs)];
	bool has_msr[ARRAY_SIZE(msrs)];
	struct desc_ptr gdtr, idtr;
	u16 tr, ldtr, selector[6];
	u32 lar[8], lsl[8];
};

static void describe(struct snapshot *s, int index, u16 selector)
{
	u32 rights = 0, limit = 0;

	asm volatile("lar %1, %0" : "+r" (rights) : "r" ((u32)selector) : "cc");
	asm volatile("lsl %1, %0" : "+r" (limit) : "r" ((u32)selector) : "cc");
	s->lar[index] = rights;
	s->lsl[index] = limit;
}

/* Runs in a kernel thread of the CPU, so that what belongs to a user program (FS, user GS) is zero. */
static int take(void *data)
{
	struct snapshot *s = data;
	unsigned long flags;
	int i;

	local_irq_save(flags);
	asm volatile("mov %%cr0, %0" : "=r" (s->cr0));
	asm volatile("mov %%cr4, %0" : "=r" (s->cr4));
	asm volatile("mov %%cr8, %0" : "=r" (s->cr8));
	asm volatile("mov %%db7, %0" : "=r" (s->dr7));
	asm volatile("sgdt %0" : "=m" (s->gdtr));
	asm volatile("sidt %0" : "=m" (s->idtr));
	asm volatile("str %0" : "=m" (s->tr));
	asm volatile("sldt %0" : "=m" (s->ldtr));
	/* In 64-bit mode SS is null after an interrupt from user space and __KERNEL_DS after other entries. */
	loadsegment(ss, __KERNEL_DS);
	savesegment(cs, s->selector[0]);
	savesegment(ss, s->selector[1]);
	savesegment(ds, s->selector[2]);
	savesegment(es, s->selector[3]);
	savesegment(fs, s->selector[4]);
	savesegment(gs, s->selector[5]);
	s->xcr0 = s->cr4 & X86_CR4_OSXSAVE ? xgetbv(XCR_XFEATURE_ENABLED_MASK) : 0;
	for (i = 0; i < ARRAY_SIZE(msrs); i++)
		s->has_msr[i] = !rdmsrq_safe(msrs[i].number, &s->msr[i]);
	local_irq_restore(flags);
	for (i = 0; i < 6; i++)
		describe(s, i, s->selector[i]);
	describe(s, 6, s->tr);
	describe(s, 7, s->ldtr);
	return 0;
}

static void print(const struct snapshot *s, int cpu, struct seq_file *seq)
{
	static const char names[][4] = { "cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt" };
	int i;

	seq_printf(seq, "cpu%d cr0 %llx\ncpu%d cr4 %llx\ncpu%d cr8 %llx\ncpu%d dr7 %llx\ncpu%d xcr0 %llx\n", cpu, s->cr0,
		   cpu, s->cr4, cpu, s->cr8, cpu, s->dr7, cpu, s->xcr0);
	for (i = 0; i < ARRAY_SIZE(msrs); i++)
		if (s->has_msr[i])
			seq_printf(seq, "cpu%d %s %llx\n", cpu, msrs[i].name, s->msr[i]);
	seq_printf(seq, "cpu%d gdtr %lx %x\ncpu%d idtr %lx %x\n", cpu, s->gdtr.address, s->gdtr.size, cpu,
		   s->idtr.address, s->idtr.size);
	for (i = 0; i < 8; i++)
		seq_printf(seq, "cpu%d %s %x rights %x limit %x\n", cpu, names[i],
			   i < 6 ? s->selector[i] : i == 6 ? s->tr : s->ldtr, s->lar[i], s->lsl[i]);
}

static int state_show(struct seq_file *seq, void *unused)
{
	struct snapshot *s = kzalloc(sizeof(*s), GFP_KERNEL);
	int cpu, error = 0;

	if (!s)
		return -ENOMEM;
	cpus_read_lock();
	for_each_online_cpu(cpu) {
		memset(s, 0, sizeof(*s));
		error = smp_call_on_cpu(cpu, take, s, false);
		if (error)
			break;
		print(s, cpu, seq);
	}
	cpus_read_unlock();
	kfree(s);
	return error;
}

static int state_open(struct inode *inode, struct file *file)
{
	/* The misc device left itself there. */
	file->private_data = NULL;
	return single_open(file, state_show, NULL);
}

static int touch(u64 physical, bool write)
{
	u64 value = 0;
	int error = 0;
	u64 *at = __va(physical);

	if (write)
		asm volatile("1: mov %2, %1\n2:\n" _ASM_EXTABLE_TYPE_REG(1b, 2b, EX_TYPE_EFAULT_REG, %0)
			     : "+r" (error), "+m" (*at) : "r" (~0ull));
	else
		asm volatile("1: mov %2, %1\n2:\n" _ASM_EXTABLE_TYPE_REG(1b, 2b, EX_TYPE_EFAULT_REG, %0)
			     : "+r" (error), "+r" (value) : "m" (*at));
	return error ?: value ? -EIO : 0;
}

static int set_extended_control(u32 index, u64 value)
{
	int error = 0;

	asm volatile("1: xsetbv\n2:\n" _ASM_EXTABLE_TYPE_REG(1b, 2b, EX_TYPE_EFAULT_REG, %0)
		     : "+r" (error) : "a" ((u32)value), "d" ((u32)(value >> 32)), "c" (index) : "memory");
	return error;
}

static atomic_t nmis_wanted, nmis_taken;
static int nmi_target = -1;

static int take_nmi(unsigned int type, struct pt_regs *regs)
{
	if (raw_smp_processor_id() != READ_ONCE(nmi_target) || atomic_read(&nmis_taken) >= atomic_read(&nmis_wanted))
		return NMI_DONE;
	atomic_inc(&nmis_taken);
	return NMI_HANDLED;
}

/* The file is root's, one test runs at a time: no lock. */
static int send_nmis(int cpu, int count)
{
	int error;

	if (cpu < 0 || cpu >= nr_cpu_ids || !cpu_online(cpu))
		return -ENODEV;
	error = register_nmi_handler(NMI_LOCAL, take_nmi, 0, "hv_state");
	if (error)
		return error;
	atomic_set(&nmis_wanted, 0);
	atomic_set(&nmis_taken, 0);
	WRITE_ONCE(nmi_target, cpu);
	while (!error && count--) {
		unsigned long end = jiffies + 60 * HZ;
		int sent;

		/* The target is still in the handler of the one before: let it go on to anywhere. */
		udelay(1 + get_random_u32_below(50));
		sent = atomic_inc_return(&nmis_wanted);
		preempt_disable();
		apic->send_IPI(cpu, NMI_VECTOR);
		preempt_enable();
		while (atomic_read(&nmis_taken) < sent && !error) {
			cond_resched();
			cpu_relax();
			if (time_after(jiffies, end))
				error = -ETIMEDOUT;
		}
	}
	WRITE_ONCE(nmi_target, -1);
	unregister_nmi_handler(NMI_LOCAL, "hv_state");
	return error;
}

/* RAX of the last hypercall. */
static unsigned long long result;
module_param(result, ullong, 0444);

static int hypercall(u64 control, const u64 *words, size_t size)
{
	void *input = (void *)get_zeroed_page(GFP_KERNEL);
	u64 at = input ? __pa(input) : 0;
	register u64 output asm("r8") = 0;
	u64 rax = 0;
	int error = 0;

	if (!input)
		return -ENOMEM;
	memcpy(input, words, size);
	if (boot_cpu_data.x86_vendor == X86_VENDOR_INTEL)
		asm volatile("1: vmcall\n2:\n" _ASM_EXTABLE_TYPE_REG(1b, 2b, EX_TYPE_EFAULT_REG, %0)
			     : "+r" (error), "+a" (rax), "+d" (at), "+r" (output) : "c" (control) : "cc", "memory");
	else
		asm volatile("1: vmmcall\n2:\n" _ASM_EXTABLE_TYPE_REG(1b, 2b, EX_TYPE_EFAULT_REG, %0)
			     : "+r" (error), "+a" (rax), "+d" (at), "+r" (output) : "c" (control) : "cc", "memory");
	result = rax;
	free_page((unsigned long)input);
	return error;
}

static ssize_t state_write(struct file *file, const char __user *from, size_t size, loff_t *offset)
{
	char command[160];
	u64 address, words[7] = { };
	u32 index;
	int cpu, count, error;

	if (size >= sizeof(command))
		return -EINVAL;
	if (copy_from_user(command, from, size))
		return -EFAULT;
	command[size] = 0;
	if (sscanf(command, "read %llx", &address) == 1)
		error = touch(address, false);
	else if (sscanf(command, "write %llx", &address) == 1)
		error = touch(address, true);
	else if (sscanf(command, "xsetbv %x %llx", &index, &address) == 2)
		error = set_extended_control(index, address);
	else if (sscanf(command, "nmi %d %d", &cpu, &count) == 2)
		error = send_nmis(cpu, count);
	else if (sscanf(command, "hypercall %llx %llx %llx %llx %llx %llx %llx %llx", &address, &words[0], &words[1],
			&words[2], &words[3], &words[4], &words[5], &words[6]) >= 1)
		error = hypercall(address, words, sizeof(words));
	else
		error = -EINVAL;
	return error ?: size;
}

static int state_mmap(struct file *file, struct vm_area_struct *vma)
{
	return remap_pfn_range(vma, vma->vm_start, vma->vm_pgoff, vma->vm_end - vma->vm_start, vma->vm_page_prot);
}

static const struct file_operations state_fops = {
	.owner = THIS_MODULE,
	.open = state_open,
	.read = seq_read,
	.llseek = seq_lseek,
	.release = single_release,
	.write = state_write,
	.mmap = state_mmap,
};

static struct miscdevice state_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "hv_state",
	.fops = &state_fops,
	.mode = 0600,
};
module_misc_device(state_device);

MODULE_DESCRIPTION("Reads and provokes what tests of hv_core need");
MODULE_LICENSE("GPL");
