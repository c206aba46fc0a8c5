// SPDX-License-Identifier: GPL-2.0
//! The options, and their values' small languages.

use crate::layout::{MEMORY_RANGE, MIB, PAGE};
use clap::{Args, Parser};
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

/// Most VPs: the tables describe local APICs with 8-bit ids, of which 255 is the broadcast.
pub const MAX_VPS: u32 = 255;

/// Command line of a guest that was given none.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1";

/// Runs one child partition on /dev/mshv, in the foreground, until it ends.
///
/// Exit status: 0 the guest powered off, 1 error, 2 wrong usage, 3 the guest asked for a reset, 4 triple fault,
/// 5 stopped from outside.
#[derive(Clone, Debug, Parser)]
#[command(name = "vmwp", version)]
pub struct Cli {
    /// The partition.
    #[command(flatten)]
    pub vm: VmOptions,

    /// Listen on this unix socket for status, stop and console requests
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,

    /// Where the serial console goes: stdio, file:PATH, pty or none. On stdio, Ctrl-A x stops the partition
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub console: Console,

    /// Close with one line of JSON on standard output
    #[arg(long)]
    pub json: bool,
}

/// What a partition is made of; shared with `hvctl run`.
#[derive(Clone, Debug, Args)]
pub struct VmOptions {
    /// Kernel to boot, a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_CMDLINE, allow_hyphen_values = true)]
    pub cmdline: String,

    /// Number of virtual processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_VPS as i64))]
    pub vps: u32,

    /// Memory; K, M, G are powers of 1024, a bare number is MiB
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: MemorySize,

    /// Device of the hypervisor
    #[arg(long, value_name = "PATH", default_value = "/dev/mshv")]
    pub device: PathBuf,

    /// Name of the partition [default: vm-PID]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub name: Option<String>,
}

impl VmOptions {
    /// The same options as arguments of a `vmwp` command line.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["--kernel".into(), self.kernel.clone().into()];
        if let Some(initrd) = &self.initrd {
            args.extend(["--initrd".into(), initrd.clone().into()]);
        }
        // With "=", because a command line may begin with a dash.
        args.push(format!("--cmdline={}", self.cmdline).into());
        args.extend(["--vps".into(), self.vps.to_string().into()]);
        args.extend([
            "--memory".into(),
            format!("{}K", self.memory.0 / 1024).into(),
        ]);
        args.extend(["--device".into(), self.device.clone().into()]);
        if let Some(name) = &self.name {
            args.extend(["--name".into(), name.into()]);
        }
        args
    }
}

/// A size of memory in bytes, whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(pub u64);

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let upper = text.trim().to_ascii_uppercase();
        let upper = upper
            .strip_suffix("IB")
            .or(upper.strip_suffix('B'))
            .unwrap_or(&upper);
        let (digits, unit) = match upper.chars().last() {
            Some('K') => (&upper[..upper.len() - 1], 1 << 10),
            Some('M') => (&upper[..upper.len() - 1], MIB),
            Some('G') => (&upper[..upper.len() - 1], 1 << 30),
            _ => (upper, MIB),
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| "expected a size such as 512M or 2G".to_owned())?;
        let bytes = number.saturating_mul(unit);
        if !MEMORY_RANGE.contains(&bytes) {
            let (min, max) = (MEMORY_RANGE.start() / MIB, MEMORY_RANGE.end() / MIB);
            return Err(format!("must be between {min}M and {max}M"));
        }
        if bytes % PAGE != 0 {
            return Err("must be a multiple of 4K".into());
        }
        Ok(MemorySize(bytes))
    }
}

/// Where the serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// Standard input and output.
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// A new pseudo terminal.
    Pty,
    /// Only the control socket reaches it.
    None,
}

impl FromStr for Console {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stdio" => Ok(Console::Stdio),
            "pty" => Ok(Console::Pty),
            "none" => Ok(Console::None),
            _ => match text.strip_prefix("file:") {
                Some(path) if !path.is_empty() => Ok(Console::File(path.into())),
                _ => Err("expected stdio, file:PATH, pty or none".into()),
            },
        }
    }
}

/// A name becomes part of a file name.
pub fn parse_name(text: &str) -> Result<String, String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if text.is_empty() || text.len() > 64 || text.starts_with('.') || !text.chars().all(fine) {
        return Err(
            "expected up to 64 letters, digits, '.', '_' or '-', not beginning with '.'".into(),
        );
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["vmwp"], args].concat())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_a_small_guest_on_the_terminal() {
        let cli = parse(&["--kernel", "k"]).unwrap();
        assert_eq!((cli.vm.vps, cli.vm.memory), (1, MemorySize(512 * MIB)));
        assert_eq!(
            (cli.console, cli.vm.cmdline.as_str()),
            (Console::Stdio, DEFAULT_CMDLINE)
        );
    }

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, bytes) in [
            ("512M", 512 * MIB),
            ("2G", 2 << 30),
            ("64", 64 * MIB),
            ("65536k", 64 * MIB),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(text.parse::<MemorySize>(), Ok(MemorySize(bytes)), "{text}");
        }
        for text in [
            "",
            "M",
            "x",
            "-1M",
            "1T",
            "15M",
            "2000000G",
            "99999999999999999999",
            "16385.5K",
            "16385K1",
        ] {
            assert!(text.parse::<MemorySize>().is_err(), "{text}");
        }
        assert_eq!(
            "16386K".parse::<MemorySize>(),
            Err("must be a multiple of 4K".into())
        );
    }

    #[test]
    fn consoles_are_read() {
        assert_eq!("file:/tmp/x".parse(), Ok(Console::File("/tmp/x".into())));
        assert_eq!("pty".parse(), Ok(Console::Pty));
        assert!("file:".parse::<Console>().is_err());
        assert!("tty".parse::<Console>().is_err());
    }

    #[test]
    fn names_cannot_leave_their_folder() {
        for bad in ["", "..", ".a", "a/b", "a b", &"x".repeat(65)] {
            assert!(parse_name(bad).is_err(), "{bad}");
        }
        assert!(parse_name("web-1.test_a").is_ok());
    }

    #[test]
    fn wrong_counts_of_vps_are_refused() {
        assert!(parse(&["--kernel", "k", "--vps", "0"]).is_err());
        assert!(parse(&["--kernel", "k", "--vps", "256"]).is_err());
        assert!(parse(&["--kernel", "k", "--vps", "255"]).is_ok());
    }

    #[test]
    fn options_survive_the_way_through_a_command_line() {
        let cli = parse(&[
            "--kernel",
            "k",
            "--initrd",
            "i",
            "--cmdline=-x y=z",
            "--vps",
            "3",
            "--memory",
            "64M",
            "--name",
            "n",
        ])
        .unwrap();
        let args = [vec!["vmwp".into()], cli.vm.to_args()].concat();
        let again = Cli::try_parse_from(args).unwrap();
        assert_eq!(format!("{:?}", again.vm), format!("{:?}", cli.vm));
    }
}
