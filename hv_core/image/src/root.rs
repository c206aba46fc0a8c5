// SPDX-License-Identifier: GPL-2.0
//! Exits of the root partition.
//!
//! Linux keeps its interrupts, MSRs, ports and time-stamp counter; what is left are the exits that
//! hardware forces, the few registers whose true value would betray the launch, and hypercalls.

use hv_abi::hypercall::{code, fault, private, result, Control};
use hv_abi::stats::StatsPage;
use hv_abi::status::HvStatus;
use hv_x86::regs::{cpuid, cr4};

use crate::arch::{gpr, Exception, Exit, Processor, Work};
use crate::log;

/// Facts about this CPU that exits of the root need.
#[derive(Clone, Copy)]
pub struct RootCpu<'a> {
    /// Linux' number of the CPU.
    pub cpu: u32,
    /// Whether the fault test call is allowed.
    pub allow_fault: bool,
    /// Statistics of this CPU.
    pub stats: &'a StatsPage,
}

/// Handles one exit of the root; on return the root is resumed.
#[inline]
pub fn handle_exit(p: &mut impl Processor, on: RootCpu<'_>) {
    let exit = p.exit();
    count(on.stats, exit);
    match exit {
        Exit::Hypercall => hypercall(p, on),
        Exit::Cpuid => emulate_cpuid(p, on),
        Exit::MsrRead => read_msr(p),
        Exit::MsrWrite => write_msr(p),
        Exit::Xsetbv => xsetbv(p),
        Exit::ControlRegisterWrite { register, source } => control_register(p, register, source),
        Exit::SecondLevelFault {
            gpa,
            write,
            execute,
        } => sealed_access(p, on, gpa, write, execute),
        Exit::VirtualizationInstruction => p.raise(Exception::InvalidOpcode),
        Exit::Invd => {
            p.wbinvd();
            p.skip();
        }
        Exit::Init => p.wait_for_sipi(),
        Exit::Sipi(vector) => p.start(vector),
        Exit::TripleFault => {
            log!(
                "cpu {}: triple fault in the root, resetting the machine",
                on.cpu
            );
            p.reset()
        }
        Exit::EntryFailure | Exit::Unknown => give_back(p, on),
    }
}

/// Handles the exit of a kernel that dispatches a VP by a fast call.
#[inline]
pub fn handle_dispatch(p: &mut impl Processor, on: RootCpu<'_>) {
    count(on.stats, Exit::Hypercall);
    p.skip();
    dispatch(p);
}

#[inline]
fn count(stats: &StatsPage, exit: Exit) {
    use core::sync::atomic::Ordering::Relaxed;
    if let Some(counter) = stats.root_exits.get(exit.kind() as usize) {
        // This CPU is the only writer: no locked addition needed.
        counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
    }
}

fn set_result(p: &mut impl Processor, value: u64) {
    p.context().gprs[gpr::RAX] = value;
}

/// Hypercalls are for CPL 0 (TLFS 3.3); the instruction does not exist for anyone else.
fn hypercall(p: &mut impl Processor, on: RootCpu<'_>) {
    if p.cpl() != 0 {
        return p.raise(Exception::InvalidOpcode);
    }
    let control = Control(p.context().gprs[gpr::RCX]);
    match control.code() {
        // First, because it is frequent.
        code::DISPATCH_VP if control.is_fast() => {
            p.skip();
            return dispatch(p);
        }
        // It is no longer paused.
        private::RESUME_VP if control.is_fast() => {
            p.skip();
            return dispatch(p);
        }
        private::FAULT if on.allow_fault => {
            // Before the skip: the fault gives the CPU back where the instruction is undefined, as after any fault.
            let how = p.context().gprs[gpr::RDX];
            p.fault(how);
        }
        _ => {}
    }
    p.skip();
    let status = match control.code() {
        private::PROVE => {
            p.context().gprs[gpr::RDX] = on.cpu.into();
            p.proved();
            HvStatus::SUCCESS
        }
        private::LEAVE => {
            set_result(p, result(HvStatus::SUCCESS, 0));
            p.leave()
        }
        private::FLUSH => {
            p.flush_second_level();
            HvStatus::SUCCESS
        }
        private::FAULT if on.allow_fault => HvStatus::INVALID_PARAMETER,
        // The state of a VP is never tied to a CPU between dispatches.
        private::DETACH_VP => HvStatus::SUCCESS,
        private::SHOW_REGISTERS if control.is_fast() => on_stopped_vp(p, |_| Work::Show),
        private::FAIL_CALL if control.is_fast() => {
            on_stopped_vp(p, |second| Work::Fail(HvStatus((second >> 32) as u16)))
        }
        _ if control.is_fast() => HvStatus::INVALID_HYPERCALL_CODE,
        _ => {
            let gprs = &p.context().gprs;
            let (input, output) = (gprs[gpr::RDX], gprs[gpr::R8]);
            let value = p.call(control, input, output);
            return set_result(p, value);
        }
    };
    set_result(p, result(status, 0));
}

