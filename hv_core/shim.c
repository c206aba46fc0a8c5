// SPDX-License-Identifier: GPL-2.0
/*
 * What the module needs from the kernel that only C can reach: macros, inline functions, per-CPU variables and
 * callback structures. No logic lives here; every function is one call, declared in sys.rs.
 */
#include <linux/anon_inodes.h>
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/debugfs.h>
#include <linux/entry-virt.h>
#include <linux/eventfd.h>
#include <linux/gfp.h>
#include <linux/hrtimer.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/namei.h>
#include <linux/poll.h>
#include <linux/reboot.h>
#include <linux/rseq.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <linux/suspend.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <asm/apic.h>
#include <asm/cpufeature.h>
#include <asm/fpu/api.h>
#include <asm/io.h>
#include <asm/mce.h>
#include <asm/msr.h>
#include <asm/processor.h>
#include <asm/tsc.h>
#include <hyperv/hvhdk.h>
#include <trace/events/ipi.h>
#include <uapi/linux/mshv.h>
#include "include/hv_core.h"
#include "include/uapi/linux/hv_core.h"

/* Entry points of hv_core_main.rs. */
int hv_core_cpu_online(unsigned int cpu);
int hv_core_cpu_offline(unsigned int cpu);
void hv_core_reboot(void);
bool hv_core_launched(void);
void hv_core_status(struct seq_file *seq);
void hv_core_drain_log(void);

void *hv_sys_alloc_pages(unsigned int order);
void *hv_sys_alloc_pages(unsigned int order)
{
	return (void *)__get_free_pages(GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN, order);
}

void hv_sys_free_pages(void *address, unsigned int order);
void hv_sys_free_pages(void *address, unsigned int order)
{
	free_pages((unsigned long)address, order);
}

u64 hv_sys_virt_to_phys(const void *address);
u64 hv_sys_virt_to_phys(const void *address)
{
	if (is_vmalloc_or_module_addr(address))
		return page_to_phys(vmalloc_to_page(address)) + offset_in_page(address);
	return virt_to_phys((void *)address);
}

u64 hv_sys_direct_map(void);
u64 hv_sys_direct_map(void)
{
	return PAGE_OFFSET;
}

/* arch/x86/entry/calling.h: the two tables of a process lie side by side, and their PCIDs differ in one bit. */
u64 hv_sys_user_cr3_bits(void);
u64 hv_sys_user_cr3_bits(void)
{
	return boot_cpu_has(X86_FEATURE_PTI) ? PAGE_SIZE | BIT_ULL(X86_CR3_PTI_PCID_USER_BIT) : 0;
}

/* A machine check while a child ran counts as one under a user program: the kernel's own state is sound. */
void hv_sys_machine_check(void);
void hv_sys_machine_check(void)
{
#ifdef CONFIG_X86_MCE
	struct pt_regs registers = { .cs = __USER_CS, .flags = X86_EFLAGS_IF };

	do_machine_check(&registers);
#endif
}

/* In the order of the bits of abi/src/mitigation.rs. */
u32 hv_sys_mitigations(void);
u32 hv_sys_mitigations(void)
{
	return boot_cpu_has(X86_FEATURE_MSR_SPEC_CTRL) << 0 |
	       boot_cpu_has(X86_FEATURE_KERNEL_IBRS) << 1 |
	       boot_cpu_has(X86_FEATURE_IBPB) << 2 |
	       boot_cpu_has_bug(X86_BUG_SPECTRE_V2) << 3 |
	       (boot_cpu_has(X86_FEATURE_IBPB_ON_VMEXIT) || boot_cpu_has(X86_FEATURE_IBPB_EXIT_TO_USER)) << 4 |
	       boot_cpu_has(X86_FEATURE_CLEAR_CPU_BUF_VM) << 5 |
	       (boot_cpu_has(X86_FEATURE_RSB_VMEXIT) || boot_cpu_has(X86_FEATURE_RSB_VMEXIT_LITE)) << 6 |
	       boot_cpu_has_bug(X86_BUG_L1TF) << 7 |
	       boot_cpu_has(X86_FEATURE_FLUSH_L1D) << 8 |
	       cpu_mitigations_off() << 9;
}

/*
 * Takes the FPU away from the current task and all code of this CPU. Its registers are in memory afterwards, and nobody uses
 * those of the CPU. Interrupts are off until the end.
 */
