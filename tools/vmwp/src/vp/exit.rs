// SPDX-License-Identifier: GPL-2.0
//! One exit: which device answers it, and what becomes of the VP.

use super::message::Intercept;
use super::reg::Reg;
use super::stats::Kind;
use super::{emulate, port, GuestRam, Vp, VpResult};
use crate::device::{Machine, PowerEvent};
use std::io::Write;

/// What to do with the VP next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Run it again.
    Continue,
    /// It has nothing to do until an interrupt comes.
    Idle,
    /// The guest ended the machine.
    Power(PowerEvent),
    /// Triple fault; the text says where.
    TripleFault(String),
}

/// The kind under which an intercept is counted.
#[inline]
pub fn kind(intercept: &Intercept) -> Kind {
    match intercept {
        Intercept::Port(_) => Kind::Port,
        Intercept::Memory(_) => Kind::Memory,
        Intercept::ApicEoi { .. } => Kind::ApicEoi,
        Intercept::Halt(_) => Kind::Halt,
        _ => Kind::Other,
    }
}

/// Completes an exit. An error ends the partition.
pub fn complete<W: Write>(
    vp: &mut dyn Vp,
    ram: &dyn GuestRam,
    machine: &Machine<W>,
    intercept: &Intercept,
) -> VpResult<Step> {
    match intercept {
        Intercept::Port(i) => {
            let event = port::complete(vp, ram, &machine.ports, i)?;
            Ok(event.map_or(Step::Continue, Step::Power))
        }
        Intercept::Memory(i) => emulate::complete(vp, ram, &machine.mmio, i).map(|()| Step::Continue),
        Intercept::ApicEoi { vector } => {
            machine.mmio.eoi(*vector as u8);
            Ok(Step::Continue)
        }
        Intercept::Halt(_) => Ok(Step::Idle),
        Intercept::UnrecoverableException(_) => Ok(Step::TripleFault(format!("at {}", control_state(vp)))),
        Intercept::InvalidVpRegister => {
            Err(format!("the VP cannot be entered with its registers: {}", control_state(vp)))
        }
        Intercept::UnsupportedFeature { code, parameter } => Err(format!(
            "the guest used something that the hypervisor does not support: {} (detail {parameter:#x})",
            match code {
                1 => "an intercept".to_owned(),
                2 => "a task switch".to_owned(),
                other => format!("feature {other}"),
            }
        )),
        Intercept::Other(kind) => Err(format!("an intercept that was never asked for, type {kind:#x}")),
        Intercept::Malformed(kind) => Err(format!("a message that cannot be read, type {kind:#x}")),
    }
}

/// Where a VP is, and what it last faulted on.
fn control_state(vp: &mut dyn Vp) -> String {
    const SHOWN: [(&str, Reg); 8] = [
        ("RIP", Reg::RIP),
        ("RSP", Reg::RSP),
        ("RFLAGS", Reg::RFLAGS),
        ("CR0", Reg::CR0),
        ("CR2", Reg::CR2),
        ("CR3", Reg::CR3),
        ("CR4", Reg::CR4),
        ("EFER", Reg::EFER),
    ];
    let shown: Vec<_> = SHOWN
        .iter()
        .map(|(name, reg)| match vp.get(&[*reg]) {
            Ok(v) => format!("{name} {:#x}", v[0]),
            Err(_) => format!("{name} ?"),
        })
        .collect();
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::fake::{machine, FakeRam, FakeVp};
    use super::super::message::tests::message;
    use super::super::message::Header;
    use super::*;
    use crate::layout::{IOAPIC, UART_PORT};

    fn done(intercept: Intercept) -> VpResult<Step> {
        complete(
            &mut FakeVp::default(),
            &FakeRam::default(),
            &machine(),
            &intercept,
        )
    }

    #[test]
    fn a_triple_fault_says_where() {
        let mut vp = FakeVp::default();
        vp.values.insert(Reg::RIP.0, 0x1234);
        vp.values.insert(Reg::CR2.0, 0xbad);
        let step = complete(
            &mut vp,
            &FakeRam::default(),
            &machine(),
            &Intercept::UnrecoverableException(Header::default()),
        );
        let Ok(Step::TripleFault(place)) = step else {
            panic!("{step:?}")
        };
        assert!(place.starts_with("at RIP 0x1234, "), "{place}");
        assert!(place.contains("CR2 0xbad"), "{place}");
    }

    #[test]
    fn refusals_of_the_hypervisor_become_sentences() {
        let e = done(Intercept::InvalidVpRegister).unwrap_err();
        assert!(e.contains("RIP 0x0") && e.contains("EFER"), "{e}");
        let e = done(Intercept::UnsupportedFeature {
            code: 2,
            parameter: 0x18,
        })
        .unwrap_err();
        assert!(e.contains("task switch") && e.contains("0x18"), "{e}");
        assert!(done(Intercept::Other(0x8001_0001))
            .unwrap_err()
            .contains("0x80010001"));
        assert!(done(Intercept::Malformed(1)).is_err());
    }

    #[test]
    fn a_halt_idles() {
        assert_eq!(done(Intercept::Halt(Header::default())), Ok(Step::Idle));
    }

    #[test]
    fn an_eoi_reaches_the_ioapic() {
        const REMOTE_IRR: u64 = 1 << 14;
        let m = machine();
        // The UART's pin as level with vector 0x31; input with interrupts on then drives the line.
        m.mmio.write(IOAPIC, 4, 0x18);
        m.mmio.write(IOAPIC + 0x10, 4, 0x8031);
        m.ports.write(UART_PORT + 1, 1, 1);
        m.ports.console_input(b"x");
        assert_ne!(m.mmio.read(IOAPIC + 0x10, 4) & REMOTE_IRR, 0);
        let eoi = Intercept::parse(&message(0x8001_0004, &[(4, &[0x31])]));
        let step = complete(&mut FakeVp::default(), &FakeRam::default(), &m, &eoi);
        assert_eq!(step, Ok(Step::Continue));
        assert_eq!(m.mmio.read(IOAPIC + 0x10, 4) & REMOTE_IRR, 0);
    }

    #[test]
    fn exits_are_counted_by_what_they_are() {
        assert_eq!(kind(&Intercept::ApicEoi { vector: 1 }), Kind::ApicEoi);
        assert_eq!(kind(&Intercept::Halt(Header::default())), Kind::Halt);
        assert_eq!(kind(&Intercept::InvalidVpRegister), Kind::Other);
    }
}