/// Calls about a VP that nobody runs: partition in RDX, VP and what `work` makes of it in R8.
fn on_stopped_vp(p: &mut impl Processor, work: impl FnOnce(u64) -> Work) -> HvStatus {
    let gprs = &p.context().gprs;
    let (partition, second) = (gprs[gpr::RDX], gprs[gpr::R8]);
    match p.on_stopped_vp(partition, second as u32, work(second)) {
        Ok(()) => HvStatus::SUCCESS,
        Err(status) => status,
    }
}

/// HvCallDispatchVp.
fn dispatch(p: &mut impl Processor) {
    let gprs = &p.context().gprs;
    let (partition, vp) = (gprs[gpr::RDX], gprs[gpr::R8]);
    let status = match p.dispatch(partition, vp) {
        // The child runs next; its end sets the result.
        Ok(None) => return,
        Ok(Some(event)) => {
            p.context().gprs[gpr::RDX] = event as u64;
            HvStatus::SUCCESS
        }
        Err(status) => {
            // No event.
            p.context().gprs[gpr::RDX] = 0;
            status
        }
    };
    set_result(p, result(status, 0));
}

/// CPUID: the processor's answer, without the virtualization extension, with the bits that mirror CR4
/// taken from the root's CR4 (the image has its own), and with the TLFS leaves.
fn emulate_cpuid(p: &mut impl Processor, on: RootCpu<'_>) {
    let gprs = &p.context().gprs;
    let (leaf, subleaf) = (gprs[gpr::RAX] as u32, gprs[gpr::RCX] as u32);
    let answer = match leaf {
        fault::LEAF if on.allow_fault => {
            p.fault(subleaf.into());
            [0; 4]
        }
        0x4000_0000..=0x4000_00ff => hypervisor_leaf(leaf),
        _ => {
            let [a, b, mut c, d] = p.cpuid(leaf, subleaf);
            match leaf {
                1 => {
                    c &= !(cpuid::L1_ECX_VMX | cpuid::L1_ECX_OSXSAVE);
                    c |= cpuid::L1_ECX_HYPERVISOR;
                    if p.cr4() & cr4::OSXSAVE != 0 {
                        c |= cpuid::L1_ECX_OSXSAVE;
                    }
                    [a, b, c, d]
                }
                7 if subleaf == 0 => {
                    c &= !cpuid::L7_ECX_OSPKE;
                    if p.cr4() & cr4::PKE != 0 {
                        c |= cpuid::L7_ECX_OSPKE;
                    }
                    [a, b, c, d]
                }
                0x8000_0001 => [a, b, c & !cpuid::E1_ECX_SVM, d],
                0x8000_000a => [0; 4],
                _ => [a, b, c, d],
            }
        }
    };
    let gprs = &mut p.context().gprs;
    for (register, value) in [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX]
        .into_iter()
        .zip(answer)
    {
        gprs[register] = value.into();
    }
    p.skip();
}

/// EBX of leaf 0x40000003: CreatePartitions, AccessMemoryPool and CpuManagement, by which software tells a root from a guest.
const ROOT_PRIVILEGES: u32 = 1 << 0 | 1 << 2 | 1 << 12;

/// The TLFS leaves (TLFS 2.4): a root's privileges. No enlightenment is offered to it: their bits stay off.
fn hypervisor_leaf(leaf: u32) -> [u32; 4] {
    match leaf {
        0x4000_0000 => {
            let [b, c, d] = [*b"Micr", *b"osof", *b"t Hv"].map(u32::from_le_bytes);
            [0x4000_0006, b, c, d]
        }
        0x4000_0001 => [u32::from_le_bytes(*b"Hv#1"), 0, 0, 0],
        0x4000_0003 => [0, ROOT_PRIVILEGES, 0, 0],
        _ => [0; 4],
    }
}