void hv_sys_fpu_begin(void);
void hv_sys_fpu_begin(void)
{
	kernel_fpu_begin_mask(0);
}

void hv_sys_fpu_end(void);
void hv_sys_fpu_end(void)
{
	kernel_fpu_end();
}

u32 hv_sys_physical_bits(void);
u32 hv_sys_physical_bits(void)
{
	return boot_cpu_data.x86_phys_bits;
}

u32 hv_sys_tsc_khz(void);
u32 hv_sys_tsc_khz(void)
{
	return tsc_khz;
}

unsigned int hv_sys_cpu_count(void);
unsigned int hv_sys_cpu_count(void)
{
	return nr_cpu_ids;
}

bool hv_sys_cpu_possible(unsigned int cpu);
bool hv_sys_cpu_possible(unsigned int cpu)
{
	return cpu_possible(cpu);
}

bool hv_sys_cpu_online(unsigned int cpu);
bool hv_sys_cpu_online(unsigned int cpu)
{
	return cpu_online(cpu);
}

unsigned int hv_sys_this_cpu(void);
unsigned int hv_sys_this_cpu(void)
{
	return raw_smp_processor_id();
}

u32 hv_sys_apic_id(unsigned int cpu);
u32 hv_sys_apic_id(unsigned int cpu)
{
	return cpu_physical_id(cpu);
}

void hv_sys_cpus_lock(void);
void hv_sys_cpus_lock(void)
{
	cpus_read_lock();
}

void hv_sys_cpus_unlock(void);
void hv_sys_cpus_unlock(void)
{
	cpus_read_unlock();
}

int hv_sys_call_on_cpu(unsigned int cpu, void (*call)(void *data), void *data);
int hv_sys_call_on_cpu(unsigned int cpu, void (*call)(void *data), void *data)
{
	return smp_call_function_single(cpu, call, data, 1);
}

unsigned long hv_sys_irq_save(void);
unsigned long hv_sys_irq_save(void)
{
	unsigned long flags;

	local_irq_save(flags);
	return flags;
}

void hv_sys_irq_restore(unsigned long flags);
void hv_sys_irq_restore(unsigned long flags)
{
	local_irq_restore(flags);
}

int hv_sys_rdmsr(u32 msr, u64 *value);
int hv_sys_rdmsr(u32 msr, u64 *value)
{
	return rdmsrq_safe(msr, value);
}

int hv_sys_wrmsr(u32 msr, u64 value);
int hv_sys_wrmsr(u32 msr, u64 value)
{
	return wrmsrq_safe(msr, value);
}

bool hv_sys_module_loaded(const char *name);
bool hv_sys_module_loaded(const char *name)
{
	char path[64];
	struct path found;

	snprintf(path, sizeof(path), "/sys/module/%s/initstate", name);
	if (kern_path(path, 0, &found))
		return false;
	path_put(&found);
	return true;
}

/* CPU hotplug: the callbacks run on the CPU itself, after it came up and before it goes down. */
static enum cpuhp_state hotplug_state;

int hv_sys_hotplug_start(void);
int hv_sys_hotplug_start(void)
{
	int state = cpuhp_setup_state_nocalls_cpuslocked(CPUHP_AP_ONLINE_DYN, "hv_core:online", hv_core_cpu_online,
							 hv_core_cpu_offline);

	if (state < 0)
		return state;
	hotplug_state = state;
	return 0;
}

void hv_sys_hotplug_stop(void);
void hv_sys_hotplug_stop(void)
{
	if (hotplug_state)
		cpuhp_remove_state_nocalls(hotplug_state);
	hotplug_state = 0;
}

/* Reboot, power-off and kexec: the last call before the machine goes. */
static int reboot_call(struct notifier_block *block, unsigned long action, void *data)
{
	hv_core_reboot();
	return NOTIFY_DONE;
}

/* Lowest priority: other notifiers may still want what we serve. */
static struct notifier_block reboot_block = { .notifier_call = reboot_call, .priority = INT_MIN };

/* Suspend and hibernation reset the CPUs under the image: refused while it is there. */
static int power_call(struct notifier_block *block, unsigned long action, void *data)
{
	if ((action == PM_SUSPEND_PREPARE || action == PM_HIBERNATION_PREPARE) && hv_core_launched()) {
		pr_warn("hv_core: suspend refused while the hypervisor runs; unload hv_core first\n");
		return notifier_from_errno(-EBUSY);
	}
	return NOTIFY_DONE;
}

