// SPDX-License-Identifier: GPL-2.0
//! What can go wrong, as one sentence that also says what to do next.

use std::io;
use std::path::{Path, PathBuf};

/// Result of everything that can refuse.
pub type Result<T> = std::result::Result<T, Error>;

/// A refusal or failure of the worker process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened or read.
    #[error("cannot read the {what} {}: {source}; give the path of a readable file", path.display())]
    File {
        /// What the file is for: kernel or initrd.
        what: &'static str,
        /// The path as given.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// The kernel file is not a bootable bzImage.
    #[error("{} is not a kernel that can be started: {why}; give a bzImage such as /boot/vmlinuz-*", path.display())]
    Kernel {
        /// The path as given.
        path: PathBuf,
        /// The check that failed.
        why: String,
    },

    /// The kernel command line does not fit.
    #[error(
        "the command line has {len} bytes, this kernel takes at most {max}; shorten --cmdline"
    )]
    Cmdline {
        /// Bytes given.
        len: usize,
        /// Bytes the kernel takes, without the closing zero.
        max: usize,
    },

    /// The guest has too little memory for what is loaded into it.
    #[error("{have} MiB of memory are too little for this {what}: give at least --memory {need}M")]
    MemoryTooSmall {
        /// What does not fit.
        what: &'static str,
        /// Memory given, in MiB.
        have: u64,
        /// Memory needed, in MiB.
        need: u64,
    },

    /// The host could not provide the guest's memory.
    #[error("the host cannot provide {mib} MiB for the guest: {why}; lower --memory or free memory on the host")]
    HostMemory {
        /// Memory asked for, in MiB.
        mib: u64,
        /// The system's answer.
        why: String,
    },

    /// The device node does not exist.
    #[error(
        "{} does not exist: this host is no root partition yet; load the hypervisor with `modprobe hv_core` \
         (or `insmod hv_core.ko`) and see `hvctl status`", .0.display()
    )]
    NoDevice(PathBuf),

    /// The user may not open the device node.
    #[error("no permission to open {}: run as root, or join the group that owns it (usually `mshv`) and log in anew", .0.display())]
    DevicePermission(PathBuf),

    /// The device node exists but does not open.
    #[error("cannot open {}: {source}; `hvctl status` and `dmesg` say what state the hypervisor is in", path.display())]
    DeviceOpen {
        /// The path as given.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// The hypervisor refused a step.
    #[error("the hypervisor refused to {what}: {why}; `dmesg` may say more")]
    Hypervisor {
        /// The step.
        what: String,
        /// Its answer.
        why: String,
    },

    /// A running VP met something that cannot be completed.
    #[error("VP {vp}: {why}")]
    Vp {
        /// Index of the VP.
        vp: u32,
        /// What happened.
        why: String,
    },

    /// The console or the control socket could not be set up.
    #[error("cannot set up {what}: {why}")]
    Io {
        /// The thing.
        what: String,
        /// The reason and the remedy.
        why: String,
    },
}

impl Error {
    /// Shorthand for [`Error::Hypervisor`].
    pub fn hypervisor(what: impl Into<String>, why: impl ToString) -> Self {
        Error::Hypervisor {
            what: what.into(),
            why: why.to_string(),
        }
    }

    /// Shorthand for [`Error::Io`].
    pub fn io(what: impl Into<String>, why: impl ToString) -> Self {
        Error::Io {
            what: what.into(),
            why: why.to_string(),
        }
    }

    /// Shorthand for [`Error::Kernel`].
    pub fn kernel(path: &Path, why: impl Into<String>) -> Self {
        Error::Kernel {
            path: path.to_owned(),
            why: why.into(),
        }
    }

    /// The error for a device node that did not open.
    pub fn device(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Error::NoDevice(path.to_owned()),
            io::ErrorKind::PermissionDenied => Error::DevicePermission(path.to_owned()),
            _ => Error::DeviceOpen {
                path: path.to_owned(),
                source,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_how_to_get_one() {
        let e = Error::device(
            Path::new("/dev/mshv"),
            io::Error::from_raw_os_error(libc::ENOENT),
        );
        assert!(e.to_string().contains("modprobe hv_core"), "{e}");
    }

    #[test]
    fn a_forbidden_device_names_the_group() {
        let e = Error::device(
            Path::new("/dev/mshv"),
            io::Error::from_raw_os_error(libc::EACCES),
        );
        assert!(e.to_string().contains("`mshv`"), "{e}");
    }

    #[test]
    fn every_error_is_one_line() {
        let e = Error::device(
            Path::new("/dev/mshv"),
            io::Error::from_raw_os_error(libc::ENODEV),
        );
        assert!(!e.to_string().contains('\n'));
    }
}
