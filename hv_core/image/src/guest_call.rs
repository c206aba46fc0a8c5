// SPDX-License-Identifier: GPL-2.0
//! Hypercalls of a guest to its own partition (TLFS 3.7, 7.8, 9.5, 10.5): what their parameters mean.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use hv_abi::hypercall::{Control, EventSignal};
use hv_abi::status::HvStatus;

use crate::child_cpuid::synthetic;
use crate::partition::MAX_VPS;

/// Call codes.
#[allow(missing_docs)] // The names are TLFS'.
pub mod code {
    pub const FLUSH_VIRTUAL_ADDRESS_SPACE: u16 = 0x2;
    pub const FLUSH_VIRTUAL_ADDRESS_LIST: u16 = 0x3;
    pub const NOTIFY_LONG_SPIN_WAIT: u16 = 0x8;
    pub const SEND_SYNTHETIC_CLUSTER_IPI: u16 = 0xb;
    pub const FLUSH_VIRTUAL_ADDRESS_SPACE_EX: u16 = 0x13;
    pub const FLUSH_VIRTUAL_ADDRESS_LIST_EX: u16 = 0x14;
    pub const SEND_SYNTHETIC_CLUSTER_IPI_EX: u16 = 0x15;
    pub const POST_MESSAGE: u16 = 0x5c;
    pub const SIGNAL_EVENT: u16 = 0x5d;
    pub const QUERY_CAPABILITIES: u16 = 0x8001;
}

/// Types of messages that only the hypervisor sends.
const HYPERVISORS: u32 = 1 << 31;

/// Flags of the flushes.
mod flush {
    pub const ALL_PROCESSORS: u64 = 1 << 0;
    /// All address spaces; only translations that are not global; ranges of large pages. What is flushed is more than any of them asks
    /// for.
    pub const OTHERS: u64 = 7 << 1;
}

/// Words of input that any call looks at: a message with its head (`HV_INPUT_POST_MESSAGE`).
pub const WORDS: usize = 2 + MAX_PAYLOAD / 8;
/// Bytes of payload of a message.
const MAX_PAYLOAD: usize = 240;
/// Words of input that the other calls look at: the longest head and the banks of a set that can name VPs.
const SHORT_WORDS: usize = 4 + BANKS;
/// Words of input of a fast call: RDX, R8, XMM0 to XMM5 (TLFS 3.7.2).
pub const FAST_WORDS: usize = 14;
/// Words of 64 VPs.
const BANKS: usize = MAX_VPS / 64;

/// A set of VPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VpSet([u64; BANKS]);

impl VpSet {
    /// None.
    pub const NONE: Self = Self([0; BANKS]);
    /// All that there can be.
    pub const ALL: Self = Self([u64::MAX; BANKS]);

    /// The first 64.
    const fn of_mask(mask: u64) -> Self {
        let mut set = [0; BANKS];
        let [first, ..] = &mut set;
        *first = mask;
        Self(set)
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::NONE
    }

    /// Whether VP `index` is in it.
    #[must_use]
    pub fn has(&self, index: u32) -> bool {
        let bank = self.0.get((index >> 6) as usize);
        bank.is_some_and(|bank| bank >> (index & 63) & 1 != 0)
    }

    /// Puts VP `index` in.
    pub fn add(&mut self, index: u32) {
        if let Some(bank) = self.0.get_mut((index >> 6) as usize) {
            *bank |= 1 << (index & 63);
        }
    }

    /// Takes VP `index` out.
    pub fn remove(&mut self, index: u32) {
        if let Some(bank) = self.0.get_mut((index >> 6) as usize) {
            *bank &= !(1 << (index & 63));
        }
    }
}

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing that has to be done: a lock is waited for.
    LongSpinWait,
    /// Make these VPs forget their translations.
    Flush(VpSet),
    /// Send an interrupt with this vector.
    Interrupt(u8, VpSet),
    /// Post the message that the input is.
    PostMessage,
    /// Write the extended capabilities to the output.
    Capabilities,
    /// Signal an event of a connection.
    SignalEvent(EventSignal),
}

/// Words of input that the call looks at, if the guest gave them.
#[must_use]
pub const fn input_words(control: Control) -> usize {
    match control.code() {
        code::NOTIFY_LONG_SPIN_WAIT | code::QUERY_CAPABILITIES => 0,
        code::SIGNAL_EVENT => 1,
        code::SEND_SYNTHETIC_CLUSTER_IPI => 2,
        code::POST_MESSAGE => WORDS,
        _ => SHORT_WORDS,
    }
}