static struct notifier_block power_block = { .notifier_call = power_call };

/* kvm_amd does not look at CPUID again before it uses the extension, so it is stopped at its door. */
static int module_call(struct notifier_block *block, unsigned long action, void *data)
{
	struct module *module = data;

	if (action == MODULE_STATE_COMING && hv_core_launched() &&
	    (!strcmp(module->name, "kvm_amd") || !strcmp(module->name, "kvm_intel"))) {
		pr_warn("hv_core: %s refused: hv_core owns the virtualization extension; unload hv_core first\n",
			module->name);
		return notifier_from_errno(-EBUSY);
	}
	return NOTIFY_DONE;
}

static struct notifier_block module_block = { .notifier_call = module_call };

int hv_sys_notifiers_start(void);
int hv_sys_notifiers_start(void)
{
	int error = register_reboot_notifier(&reboot_block);

	if (error)
		return error;
	error = register_pm_notifier(&power_block);
	if (error)
		goto reboot;
	error = register_module_notifier(&module_block);
	if (error)
		goto power;
	return 0;
power:
	unregister_pm_notifier(&power_block);
reboot:
	unregister_reboot_notifier(&reboot_block);
	return error;
}

void hv_sys_notifiers_stop(void);
void hv_sys_notifiers_stop(void)
{
	unregister_module_notifier(&module_block);
	unregister_pm_notifier(&power_block);
	unregister_reboot_notifier(&reboot_block);
}

