// SPDX-License-Identifier: GPL-2.0
//! Why a partition ended: exit code, sentence, JSON.

use crate::vp::stats::VpExits;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Exit code after a failure before or during the run.
pub const EXIT_ERROR: u8 = 1;

/// The end of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest triple-faulted.
    TripleFault {
        /// The VP that did.
        vp: u32,
        /// Where.
        place: String,
    },
    /// Somebody outside stopped it.
    Stopped {
        /// Who.
        by: String,
    },
    /// It could not go on.
    Error {
        /// The VP that could not.
        vp: u32,
        /// Why.
        why: String,
    },
}

impl Outcome {
    /// Shorthand for [`Outcome::Error`].
    pub fn error(vp: u32, why: impl Into<String>) -> Self {
        Outcome::Error {
            vp,
            why: why.into(),
        }
    }

    /// Exit code of the process. 2 is left to the command line parser.
    pub fn exit_code(&self) -> u8 {
        match self {
            Outcome::PowerOff => 0,
            Outcome::Error { .. } => EXIT_ERROR,
            Outcome::Reset => 3,
            Outcome::TripleFault { .. } => 4,
            Outcome::Stopped { .. } => 5,
        }
    }

    /// One word for programs.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::PowerOff => "power-off",
            Outcome::Reset => "reset",
            Outcome::TripleFault { .. } => "triple-fault",
            Outcome::Stopped { .. } => "stopped",
            Outcome::Error { .. } => "error",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::PowerOff => write!(f, "the guest powered off"),
            Outcome::Reset => write!(f, "the guest asked for a reset"),
            Outcome::TripleFault { vp, place } => {
                write!(f, "VP {vp} of the guest triple-faulted {place}")
            }
            Outcome::Stopped { by } => write!(f, "stopped by {by}"),
            Outcome::Error { vp, why } => write!(f, "VP {vp} cannot go on: {why}"),
        }
    }
}

/// Everything that is said at the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Name of the partition.
    pub name: String,
    /// One word: power-off, reset, triple-fault, stopped or error.
    pub outcome: String,
    /// The same as a sentence.
    pub detail: String,
    /// Exit code of the process.
    pub exit_code: u8,
    /// Milliseconds from the start of the VPs to the end.
    pub uptime_ms: u64,
    /// Bytes that the guest wrote to its console.
    pub console_bytes: u64,
    /// Exits by VP.
    pub vps: Vec<VpExits>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.uptime_ms / 1000;
        write!(
            f,
            "vmwp: {}: {} after {seconds}.{:03} s",
            self.name,
            self.detail,
            self.uptime_ms % 1000
        )?;
        for vp in &self.vps {
            let shown: Vec<_> = vp
                .by_kind()
                .iter()
                .filter(|(_, n)| *n > 0)
                .map(|(kind, n)| format!("{kind} {n}"))
                .collect();
            let shown = if shown.is_empty() {
                "none".to_owned()
            } else {
                shown.join(", ")
            };
            write!(f, "; exits of VP {}: {shown}", vp.vp)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Outcome> {
        vec![
            Outcome::PowerOff,
            Outcome::Reset,
            Outcome::TripleFault {
                vp: 0,
                place: "at RIP 0x0".into(),
            },
            Outcome::Stopped {
                by: "SIGTERM".into(),
            },
            Outcome::error(1, "x"),
        ]
    }

    #[test]
    fn exit_codes_are_distinct_and_leave_2_to_usage_errors() {
        let mut codes: Vec<_> = all().iter().map(Outcome::exit_code).collect();
        assert_eq!(codes[0], 0);
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), all().len());
        assert!(!codes.contains(&2));
    }

    #[test]
    fn the_summary_is_one_line_and_round_trips_as_json() {
        let outcome = Outcome::PowerOff;
        let s = Summary {
            name: "a".into(),
            outcome: outcome.word().into(),
            detail: outcome.to_string(),
            exit_code: outcome.exit_code(),
            uptime_ms: 2034,
            console_bytes: 5,
            vps: vec![
                VpExits {
                    port: 3,
                    ..Default::default()
                },
                VpExits {
                    vp: 1,
                    ..Default::default()
                },
            ],
        };
        assert_eq!(
            s.to_string(),
            "vmwp: a: the guest powered off after 2.034 s; exits of VP 0: port 3; exits of VP 1: none"
        );
        let json = serde_json::to_string(&s).unwrap();
        assert!(!json.contains('\n'));
        assert_eq!(serde_json::from_str::<Summary>(&json).unwrap(), s);
    }
}