fn read_msr(p: &mut impl Processor) {
    let number = p.context().gprs[gpr::RCX] as u32;
    match p.read_msr(number) {
        Some(value) => {
            let gprs = &mut p.context().gprs;
            gprs[gpr::RAX] = value & 0xffff_ffff;
            gprs[gpr::RDX] = value >> 32;
            p.skip();
        }
        None => p.raise(Exception::GeneralProtection),
    }
}

fn write_msr(p: &mut impl Processor) {
    let gprs = &p.context().gprs;
    let number = gprs[gpr::RCX] as u32;
    let value = (gprs[gpr::RDX] << 32) | gprs[gpr::RAX] & 0xffff_ffff;
    match p.write_msr(number, value) {
        Some(()) => p.skip(),
        None => p.raise(Exception::GeneralProtection),
    }
}

fn xsetbv(p: &mut impl Processor) {
    let gprs = &p.context().gprs;
    let index = gprs[gpr::RCX] as u32;
    let value = (gprs[gpr::RDX] << 32) | gprs[gpr::RAX] & 0xffff_ffff;
    let supported = p.supported_xcr0();
    if index != 0 || p.cpl() != 0 || p.cr4() & cr4::OSXSAVE == 0 || !valid_xcr0(value, supported) {
        return p.raise(Exception::GeneralProtection);
    }
    p.xsetbv(value);
    p.skip();
}

/// The rules of XSETBV for XCR0 (SDM 13.3): unsupported bits, x87 always on, AVX needs SSE, and states
/// that go together.
pub fn valid_xcr0(value: u64, supported: u64) -> bool {
    const X87: u64 = 1;
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    const MPX: u64 = 3 << 3;
    const AVX512: u64 = 7 << 5;
    const AMX: u64 = 3 << 17;
    let all_or_none = |mask: u64| value & mask == 0 || value & mask == mask;
    value & !supported == 0
        && value & X87 != 0
        && (value & AVX == 0 || value & SSE != 0)
        && all_or_none(MPX)
        && all_or_none(AVX512)
        && (value & AVX512 == 0 || value & AVX != 0)
        && all_or_none(AMX)
}

fn control_register(p: &mut impl Processor, register: u8, source: u8) {
    let value = match usize::from(source) {
        gpr::RSP => p.rsp(),
        n => p.context().gprs.get(n).copied().unwrap_or(0),
    };
    if p.write_control_register(register, value) {
        p.skip();
    } else {
        p.raise(Exception::GeneralProtection);
    }
}

/// A write or jump to a page that belongs to the image (reads find the zero page), or an access beyond
/// the physical address width.
fn sealed_access(p: &mut impl Processor, on: RootCpu<'_>, gpa: u64, write: bool, execute: bool) {
    use core::sync::atomic::Ordering::Relaxed;
    let before = on.stats.sealed_accesses.fetch_add(1, Relaxed);
    if before < 16 {
        let what = match (write, execute) {
            (true, _) => "write",
            (_, true) => "jump",
            _ => "read",
        };
        let (rip, cpl) = (p.rip(), p.cpl());
        log!(
            "cpu {}: {what} to sealed page {gpa:#x} refused, RIP {rip:#x} CPL {cpl}",
            on.cpu
        );
    }
    p.raise(Exception::GeneralProtection);
}