/* debugfs: hv_core/status. */
static int status_show(struct seq_file *seq, void *unused)
{
	hv_core_status(seq);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(status);

static struct dentry *debug_folder;

void hv_sys_debugfs_start(void);
void hv_sys_debugfs_start(void)
{
	debug_folder = debugfs_create_dir("hv_core", NULL);
	debugfs_create_file("status", 0400, debug_folder, NULL, &status_fops);
}

void hv_sys_debugfs_stop(void);
void hv_sys_debugfs_stop(void)
{
	debugfs_remove(debug_folder);
}

/* The log ring is read now and then; the timer waits for a CPU that is awake anyway. */
static void drain(struct work_struct *work);
static DECLARE_DEFERRABLE_WORK(drain_work, drain);

static void drain(struct work_struct *work)
{
	hv_core_drain_log();
	schedule_delayed_work(&drain_work, HZ);
}

void hv_sys_drain_start(void);
void hv_sys_drain_start(void)
{
	schedule_delayed_work(&drain_work, HZ);
}

void hv_sys_drain_stop(void);
void hv_sys_drain_stop(void)
{
	cancel_delayed_work_sync(&drain_work);
}

/*
 * /dev/mshv: the device and the two kinds of anonymous files. The structures of mshv/uapi.rs and abi/src/partition.rs
 * are those of the headers:
 */
static_assert(MSHV_CREATE_PARTITION == 0x4010b800 && MSHV_ROOT_HVCALL == 0xc020b807);
static_assert(MSHV_INITIALIZE_PARTITION == 0xb800 && MSHV_CREATE_VP == 0x4004b801);
static_assert(MSHV_SET_GUEST_MEMORY == 0x4020b802 && MSHV_IRQFD == 0x4010b803);
static_assert(MSHV_IOEVENTFD == 0x4020b804 && MSHV_SET_MSI_ROUTING == 0x4008b805);
static_assert(MSHV_GET_GPAP_ACCESS_BITMAP == 0xc020b806 && MSHV_RUN_VP == 0x8100b800);
static_assert(MSHV_GET_VP_STATE == 0xc010b801 && MSHV_SET_VP_STATE == 0xc010b802);
static_assert(HV_PORT_EVENTFD == 0x4010b8c0);
static_assert(sizeof(struct mshv_create_partition_v2) == 64);
static_assert(offsetof(struct mshv_create_partition_v2, pt_cpu_fbanks) == 24);
static_assert(offsetof(struct mshv_create_partition_v2, pt_disabled_xsave) == 56);
static_assert(sizeof(struct mshv_user_mem_region) == 32 && offsetof(struct mshv_user_mem_region, flags) == 24);
static_assert(sizeof(struct mshv_user_irqfd) == 16 && offsetof(struct mshv_user_irqfd, gsi) == 8);
static_assert(sizeof(struct mshv_user_ioeventfd) == 32 && offsetof(struct mshv_user_ioeventfd, fd) == 20);
static_assert(sizeof(struct mshv_user_irq_entry) == 16 && sizeof(struct mshv_user_irq_table) == 8);
static_assert(sizeof(struct mshv_gpap_access_bitmap) == 32);
static_assert(offsetof(struct mshv_gpap_access_bitmap, bitmap_ptr) == 24);
static_assert(sizeof(struct mshv_root_hvcall) == 32 && offsetof(struct mshv_root_hvcall, in_ptr) == 16);
static_assert(sizeof(struct mshv_get_set_vp_state) == 16);
static_assert(sizeof(struct hv_input_create_partition) == 56);
static_assert(offsetof(struct hv_input_create_partition, compatibility_version) == 16);
static_assert(offsetof(struct hv_input_create_partition, isolation_properties) == 48);
static_assert(sizeof(struct hv_deposit_memory) == 8 && sizeof(struct hv_input_withdraw_memory) == 16);
static_assert(sizeof(struct hv_input_get_partition_property) == 16);
static_assert(sizeof(struct hv_input_set_partition_property) == 24);
static_assert(sizeof(struct hv_input_map_gpa_pages) == 24 && sizeof(struct hv_input_unmap_gpa_pages) == 24);
static_assert(sizeof(struct hv_create_vp) == 40 && sizeof(union hv_input_delete_vp) == 16);
static_assert(sizeof(struct hv_input_get_vp_registers) == 16 && sizeof(struct hv_register_assoc) == 32);
static_assert(sizeof(struct hv_input_map_vp_state_page) == 24);
static_assert(offsetof(struct hv_input_map_vp_state_page, requested_map_location) == 16);
static_assert(sizeof(struct hv_input_unmap_vp_state_page) == 16);
static_assert(sizeof(struct hv_input_get_vp_state) == 40 && sizeof(struct hv_input_set_vp_state) == 40);
static_assert(sizeof(struct hv_synthetic_timers_state) == 200);
static_assert(sizeof(struct hv_input_assert_virtual_interrupt) == 32);
static_assert(sizeof(struct hv_message) == 256 && sizeof(struct hv_message_header) == 16);
static_assert(sizeof(struct hv_x64_intercept_message_header) == 40);
static_assert(sizeof(struct hv_x64_memory_intercept_message) == 80);
static_assert(offsetof(struct hv_x64_memory_intercept_message, guest_physical_address) == 56);
static_assert(sizeof(struct hv_x64_apic_eoi_message) == 8);

/* Entry points of mshv/mod.rs. */
long hv_mshv_device_ioctl(unsigned int command, unsigned long argument);
long hv_mshv_partition_ioctl(void *partition, unsigned int command, unsigned long argument);
void hv_mshv_partition_release(void *partition);
long hv_mshv_vp_ioctl(void *vp, unsigned int command, unsigned long argument);
void *hv_mshv_vp_page(void *vp, unsigned long number);
void hv_mshv_vp_release(void *vp);
long hv_mshv_object_ioctl(unsigned int command, unsigned long argument);

static long device_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	return hv_mshv_device_ioctl(command, argument);
}

static const struct file_operations device_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = device_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice mshv_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "mshv",
	.fops = &device_fops,
	.mode = 0660,
};

static long partition_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	return hv_mshv_partition_ioctl(file->private_data, command, argument);
}

static int partition_release(struct inode *inode, struct file *file)
{
	hv_mshv_partition_release(file->private_data);
	return 0;
}

static const struct file_operations partition_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = partition_ioctl,
	.release = partition_release,
	.llseek = noop_llseek,
};

static long vp_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	return hv_mshv_vp_ioctl(file->private_data, command, argument);
}

/* The page has a reference of its own in the mapping, and the mapping holds the file. */
static int vp_mmap(struct file *file, struct vm_area_struct *vma)
{
	void *page = hv_mshv_vp_page(file->private_data, vma->vm_pgoff);

	if (IS_ERR(page))
		return PTR_ERR(page);
	if (vma_pages(vma) != 1 || !(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	vm_flags_set(vma, VM_DONTEXPAND | VM_DONTDUMP);
	return vm_insert_page(vma, vma->vm_start, virt_to_page(page));
}

static int vp_release(struct inode *inode, struct file *file)
{
	hv_mshv_vp_release(file->private_data);
	return 0;
}

static const struct file_operations vp_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = vp_ioctl,
	.mmap = vp_mmap,
	.release = vp_release,
	.llseek = noop_llseek,
};

static long object_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	return hv_mshv_object_ioctl(command, argument);
}

