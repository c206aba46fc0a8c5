// SPDX-License-Identifier: GPL-2.0
//! What can go wrong, as one sentence that also says what to do next.

use std::io;
use std::path::{Path, PathBuf};

/// Result of everything that can refuse.
pub type Result<T> = std::result::Result<T, Error>;

/// A refusal or failure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel module is not there.
    #[error("the module hv_core is not loaded; load it with `modprobe hv_core`")]
    NotLoaded,

    /// The kernel module is there, its status is not.
    #[error("hv_core is loaded but shows no status at {}; `dmesg` says why it did not start", .0.display())]
    NoStatus(PathBuf),

    /// debugfs is not mounted.
    #[error("debugfs is not mounted at {path}; mount it with `mount -t debugfs none {path}`")]
    NoDebugfs {
        /// Where it should be.
        path: String,
    },

    /// Only root may look.
    #[error("no permission to read {}; run as root", .0.display())]
    Permission(PathBuf),

    /// The status does not read.
    #[error("cannot read the status at {}: {why}", path.display())]
    Status {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },

    /// There is no such partition.
    #[error("no partition named {0} runs here; `hvctl ls` lists those that do")]
    NoPartition(String),

    /// The partition's worker process does not answer as it should.
    #[error("the worker process of {name} does not answer: {source}")]
    Worker {
        /// Name of the partition.
        name: String,
        /// What happened.
        source: io::Error,
    },

    /// A name that is taken.
    #[error("a partition named {0} runs already; choose another --name or stop it with `hvctl stop {0}`")]
    NameTaken(String),

    /// The worker process cannot be started.
    #[error("cannot start {}: {source}; vmwp must be beside hvctl, in PATH, or given by --vmwp", path.display())]
    Start {
        /// The program.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },

    /// The worker process ended before the partition ran.
    #[error("the partition {name} did not start: {why}")]
    Ended {
        /// Name of the partition.
        name: String,
        /// What the worker process said last.
        why: String,
    },

    /// A file or folder that cannot be used.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// The path.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },

    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// Shorthand for [`Error::File`], for `map_err`.
    pub fn file(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
        move |source| Error::File {
            path: path.to_owned(),
            source,
        }
    }

    /// For programs: a word and the sentence.
    pub fn to_json(&self) -> serde_json::Value {
        let state = match self {
            Error::NotLoaded => "not-loaded",
            Error::NoPartition(_) => "no-partition",
            Error::Permission(_) => "no-permission",
            _ => "error",
        };
        serde_json::json!({ "state": state, "error": self.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_name_the_next_step() {
        assert!(Error::NotLoaded.to_string().contains("modprobe hv_core"));
        let e = Error::NoDebugfs {
            path: "/sys/kernel/debug".into(),
        };
        assert!(
            e.to_string()
                .contains("mount -t debugfs none /sys/kernel/debug"),
            "{e}"
        );
    }

    #[test]
    fn json_has_a_word_and_the_sentence() {
        let v = Error::NotLoaded.to_json();
        assert_eq!(v["state"], "not-loaded");
        assert!(v["error"].as_str().unwrap().contains("not loaded"));
    }
}