/// An exit that should not exist. The CPU goes back to native operation, where the same instruction does what
/// it does there.
fn give_back(p: &mut impl Processor, on: RootCpu<'_>) {
    let (rip, cpl) = (p.rip(), p.cpl());
    log!(
        "cpu {}: unexpected exit of the root, RIP {rip:#x} CPL {cpl}",
        on.cpu
    );
    on.stats
        .faults
        .fetch_add(1, core::sync::atomic::Ordering::Release);
    p.leave();
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_abi::boot::VpContext;
    use std::panic::{catch_unwind, AssertUnwindSafe};

    #[derive(Default)]
    struct Mock {
        context: VpContext,
        exit: Option<Exit>,
        cpl: u8,
        cr4: u64,
        leaf: [u32; 4],
        skipped: bool,
        raised: Option<Exception>,
        xcr0: Option<u64>,
        refuse_control: bool,
        left: bool,
    }

    impl Processor for Mock {
        fn exit(&mut self) -> Exit {
            self.exit.expect("test sets an exit")
        }
        fn context(&mut self) -> &mut VpContext {
            &mut self.context
        }
        fn cpl(&self) -> u8 {
            self.cpl
        }
        fn cr4(&self) -> u64 {
            self.cr4
        }
        fn rip(&self) -> u64 {
            0x1000
        }
        fn rsp(&self) -> u64 {
            0x2000
        }
        fn skip(&mut self) {
            self.skipped = true;
        }
        fn raise(&mut self, exception: Exception) {
            self.raised = Some(exception);
        }
        fn write_control_register(&mut self, _: u8, value: u64) -> bool {
            self.xcr0 = Some(value);
            !self.refuse_control
        }
        fn read_msr(&mut self, msr: u32) -> Option<u64> {
            (msr == 7).then_some(0x1_0000_0002)
        }
        fn write_msr(&mut self, msr: u32, value: u64) -> Option<()> {
            (msr == 7 && value == 0x1_0000_0002).then_some(())
        }
        fn flush_second_level(&mut self) {}
        fn wait_for_sipi(&mut self) {}
        fn start(&mut self, _: u8) {}
        fn cpuid(&mut self, _: u32, _: u32) -> [u32; 4] {
            self.leaf
        }
        fn xsetbv(&mut self, value: u64) {
            self.xcr0 = Some(value);
        }
        fn wbinvd(&mut self) {}
        fn reset(&mut self) -> ! {
            panic!("reset")
        }
        fn call(&mut self, _: Control, _: u64, _: u64) -> u64 {
            result(HvStatus::INVALID_HYPERCALL_CODE, 0)
        }
        fn dispatch(
            &mut self,
            _: u64,
            _: u64,
        ) -> Result<Option<hv_abi::hypercall::DispatchEvent>, HvStatus> {
            Err(HvStatus::INVALID_PARTITION_ID)
        }
        fn on_stopped_vp(&mut self, _: u64, _: u32, _: Work) -> Result<(), HvStatus> {
            Err(HvStatus::INVALID_PARTITION_ID)
        }
        fn fault(&mut self, _: u64) {}
        fn leave(&mut self) -> ! {
            self.left = true;
            panic!("leave")
        }
    }

    fn run(mock: &mut Mock, exit: Exit) {
        // SAFETY: all-zero is a valid page of counters.
        let stats: Box<StatsPage> = unsafe { Box::new(core::mem::zeroed()) };
        mock.exit = Some(exit);
        let on = RootCpu {
            cpu: 3,
            allow_fault: false,
            stats: &stats,
        };
        let _ = catch_unwind(AssertUnwindSafe(|| handle_exit(mock, on)));
    }

    fn call(code: u16) -> Mock {
        let mut m = Mock::default();
        m.context.gprs[gpr::RCX] = Control::simple(code, true).0;
        run(&mut m, Exit::Hypercall);
        m
    }

    #[test]
    fn prove_returns_the_cpu() {
        let m = call(private::PROVE);
        assert_eq!(
            (
                m.context.gprs[gpr::RAX],
                m.context.gprs[gpr::RDX],
                m.skipped
            ),
            (0, 3, true)
        );
    }

    #[test]
    fn unknown_hypercall_is_refused_with_its_status() {
        assert_eq!(call(0xdead).context.gprs[gpr::RAX], 2);
        assert_eq!(call(private::FAULT).context.gprs[gpr::RAX], 2);
    }

    #[test]
    fn leave_moves_past_the_hypercall_first() {
        let m = call(private::LEAVE);
        assert!(m.left && m.skipped);
        assert_eq!(m.context.gprs[gpr::RAX], 0);
    }

    #[test]
    fn hypercall_of_a_user_program_is_an_invalid_opcode() {
        let mut m = Mock {
            cpl: 3,
            ..Default::default()
        };
        m.context.gprs[gpr::RCX] = private::LEAVE.into();
        run(&mut m, Exit::Hypercall);
        assert_eq!(
            (m.raised, m.left, m.skipped),
            (Some(Exception::InvalidOpcode), false, false)
        );
    }

    #[test]
    fn cpuid_hides_the_extension_and_mirrors_cr4() {
        let mut m = Mock {
            leaf: [1, 2, !0, 4],
            ..Default::default()
        };
        m.context.gprs[gpr::RAX] = 1;
        run(&mut m, Exit::Cpuid);
        let c = m.context.gprs[gpr::RCX] as u32;
        assert_eq!(c, !(cpuid::L1_ECX_VMX | cpuid::L1_ECX_OSXSAVE));

        let mut m = Mock {
            cr4: cr4::OSXSAVE | cr4::PKE,
            ..Default::default()
        };
        m.context.gprs[gpr::RAX] = 1;
        run(&mut m, Exit::Cpuid);
        assert_eq!(
            m.context.gprs[gpr::RCX] as u32,
            cpuid::L1_ECX_HYPERVISOR | cpuid::L1_ECX_OSXSAVE
        );
        m.context.gprs[gpr::RAX] = 7;
        m.context.gprs[gpr::RCX] = 0;
        run(&mut m, Exit::Cpuid);
        assert_eq!(m.context.gprs[gpr::RCX] as u32, cpuid::L7_ECX_OSPKE);
    }

    #[test]
    fn cpuid_names_the_hypervisor() {
        let mut m = Mock::default();
        m.context.gprs[gpr::RAX] = 0x4000_0000;
        run(&mut m, Exit::Cpuid);
        let name: Vec<u8> = [gpr::RBX, gpr::RCX, gpr::RDX]
            .iter()
            .flat_map(|r| (m.context.gprs[*r] as u32).to_le_bytes())
            .collect();
        assert_eq!(name, b"Microsoft Hv");
    }

    #[test]
    fn msr_values_are_split_over_two_registers() {
        let mut m = Mock::default();
        m.context.gprs[gpr::RCX] = 7;
        run(&mut m, Exit::MsrRead);
        assert_eq!((m.context.gprs[gpr::RAX], m.context.gprs[gpr::RDX]), (2, 1));
        m.skipped = false;
        run(&mut m, Exit::MsrWrite);
        assert!(m.skipped);
        m.context.gprs[gpr::RCX] = 8;
        run(&mut m, Exit::MsrRead);
        assert_eq!(m.raised, Some(Exception::GeneralProtection));
    }

    #[test]
    fn xcr0_rules_follow_the_manual() {
        let all = 0x602e7;
        assert!(valid_xcr0(1, all) && valid_xcr0(7, all) && valid_xcr0(0xe7, all));
        for bad in [0, 2, 5, 0x27, 0xe3, 0x107, 0x2_0007, (1 << 63) | 1] {
            assert!(!valid_xcr0(bad, all), "{bad:#x}");
        }
        assert!(!valid_xcr0(0x1f, all), "MPX is not supported here");
    }

    #[test]
    fn bad_xsetbv_raises_and_never_executes() {
        let mut m = Mock {
            leaf: [7, 0, 0, 0],
            cr4: cr4::OSXSAVE,
            ..Default::default()
        };
        m.context.gprs[gpr::RAX] = 4;
        run(&mut m, Exit::Xsetbv);
        assert_eq!(
            (m.raised, m.xcr0),
            (Some(Exception::GeneralProtection), None)
        );
    }

    #[test]
    fn control_register_write_takes_rsp_from_the_processor() {
        let mut m = Mock::default();
        run(
            &mut m,
            Exit::ControlRegisterWrite {
                register: 4,
                source: 4,
            },
        );
        assert_eq!((m.xcr0, m.skipped), (Some(0x2000), true));
        let mut m = Mock {
            refuse_control: true,
            ..Default::default()
        };
        run(
            &mut m,
            Exit::ControlRegisterWrite {
                register: 4,
                source: 0,
            },
        );
        assert_eq!(
            (m.raised, m.skipped),
            (Some(Exception::GeneralProtection), false)
        );
    }

    #[test]
    fn unexpected_exit_leaves() {
        let mut m = Mock::default();
        run(&mut m, Exit::Unknown);
        assert_eq!((m.left, m.raised), (true, None));
    }

    #[test]
    fn write_to_a_sealed_page_is_a_fault_not_the_end() {
        let mut m = Mock::default();
        run(
            &mut m,
            Exit::SecondLevelFault {
                gpa: 0x1000,
                write: true,
                execute: false,
            },
        );
        assert_eq!(
            (m.raised, m.left),
            (Some(Exception::GeneralProtection), false)
        );
    }
}