static const struct file_operations object_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = object_ioctl,
	.llseek = noop_llseek,
};

int hv_sys_mshv_register(void);
int hv_sys_mshv_register(void)
{
	return misc_register(&mshv_device);
}

void hv_sys_mshv_deregister(void);
void hv_sys_mshv_deregister(void)
{
	misc_deregister(&mshv_device);
}

/* On success the file owns the data. */
int hv_sys_partition_fd(void *partition);
int hv_sys_partition_fd(void *partition)
{
	return anon_inode_getfd("mshv_partition", &partition_fops, partition, O_RDWR | O_CLOEXEC);
}

int hv_sys_vp_fd(void *vp);
int hv_sys_vp_fd(void *vp)
{
	return anon_inode_getfd("mshv_vp", &vp_fops, vp, O_RDWR | O_CLOEXEC);
}

int hv_sys_device_fd(void);
int hv_sys_device_fd(void)
{
	return anon_inode_getfd("mshv_device", &object_fops, NULL, O_RDWR | O_CLOEXEC);
}

/* Memory: single pages for the hypervisor, charged to who asks, and pinned pages of user space. */
int hv_sys_alloc_single_pages(unsigned int order, unsigned long owner, u64 *pfns);
int hv_sys_alloc_single_pages(unsigned int order, unsigned long owner, u64 *pfns)
{
	struct page *page = alloc_pages(GFP_KERNEL_ACCOUNT | __GFP_NOWARN | (order ? __GFP_NORETRY : 0), order);
	unsigned int i;

	if (!page)
		return -ENOMEM;
	split_page(page, order);
	for (i = 0; i < 1u << order; i++) {
		set_page_private(page + i, owner);
		pfns[i] = page_to_pfn(page + i);
	}
	return 0;
}

bool hv_sys_page_owned(u64 pfn, unsigned long owner);
bool hv_sys_page_owned(u64 pfn, unsigned long owner)
{
	return pfn_valid(pfn) && page_private(pfn_to_page(pfn)) == owner;
}

void hv_sys_page_disown(u64 pfn);
void hv_sys_page_disown(u64 pfn)
{
	set_page_private(pfn_to_page(pfn), 0);
}

/* The page may hold what the hypervisor left there. */
void hv_sys_free_single_page(u64 pfn);
void hv_sys_free_single_page(u64 pfn)
{
	set_page_private(pfn_to_page(pfn), 0);
	clear_page(page_address(pfn_to_page(pfn)));
	__free_page(pfn_to_page(pfn));
}

int hv_sys_pin_pages(unsigned long address, int count, bool write, struct page **pages);
int hv_sys_pin_pages(unsigned long address, int count, bool write, struct page **pages)
{
	return pin_user_pages_fast(address, count, FOLL_LONGTERM | (write ? FOLL_WRITE : 0), pages);
}

void hv_sys_unpin_pages(struct page **pages, unsigned long count, bool dirty);
void hv_sys_unpin_pages(struct page **pages, unsigned long count, bool dirty)
{
	unpin_user_pages_dirty_lock(pages, count, dirty);
}

/* Which pages hv_sys_hold_pages gets, as sys.rs numbers them. */
enum { HOLD_PRESENT, HOLD_WITHOUT_WAITING, HOLD_WAITING };

int hv_sys_hold_pages(unsigned long address, int count, bool write, int how, struct page **pages);
int hv_sys_hold_pages(unsigned long address, int count, bool write, int how, struct page **pages)
{
	unsigned int flags = write ? FOLL_WRITE : 0;

	if (how == HOLD_PRESENT)
		return get_user_pages_fast_only(address, count, flags, pages);
	/* FOLL_NOWAIT also keeps a userfaultfd from being asked for pages that nobody wants yet. */
	flags |= how == HOLD_WAITING ? FOLL_INTERRUPTIBLE : FOLL_NOWAIT;
	return get_user_pages_unlocked(address, count, pages, flags);
}