/// How the parameters of a call are laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// A flush; with a list of addresses, and with a sparse set of VPs.
    Flush {
        list: bool,
        sparse: bool,
    },
    Interrupt {
        sparse: bool,
    },
    Message,
    Event,
    Capabilities,
    Nothing,
}

/// The parameters of a call with this control word. `input` has the words that the guest gave, in registers or in memory, as far as
/// it gave any, up to [`WORDS`]. `features` are the partition's.
///
/// # Errors
///
/// INVALID_HYPERCALL_CODE; ACCESS_DENIED if the partition was not given the call; INVALID_HYPERCALL_INPUT if the control word does
/// not fit the call or input is missing; INVALID_PARAMETER.
pub fn parse(control: Control, input: &[u64], features: u64) -> Result<Request, HvStatus> {
    use code::*;
    let (shape, needed) = match control.code() {
        FLUSH_VIRTUAL_ADDRESS_SPACE => (flush(false, false), synthetic::FLUSHES),
        FLUSH_VIRTUAL_ADDRESS_LIST => (flush(true, false), synthetic::FLUSHES),
        FLUSH_VIRTUAL_ADDRESS_SPACE_EX => (
            flush(false, true),
            synthetic::FLUSHES | synthetic::SPARSE_SETS,
        ),
        FLUSH_VIRTUAL_ADDRESS_LIST_EX => (
            flush(true, true),
            synthetic::FLUSHES | synthetic::SPARSE_SETS,
        ),
        SEND_SYNTHETIC_CLUSTER_IPI => (Shape::Interrupt { sparse: false }, synthetic::CLUSTER_IPI),
        SEND_SYNTHETIC_CLUSTER_IPI_EX => (
            Shape::Interrupt { sparse: true },
            synthetic::CLUSTER_IPI | synthetic::SPARSE_SETS,
        ),
        POST_MESSAGE => (Shape::Message, synthetic::SYNIC),
        SIGNAL_EVENT => (Shape::Event, synthetic::SIGNAL_EVENTS),
        QUERY_CAPABILITIES => (Shape::Capabilities, 0),
        NOTIFY_LONG_SPIN_WAIT => (Shape::Nothing, 0),
        _ => return Err(HvStatus::INVALID_HYPERCALL_CODE),
    };
    if features & needed != needed {
        return Err(HvStatus::ACCESS_DENIED);
    }
    let list = matches!(shape, Shape::Flush { list: true, .. });
    let reps_fit = if list {
        control.rep_start() < control.rep_count()
    } else {
        control.rep_start() == 0 && control.rep_count() == 0
    };
    let sparse = matches!(
        shape,
        Shape::Flush { sparse: true, .. } | Shape::Interrupt { sparse: true }
    );
    let header_fits = sparse || control.variable_words() == 0;
    if control.has_reserved() || !reps_fit || !header_fits {
        return Err(HvStatus::INVALID_HYPERCALL_INPUT);
    }
    let mut words = input.iter().copied();
    let mut next = || words.next().ok_or(HvStatus::INVALID_HYPERCALL_INPUT);
    match shape {
        Shape::Nothing => Ok(Request::LongSpinWait),
        // Its output does not go into registers.
        Shape::Capabilities if control.is_fast() => Err(HvStatus::INVALID_HYPERCALL_INPUT),
        Shape::Capabilities => Ok(Request::Capabilities),
        Shape::Flush { sparse, .. } => {
            let (_space, flags) = (next()?, next()?);
            if flags & !(flush::ALL_PROCESSORS | flush::OTHERS) != 0 {
                return Err(HvStatus::INVALID_PARAMETER);
            }
            let set = if sparse {
                sparse_set(control, next)?
            } else {
                VpSet::of_mask(next()?)
            };
            let all = flags & flush::ALL_PROCESSORS != 0;
            Ok(Request::Flush(if all { VpSet::ALL } else { set }))
        }
        Shape::Interrupt { sparse } => {
            // Vector in bits 31:0; target trust level, which has to be ours.
            let first = next()?;
            if !(0x10..=0xff).contains(&first) {
                return Err(HvStatus::INVALID_PARAMETER);
            }
            let set = if sparse {
                sparse_set(control, next)?
            } else {
                VpSet::of_mask(next()?)
            };
            Ok(Request::Interrupt(first as u8, set))
        }
        Shape::Message => {
            // Connection, and a word without meaning; type and size.
            let (connection, about) = (next()?, next()?);
            let (kind, size) = (about as u32, (about >> 32) as usize);
            if size > MAX_PAYLOAD || kind == 0 || kind & HYPERVISORS != 0 {
                return Err(HvStatus::INVALID_PARAMETER);
            }
            let words = input.len().saturating_sub(2);
            if words < size.div_ceil(8) {
                return Err(HvStatus::INVALID_HYPERCALL_INPUT);
            }
            check_connection(connection as u32)?;
            Ok(Request::PostMessage)
        }
        Shape::Event => {
            let word = next()?;
            let connection = word as u32;
            check_connection(connection)?;
            if word >> 48 != 0 {
                return Err(HvStatus::INVALID_PARAMETER);
            }
            let flag = (word >> 32) as u16;
            Ok(Request::SignalEvent(EventSignal { connection, flag }))
        }
    }
}

