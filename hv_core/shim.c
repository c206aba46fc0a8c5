// SPDX-License-Identifier: GPL-2.0
/*
 * What the module needs from the kernel that only C can reach: macros, inline functions, per-CPU variables and
 * callback structures. No logic lives here; every function is one call, declared in sys.rs.
 */
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/debugfs.h>
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/namei.h>
#include <linux/reboot.h>
#include <linux/seq_file.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <linux/suspend.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <asm/apic.h>
#include <asm/cpufeature.h>
#include <asm/io.h>
#include <asm/msr.h>
#include <asm/processor.h>

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

u32 hv_sys_physical_bits(void);
u32 hv_sys_physical_bits(void)
{
	return boot_cpu_data.x86_phys_bits;
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