/* 1 if the page of a device that user space has mapped there may be written to, 0 if only read; -EFAULT if there is none. */
int hv_sys_device_page(unsigned long address, bool write, u64 *pfn);
int hv_sys_device_page(unsigned long address, bool write, u64 *pfn)
{
	struct follow_pfnmap_args args = { .address = address };
	struct mm_struct *mm = current->mm;
	int error;

	mmap_read_lock(mm);
	error = fixup_user_fault(mm, address, write ? FAULT_FLAG_WRITE : 0, NULL);
	args.vma = vma_lookup(mm, address);
	if (!error && args.vma && args.vma->vm_flags & (VM_IO | VM_PFNMAP))
		error = follow_pfnmap_start(&args);
	else
		error = -EFAULT;
	if (!error) {
		*pfn = args.pfn;
		error = args.writable;
		follow_pfnmap_end(&args);
	}
	mmap_read_unlock(mm);
	/* Two ways to cache the same memory do not go together. */
	return error >= 0 && page_is_ram(*pfn) ? -EFAULT : error;
}

void hv_sys_release_pages(struct page **pages, unsigned long count);
void hv_sys_release_pages(struct page **pages, unsigned long count)
{
	while (count--)
		put_page(pages[count]);
}

void hv_sys_dirty_pages(struct page **pages, unsigned long count);
void hv_sys_dirty_pages(struct page **pages, unsigned long count)
{
	while (count--) {
		if (!PageDirty(pages[count]))
			set_page_dirty(pages[count]);
	}
}

/* Entry point of root/region.rs: false if it would have to sleep and may not. */
bool hv_root_memory_changes(void *owner, void *watch, unsigned long start, unsigned long end, bool may_sleep,
			    unsigned long sequence);

/* Tells the owner when the kernel takes pages of a range of user space away, or rights to them. */
struct hv_watch {
	struct mmu_interval_notifier notifier;
	void *owner;
};

static bool watch_invalidate(struct mmu_interval_notifier *notifier, const struct mmu_notifier_range *range,
			     unsigned long sequence)
{
	struct hv_watch *watch = container_of(notifier, struct hv_watch, notifier);

	return hv_root_memory_changes(watch->owner, watch, range->start, range->end,
				      mmu_notifier_range_blockable(range), sequence);
}

static const struct mmu_interval_notifier_ops watch_ops = {
	.invalidate = watch_invalidate,
};

/* Of the current process. The owner may hear from it before this returns. */
struct hv_watch *hv_sys_watch_new(unsigned long address, unsigned long length, void *owner);
struct hv_watch *hv_sys_watch_new(unsigned long address, unsigned long length, void *owner)
{
	struct hv_watch *watch = kzalloc(sizeof(*watch), GFP_KERNEL_ACCOUNT);
	int error;

	if (!watch)
		return ERR_PTR(-ENOMEM);
	watch->owner = owner;
	error = mmu_interval_notifier_insert(&watch->notifier, current->mm, address, length, &watch_ops);
	if (error) {
		kfree(watch);
		return ERR_PTR(error);
	}
	return watch;
}

/* Waits for calls to the owner; afterwards there are none. */
void hv_sys_watch_free(struct hv_watch *watch);
void hv_sys_watch_free(struct hv_watch *watch)
{
	mmu_interval_notifier_remove(&watch->notifier);
	kfree(watch);
}

unsigned long hv_sys_watch_begin(struct hv_watch *watch);
unsigned long hv_sys_watch_begin(struct hv_watch *watch)
{
	return mmu_interval_read_begin(&watch->notifier);
}

bool hv_sys_watch_changed(struct hv_watch *watch, unsigned long sequence);
bool hv_sys_watch_changed(struct hv_watch *watch, unsigned long sequence)
{
	return mmu_interval_read_retry(&watch->notifier, sequence);
}

void hv_sys_watch_note(struct hv_watch *watch, unsigned long sequence);
void hv_sys_watch_note(struct hv_watch *watch, unsigned long sequence)
{
	mmu_interval_set_seq(&watch->notifier, sequence);
}

u64 hv_sys_page_to_pfn(struct page *page);
u64 hv_sys_page_to_pfn(struct page *page)
{
	return page_to_pfn(page);
}

bool hv_sys_large_code_pages_are_unsafe(void);
bool hv_sys_large_code_pages_are_unsafe(void)
{
	return boot_cpu_has_bug(X86_BUG_ITLB_MULTIHIT);
}

/* The words of a message, which sys.rs asserts. copy_to_user would take longer to check what it is given than to copy it. */
#define MESSAGE_WORDS 18