/// An identifier has 24 bits.
fn check_connection(connection: u32) -> Result<(), HvStatus> {
    if connection >> 24 == 0 {
        Ok(())
    } else {
        Err(HvStatus::INVALID_CONNECTION_ID)
    }
}

const fn flush(list: bool, sparse: bool) -> Shape {
    Shape::Flush { list, sparse }
}

/// `HV_VP_SET`: format, mask of the banks that follow, and those, whose number is that of the words of variable header.
fn sparse_set(
    control: Control,
    mut next: impl FnMut() -> Result<u64, HvStatus>,
) -> Result<VpSet, HvStatus> {
    const SPARSE: u64 = 0;
    const ALL: u64 = 1;
    match next()? {
        ALL => Ok(VpSet::ALL),
        SPARSE => {
            let mask = next()?;
            if mask.count_ones() != control.variable_words().into() {
                return Err(HvStatus::INVALID_HYPERCALL_INPUT);
            }
            let mut set = VpSet::NONE;
            // Banks that no VP is in come last.
            for (index, bank) in (0_u32..).zip(&mut set.0) {
                if mask >> index & 1 != 0 {
                    *bank = next()?;
                }
            }
            Ok(set)
        }
        _ => Err(HvStatus::INVALID_PARAMETER),
    }
}

#[cfg(test)]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]
mod tests {
    use super::code::*;
    use super::*;
    use proptest::prelude::*;

    const ALL: u64 = synthetic::ASSIGNABLE;

    fn call(code: u16, words: u64, reps: u64, input: &[u64]) -> Result<Request, HvStatus> {
        let control = u64::from(code) | words << 17 | reps << 32;
        parse(Control(control), input, ALL)
    }

    fn set(members: &[u32]) -> VpSet {
        let mut set = VpSet::NONE;
        members.iter().for_each(|member| set.add(*member));
        set
    }

