// SPDX-License-Identifier: GPL-2.0
//! A VP without a hypervisor: registers in a map, memory in an array, exits from a list.

use super::message::{Access, Header, Intercept, PortIntercept};
use super::reg::{Reg, RegValue, Segment};
use super::{GuestRam, Run, Vp, VpResult};
use crate::device::tests::Recorder;
use crate::device::Machine;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

/// A machine whose interrupts go nowhere and whose console is a vector.
pub(crate) fn machine() -> Machine<Vec<u8>> {
    Machine::new(Arc::new(Recorder::default()), Vec::new())
}

/// The exit of `out PORT, al` at 0x1000 in 64-bit mode.
pub(crate) fn out(port: u16, value: u64) -> VpResult<Run> {
    let header = Header {
        access: Access::Write,
        bitness: 64,
        instruction_length: 1,
        rip: 0x1000,
        ..Default::default()
    };
    Ok(Run::Intercept(Intercept::Port(PortIntercept {
        header,
        port,
        size: 1,
        rax: value,
        ..Default::default()
    })))
}

/// The VP. Guest-virtual addresses equal guest-physical ones.
#[derive(Default)]
pub(crate) struct FakeVp {
    pub values: BTreeMap<u32, u64>,
    pub segments: BTreeMap<u32, Segment>,
    /// Calls of `set`.
    pub sets: usize,
    /// A page that is not mapped.
    pub unmapped: Option<u64>,
    /// What `run` returns.
    pub runs: VecDeque<VpResult<Run>>,
    /// After that: return without a message for ever, or else fail.
    pub idle: bool,
    /// Or panic.
    pub panics: bool,
}

impl FakeVp {
    pub(crate) fn reg(&self, reg: Reg) -> u64 {
        self.values.get(&reg.0).copied().unwrap_or_default()
    }

    pub(crate) fn has(&self, reg: Reg) -> bool {
        self.values.contains_key(&reg.0)
    }
}

impl Vp for FakeVp {
    fn run(&mut self) -> VpResult<Run> {
        assert!(!self.panics, "a panic that a test asked for");
        let idle = self.idle;
        self.runs.pop_front().unwrap_or_else(|| match idle {
            true => {
                std::thread::sleep(std::time::Duration::from_millis(1));
                Ok(Run::Interrupted)
            }
            false => Err("no more runs".into()),
        })
    }

    fn get(&mut self, names: &[Reg]) -> VpResult<Vec<u64>> {
        Ok(names.iter().map(|r| self.reg(*r)).collect())
    }

    fn set(&mut self, values: &[(Reg, RegValue)]) -> VpResult<()> {
        self.sets += 1;
        for (reg, value) in values {
            self.values.insert(reg.0, value.word());
        }
        Ok(())
    }

    fn segment(&mut self, name: Reg) -> VpResult<Segment> {
        Ok(self.segments.get(&name.0).copied().unwrap_or_default())
    }

    fn translate(&mut self, gva: u64, _write: bool) -> VpResult<Option<u64>> {
        Ok((self.unmapped != Some(gva & !0xfff)).then_some(gva))
    }
}

/// 64 KiB of guest memory.
pub(crate) struct FakeRam(Mutex<Vec<u8>>);

impl Default for FakeRam {
    fn default() -> Self {
        FakeRam(Mutex::new(vec![0; 64 * 1024]))
    }
}

impl FakeRam {
    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        assert!(GuestRam::write(self, at, bytes));
    }

    pub(crate) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(GuestRam::read(self, at, &mut out));
        out
    }
}

impl GuestRam for FakeRam {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> bool {
        let ram = self.0.lock().unwrap();
        match ram.get(gpa as usize..).and_then(|r| r.get(..buf.len())) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> bool {
        let mut ram = self.0.lock().unwrap();
        match ram
            .get_mut(gpa as usize..)
            .and_then(|r| r.get_mut(..buf.len()))
        {
            Some(bytes) => {
                bytes.copy_from_slice(buf);
                true
            }
            None => false,
        }
    }
}