int hv_sys_write_message(unsigned long to, const u64 *from);
int hv_sys_write_message(unsigned long to, const u64 *from)
{
	u64 __user *words = (u64 __user *)to;
	unsigned int i;

	if (!user_write_access_begin(words, MESSAGE_WORDS * 8))
		return -EFAULT;
#pragma GCC unroll 18
	for (i = 0; i < MESSAGE_WORDS; i++)
		unsafe_put_user(READ_ONCE(from[i]), words + i, fault);
	user_write_access_end();
	return 0;
fault:
	user_write_access_end();
	return -EFAULT;
}

/* Scheduling around a virtual processor. */
bool hv_sys_must_reschedule(void);
bool hv_sys_must_reschedule(void)
{
	return need_resched();
}

/* Where the current thread is told that another shall run, and the bit. */
struct hv_flag {
	const unsigned long *word;
	unsigned long mask;
};

struct hv_flag hv_sys_reschedule_flag(void);
struct hv_flag hv_sys_reschedule_flag(void)
{
	return (struct hv_flag){ &current_thread_info()->flags, _TIF_NEED_RESCHED };
}

int hv_sys_guest_mode_work(void);
int hv_sys_guest_mode_work(void)
{
	return __xfer_to_guest_mode_work_pending() ? xfer_to_guest_mode_handle_work() : 0;
}

void hv_sys_guest_mode_end(void);
void hv_sys_guest_mode_end(void)
{
	rseq_virt_userspace_exit();
}

int hv_sys_reschedule(void);
int hv_sys_reschedule(void)
{
	/* cond_resched does nothing in a preemptible kernel, which would wait for its next interrupt. */
	if (need_resched())
		schedule();
	return fatal_signal_pending(current) ? -EINTR : 0;
}

void hv_sys_interrupt_cpu(unsigned int cpu);
void hv_sys_interrupt_cpu(unsigned int cpu)
{
	smp_send_reschedule(cpu);
}

void hv_sys_call_on_each_cpu(void (*call)(void *data), void *data);
void hv_sys_call_on_each_cpu(void (*call)(void *data), void *data)
{
	on_each_cpu(call, data, 1);
}

int hv_sys_call_on_one_cpu(unsigned int cpu, void (*call)(void *data), void *data);
int hv_sys_call_on_one_cpu(unsigned int cpu, void (*call)(void *data), void *data)
{
	return smp_call_function_single(cpu, call, data, 1);
}

u64 hv_sys_time(void);
u64 hv_sys_time(void)
{
	return ktime_get_ns();
}

/* What the thread of a virtual processor sleeps on: a completion, and a timer that completes it. */
struct hv_alarm {
	struct hrtimer timer;
	struct completion done;
	bool fired;
};

static enum hrtimer_restart alarm_fires(struct hrtimer *timer)
{
	struct hv_alarm *alarm = container_of(timer, struct hv_alarm, timer);

	WRITE_ONCE(alarm->fired, true);
	complete(&alarm->done);
	return HRTIMER_NORESTART;
}

struct hv_alarm *hv_sys_alarm_new(void);
struct hv_alarm *hv_sys_alarm_new(void)
{
	struct hv_alarm *alarm = kzalloc(sizeof(*alarm), GFP_KERNEL_ACCOUNT);

