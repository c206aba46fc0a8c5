// SPDX-License-Identifier: GPL-2.0
//! Shell completion and manual pages, generated from the definition of the command line.

use crate::cli::{Cli, Program};
use crate::{Error, Result};
use clap::CommandFactory;
use clap_complete::Shell;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes a completion script.
pub fn completion(shell: Shell, program: Program, out: &mut dyn Write) {
    let mut command = match program {
        Program::Hvctl => Cli::command(),
        Program::Vmwp => vmwp::cli::Cli::command(),
    };
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut &mut *out);
}

/// Writes the manual pages of hvctl, of each of its commands, and of vmwp; returns their paths.
pub fn manual(dir: &Path) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(dir).map_err(Error::file(dir))?;
    for command in [Cli::command(), vmwp::cli::Cli::command()] {
        clap_mangen::generate_to(command, dir).map_err(Error::file(dir))?;
    }
    let mut written: Vec<_> = std::fs::read_dir(dir)
        .map_err(Error::file(dir))?
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "1"))
        .collect();
    written.sort();
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn completion_knows_the_commands_of_both_programs_in_every_shell() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            for (program, words) in [
                (Program::Hvctl, ["hvctl", "console", "detach"]),
                (Program::Vmwp, ["vmwp", "control", "initrd"]),
            ] {
                let mut out = Vec::new();
                completion(shell, program, &mut out);
                let text = String::from_utf8(out).unwrap();
                assert!(
                    words.iter().all(|w| text.contains(w)),
                    "{shell} {program:?}"
                );
            }
        }
    }

    #[test]
    fn there_is_a_page_for_each_command() {
        let dir = TempDir::new().unwrap();
        let pages = manual(dir.as_path()).unwrap();
        let names: Vec<_> = pages
            .iter()
            .map(|p| p.file_name().unwrap().to_str().unwrap())
            .collect();
        for wanted in ["hvctl.1", "hvctl-run.1", "hvctl-status.1", "vmwp.1"] {
            assert!(names.contains(&wanted), "{wanted} in {names:?}");
        }
        let text = std::fs::read_to_string(dir.as_path().join("vmwp.1")).unwrap();
        assert!(text.contains("bzImage") && text.contains("triple fault"));
    }
}
