// SPDX-License-Identifier: GPL-2.0
//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::path::PathBuf;
use vmwp::cli::{parse_name, VmOptions};

/// Looks at the root partition and runs child partitions.
#[derive(Clone, Debug, Parser)]
#[command(name = "hvctl", version)]
pub struct Cli {
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show the state of the hypervisor: capabilities, exits, memory
    Status,

    /// Show what CPUID tells a child of its hypervisor, what stands behind each bit, and which test sees it
    Features,

    /// Run a partition: boot a kernel and attach its console
    Run(RunOptions),

    /// List the running partitions
    Ls,

    /// Stop a partition at once, like pulling its plug
    Stop {
        /// Name of the partition
        #[arg(value_parser = parse_name)]
        name: String,
    },

    /// Attach to the console of a partition; Ctrl-A x detaches
    Console {
        /// Name of the partition
        #[arg(value_parser = parse_name)]
        name: String,
    },

    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: Shell,
        /// The program that it completes
        #[arg(default_value = "hvctl")]
        program: Program,
    },

    /// Write the manual pages of hvctl and vmwp
    Man {
        /// Folder to write them to
        dir: PathBuf,
    },
}

/// The programs whose command lines are defined here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Program {
    /// This one.
    Hvctl,
    /// The worker.
    Vmwp,
}

/// How to run a partition.
#[derive(Clone, Debug, Args)]
pub struct RunOptions {
    /// The partition.
    #[command(flatten)]
    pub vm: VmOptions,

    /// Run in the background; attach with `hvctl console`
    #[arg(long, short)]
    pub detach: bool,

    /// The worker program [default: vmwp beside hvctl, else the one in PATH]
    #[arg(long, value_name = "PATH")]
    pub vmwp: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn json_is_understood_everywhere() {
        for args in [
            &["hvctl", "--json", "status"][..],
            &["hvctl", "ls", "--json"],
            &["hvctl", "stop", "a", "--json"],
        ] {
            assert!(Cli::try_parse_from(args).unwrap().json, "{args:?}");
        }
    }

    #[test]
    fn run_takes_the_options_of_the_worker() {
        let cli =
            Cli::try_parse_from(["hvctl", "run", "--kernel", "k", "--vps", "2", "-d"]).unwrap();
        let Command::Run(run) = cli.command else {
            panic!()
        };
        assert!(run.detach);
        assert_eq!(run.vm.vps, 2);
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        assert!(Cli::try_parse_from(["hvctl", "stop", "../x"]).is_err());
    }
}