	if (alarm) {
		hrtimer_setup(&alarm->timer, alarm_fires, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
		init_completion(&alarm->done);
	}
	return alarm;
}

void hv_sys_alarm_free(struct hv_alarm *alarm);
void hv_sys_alarm_free(struct hv_alarm *alarm)
{
	hrtimer_cancel(&alarm->timer);
	kfree(alarm);
}

void hv_sys_alarm_set(struct hv_alarm *alarm, u64 nanoseconds);
void hv_sys_alarm_set(struct hv_alarm *alarm, u64 nanoseconds)
{
	WRITE_ONCE(alarm->fired, false);
	hrtimer_start(&alarm->timer, ns_to_ktime(nanoseconds), HRTIMER_MODE_REL_PINNED_HARD);
}

bool hv_sys_alarm_fired(struct hv_alarm *alarm);
bool hv_sys_alarm_fired(struct hv_alarm *alarm)
{
	return READ_ONCE(alarm->fired);
}

void hv_sys_alarm_reset(struct hv_alarm *alarm);
void hv_sys_alarm_reset(struct hv_alarm *alarm)
{
	reinit_completion(&alarm->done);
}

void hv_sys_alarm_wake(struct hv_alarm *alarm);
void hv_sys_alarm_wake(struct hv_alarm *alarm)
{
	complete(&alarm->done);
}

int hv_sys_alarm_wait(struct hv_alarm *alarm);
int hv_sys_alarm_wait(struct hv_alarm *alarm)
{
	return wait_for_completion_interruptible(&alarm->done);
}

/* Event file descriptors: those we signal, and those that signal us. */
struct eventfd_ctx *hv_sys_eventfd_get(int fd);
struct eventfd_ctx *hv_sys_eventfd_get(int fd)
{
	return eventfd_ctx_fdget(fd);
}

void hv_sys_eventfd_put(struct eventfd_ctx *event);
void hv_sys_eventfd_put(struct eventfd_ctx *event)
{
	eventfd_ctx_put(event);
}

void hv_sys_eventfd_signal(struct eventfd_ctx *event);
void hv_sys_eventfd_signal(struct eventfd_ctx *event)
{
	eventfd_signal(event);
}

/* Entry point of root/interrupt.rs, called with interrupts off. */
void hv_root_irqfd_signalled(void *irqfd);

struct hv_irqfd {
	wait_queue_entry_t wait;
	poll_table table;
	struct eventfd_ctx *event;
	void *owner;
	bool closed;
};

static int irqfd_wake(wait_queue_entry_t *wait, unsigned int mode, int sync, void *key)
{
	struct hv_irqfd *irqfd = container_of(wait, struct hv_irqfd, wait);
	__poll_t events = key_to_poll(key);
	u64 count;

	if (events & EPOLLHUP)
		WRITE_ONCE(irqfd->closed, true);
	if (!(events & EPOLLIN))
		return 0;
	eventfd_ctx_do_read(irqfd->event, &count);
	hv_root_irqfd_signalled(irqfd->owner);
	return 1;
}

static void irqfd_queue(struct file *file, wait_queue_head_t *head, poll_table *table)
{
	struct hv_irqfd *irqfd = container_of(table, struct hv_irqfd, table);

	irqfd->wait.flags |= WQ_FLAG_EXCLUSIVE;
	add_wait_queue_priority(head, &irqfd->wait);
}

/* Takes over the reference to the event only on success. 1 if the event was signalled already. */
struct hv_irqfd *hv_sys_irqfd_new(int fd, struct eventfd_ctx *event, void *owner, int *signalled);
struct hv_irqfd *hv_sys_irqfd_new(int fd, struct eventfd_ctx *event, void *owner, int *signalled)
{
	struct hv_irqfd *irqfd = kzalloc(sizeof(*irqfd), GFP_KERNEL_ACCOUNT);
	struct eventfd_ctx *same;
	struct file *file;

	if (!irqfd)
		return ERR_PTR(-ENOMEM);
	file = eventfd_fget(fd);
	if (IS_ERR(file)) {
		kfree(irqfd);
		return ERR_CAST(file);
	}
	/* The descriptor may name another file by now. */
	same = eventfd_ctx_fileget(file);
	if (IS_ERR(same) || same != event) {
		if (!IS_ERR(same))
			eventfd_ctx_put(same);
		fput(file);
		kfree(irqfd);
		return ERR_PTR(-EBADF);
	}
	eventfd_ctx_put(same);
	irqfd->event = event;
	irqfd->owner = owner;
	init_waitqueue_func_entry(&irqfd->wait, irqfd_wake);
	init_poll_funcptr(&irqfd->table, irqfd_queue);
	*signalled = !!(vfs_poll(file, &irqfd->table) & EPOLLIN);
	fput(file);
	return irqfd;
}

/* Afterwards no call of the owner runs or comes. */
void hv_sys_irqfd_free(struct hv_irqfd *irqfd);
void hv_sys_irqfd_free(struct hv_irqfd *irqfd)
{
	u64 count;

	eventfd_ctx_remove_wait_queue(irqfd->event, &irqfd->wait, &count);
	eventfd_ctx_put(irqfd->event);
	kfree(irqfd);
}

bool hv_sys_irqfd_closed(const struct hv_irqfd *irqfd);
bool hv_sys_irqfd_closed(const struct hv_irqfd *irqfd)
{
	return READ_ONCE(irqfd->closed);
}

/* ---- for other modules: api.rs ---- */

EXPORT_SYMBOL_GPL(hv_port_connect);
EXPORT_SYMBOL_GPL(hv_port_disconnect);
EXPORT_SYMBOL_GPL(hv_port_post_message);
EXPORT_SYMBOL_GPL(hv_port_signal_event);