    #[test]
    fn flush_names_vps_by_mask() {
        let input = [0x1000, 0, 0b101];
        let expected = Ok(Request::Flush(set(&[0, 2])));
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 0, &input), expected);
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_LIST, 0, 3, &input), expected);
        let all = Ok(Request::Flush(VpSet::ALL));
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 0, &[0, 7, 0]), all);
    }

    #[test]
    fn sparse_sets_name_banks() {
        let input = [0, 0, 0, 0b1010, 1 << 5, 1 << 63];
        let expected = Ok(Request::Flush(set(&[69, 255])));
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_SPACE_EX, 2, 0, &input), expected);
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_LIST_EX, 2, 1, &input), expected);
        let all = Ok(Request::Flush(VpSet::ALL));
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_SPACE_EX, 0, 0, &[0, 0, 1]), all);
        let input = [0xf0, 0, 1, 2];
        assert_eq!(
            call(SEND_SYNTHETIC_CLUSTER_IPI_EX, 1, 0, &input),
            Ok(Request::Interrupt(0xf0, set(&[1])))
        );
        // A bank beyond all VPs.
        let input = [0xf0, 0, 1 << 40, 2];
        assert_eq!(
            call(SEND_SYNTHETIC_CLUSTER_IPI_EX, 1, 0, &input),
            Ok(Request::Interrupt(0xf0, VpSet::NONE))
        );
    }

    #[test]
    fn control_words_that_do_not_fit_are_refused() {
        let bad = Err(HvStatus::INVALID_HYPERCALL_INPUT);
        let input = [0x20, 0, 1, 1];
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 1, &input), bad);
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_LIST, 0, 0, &input), bad);
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_SPACE, 1, 0, &input), bad);
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 0, &[0, 0]), bad);
        assert_eq!(call(SEND_SYNTHETIC_CLUSTER_IPI_EX, 2, 0, &input), bad);
        assert_eq!(call(SEND_SYNTHETIC_CLUSTER_IPI_EX, 1, 0, &input[..3]), bad);
        for bit in [27, 30, 44, 47, 60, 63] {
            let control = Control(8 | 1 << bit);
            assert_eq!(parse(control, &input, ALL), bad, "{bit}");
        }
        let past = Control(3 | 2 << 32 | 2 << 48);
        assert_eq!(parse(past, &input, ALL), bad);
    }

    #[test]
    fn parameters_are_checked() {
        let bad = Err(HvStatus::INVALID_PARAMETER);
        for vector in [0, 15, 256, 0x1_0000_0030] {
            assert_eq!(call(SEND_SYNTHETIC_CLUSTER_IPI, 0, 0, &[vector, 1]), bad);
        }
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_SPACE, 0, 0, &[0, 16, 1]), bad);
        assert_eq!(call(FLUSH_VIRTUAL_ADDRESS_SPACE_EX, 0, 0, &[0, 0, 2]), bad);
    }

    #[test]
    fn messages_are_measured() {
        let message = |kind: u64, size: u64| [7, size << 32 | kind, 1, 2, 3];
        let post = |input: &[u64]| call(POST_MESSAGE, 0, 0, input);
        assert_eq!(post(&message(1, 24)), Ok(Request::PostMessage));
        assert_eq!(post(&message(1, 17)[..5]), Ok(Request::PostMessage));
        assert_eq!(post(&message(1, 0)[..2]), Ok(Request::PostMessage));
        let short = Err(HvStatus::INVALID_HYPERCALL_INPUT);
        assert_eq!(post(&message(1, 25)), short);
        assert_eq!(post(&message(1, 240)), short);
        let mut longest = [0; WORDS];
        longest[1] = 240 << 32 | 1;
        assert_eq!(post(&longest), Ok(Request::PostMessage));
        let bad = Err(HvStatus::INVALID_PARAMETER);
        for (kind, size) in [(1, 241), (1, 0xffff_ffff), (0, 8), (1 << 31, 8)] {
            assert_eq!(post(&message(kind, size)), bad, "{kind:x} {size}");
        }
        let unknown = Err(HvStatus::INVALID_CONNECTION_ID);
        assert_eq!(post(&[1 << 24, 1]), unknown);
    }

    #[test]
    fn events_name_connection_and_flag() {
        let signal = |word| call(SIGNAL_EVENT, 0, 0, &[word]);
        let event = EventSignal {
            connection: 0x12_3456,
            flag: 0x789,
        };
        let expected = Ok(Request::SignalEvent(event));
        assert_eq!(signal(0x789_0012_3456), expected);
        assert_eq!(EventSignal::from_value(event.to_value()), Some(event));
        assert_eq!(signal(1 << 24), Err(HvStatus::INVALID_CONNECTION_ID));
        assert_eq!(signal(1 << 48), Err(HvStatus::INVALID_PARAMETER));
    }

    #[test]
    fn calls_that_the_partition_lacks_are_denied() {
        let denied = Err(HvStatus::ACCESS_DENIED);
        for (code, feature) in [
            (2, synthetic::FLUSHES),
            (3, synthetic::FLUSHES),
            (0xb, synthetic::CLUSTER_IPI),
            (0x13, synthetic::FLUSHES),
            (0x14, synthetic::SPARSE_SETS),
            (0x15, synthetic::CLUSTER_IPI),
            (0x15, synthetic::SPARSE_SETS),
            (0x5c, synthetic::SYNIC),
            (0x5d, synthetic::SIGNAL_EVENTS),
        ] {
            assert_eq!(parse(Control(code), &[], ALL & !feature), denied);
        }
        let unknown = Err(HvStatus::INVALID_HYPERCALL_CODE);
        assert_eq!(parse(Control(0x4d), &[], ALL), unknown);
    }

    #[test]
    fn set_loses_members() {
        let mut all = set(&[3, 200]);
        assert!(all.has(3) && all.has(200) && !all.has(4) && !all.has(1 << 20));
        all.remove(200);
        assert_eq!(all, set(&[3]));
        all.remove(3);
        assert!(all.is_empty());
    }

    proptest! {
        /// Whatever a guest passes gives an answer.
        #[test]
        fn any_call_has_an_answer(
            control in any::<u64>(), code in prop_oneof![0..0x18_u64, 0x5c..0x5e_u64, Just(0x8001)],
            input in prop::collection::vec(any::<u64>(), 0..=WORDS)
        ) {
            let _ = parse(Control(control & !0xffff | code), &input, ALL);
        }
    }
}
