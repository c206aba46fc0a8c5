// SPDX-License-Identifier: GPL-2.0
//! `hvctl run`: starts the worker process of a partition.

use crate::cli::RunOptions;
use crate::partitions::{self, is_alive};
use crate::{Error, Result};
use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmwp::control::{run_dir, socket, Request};

/// How long a detached partition may take until it answers.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Names that are tried when none is given.
const NAMES: std::ops::RangeInclusive<u32> = 1..=9999;

/// Runs a partition; attached, this process becomes its worker.
pub fn run(options: &RunOptions, json: bool) -> Result<u8> {
    let dir = run_dir();
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&dir)
        .map_err(Error::file(&dir))?;
    let name = name(&dir, options.vm.name.as_deref())?;
    let program = program(options.vmwp.as_deref());
    let args = arguments(options, &dir, &name, json);
    if !options.detach {
        // Signals, the terminal and the exit code then are the worker's own.
        let source = Command::new(&program).args(args).exec();
        return Err(Error::Start {
            path: program,
            source,
        });
    }
    let pid = detach(&program, &args, &dir, &name)?;
    if json {
        crate::print_json(&serde_json::json!({ "name": name, "pid": pid }))?;
    } else {
        println!("{name} runs (process {pid}); `hvctl console {name}` attaches, `hvctl stop {name}` stops it");
    }
    Ok(0)
}

/// The name given, or the first free one.
fn name(dir: &Path, given: Option<&str>) -> Result<String> {
    match given {
        Some(name) if is_alive(dir, name) => Err(Error::NameTaken(name.into())),
        Some(name) => Ok(name.into()),
        None => NAMES
            .map(|n| format!("vm{n}"))
            .find(|name| !is_alive(dir, name))
            .ok_or_else(|| Error::Other("there are too many partitions; give a --name".into())),
    }
}

/// The worker program: given, beside this one, or left to PATH.
fn program(given: Option<&Path>) -> PathBuf {
    let beside =
        || Some(std::env::current_exe().ok()?.with_file_name("vmwp")).filter(|p| p.is_file());
    given
        .map(Path::to_owned)
        .or_else(beside)
        .unwrap_or_else(|| "vmwp".into())
}

fn arguments(options: &RunOptions, dir: &Path, name: &str, json: bool) -> Vec<OsString> {
    let mut vm = options.vm.clone();
    vm.name = Some(name.into());
    let mut args = vm.to_args();
    args.extend(["--control".into(), socket(dir, name).into()]);
    args.extend([
        "--console".into(),
        if options.detach { "none" } else { "stdio" }.into(),
    ]);
    if json || options.detach {
        args.push("--json".into());
    }
    args
}

/// Starts the worker in a session of its own and waits until it answers.
fn detach(program: &Path, args: &[OsString], dir: &Path, name: &str) -> Result<u32> {
    let path = dir.join(format!("{name}.log"));
    let log = File::create(&path).map_err(Error::file(&path))?;
    let copy = log.try_clone().map_err(Error::file(&path))?;
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(copy);
    // SAFETY: between fork and exec only setsid is called, which is safe there.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
    let mut child = command.spawn().map_err(|source| Error::Start {
        path: program.to_owned(),
        source,
    })?;
    wait(&mut child, dir, name, &path).map(|()| child.id())
}

fn wait(child: &mut Child, dir: &Path, name: &str, log: &Path) -> Result<()> {
    let begun = Instant::now();
    loop {
        if let Ok(mut client) = partitions::connect(dir, name) {
            // A worker answers only when its partition runs.
            return client
                .ask(Request::Status)
                .map(drop)
                .map_err(|source| Error::Worker {
                    name: name.into(),
                    source,
                });
        }
        let ended = child.try_wait().map_err(|source| Error::Worker {
            name: name.into(),
            source,
        })?;
        match ended {
            // A short guest may have come and gone.
            Some(status) if status.success() => return Ok(()),
            Some(_) => {
                return Err(Error::Ended {
                    name: name.into(),
                    why: last_words(log),
                })
            }
            None if begun.elapsed() > START_TIMEOUT => {
                return Err(Error::Ended {
                    name: name.into(),
                    why: format!("no answer yet; see {}", log.display()),
                })
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The last line for people in a worker's log.
fn last_words(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let line = text
        .lines()
        .rev()
        .find(|l| l.starts_with("vmwp: ") || l.starts_with("error:"));
    line.map(|l| l.trim_start_matches("vmwp: ").to_owned())
        .unwrap_or_else(|| format!("it left no message in {}", log.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command as Subcommand};
    use clap::Parser;
    use std::os::unix::fs::PermissionsExt;
    use vmm_sys_util::tempdir::TempDir;

    fn options(args: &[&str]) -> RunOptions {
        let all = [&["hvctl", "run", "--kernel", "k"], args].concat();
        let Subcommand::Run(options) = Cli::try_parse_from(all).unwrap().command else {
            panic!()
        };
        options
    }

    /// A program that does `script` instead of running a partition.
    fn fake_vmwp(dir: &TempDir, script: &str) -> PathBuf {
        let path = dir.as_path().join("vmwp");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn the_worker_understands_what_it_is_given() {
        for extra in [
            &["--detach"][..],
            &[],
            &["--cmdline", "-a b", "--initrd", "i"],
        ] {
            let args = arguments(&options(extra), Path::new("/run/hv"), "a", true);
            let worker =
                vmwp::cli::Cli::try_parse_from([vec!["vmwp".into()], args].concat()).unwrap();
            assert_eq!(worker.control.as_deref(), Some(Path::new("/run/hv/a.sock")));
            assert_eq!(worker.vm.name.as_deref(), Some("a"));
        }
    }

    #[test]
    fn a_free_name_is_found_and_a_taken_one_refused() {
        let dir = TempDir::new().unwrap();
        assert_eq!(name(dir.as_path(), None).unwrap(), "vm1");
        let worker = crate::partitions::tests::fake_worker(dir.as_path(), "vm1");
        assert_eq!(name(dir.as_path(), None).unwrap(), "vm2");
        assert!(matches!(
            name(dir.as_path(), Some("vm1")),
            Err(Error::NameTaken(_))
        ));
        crate::partitions::stop(dir.as_path(), "vm1").unwrap();
        worker.join().unwrap();
    }

    #[test]
    fn a_worker_that_fails_at_once_has_its_last_words_shown() {
        let dir = TempDir::new().unwrap();
        let program = fake_vmwp(
            &dir,
            "echo 'vmwp: /dev/mshv does not exist' >&2; echo '{}'; exit 1",
        );
        let e = detach(&program, &[], dir.as_path(), "a").unwrap_err();
        assert_eq!(
            e.to_string(),
            "the partition a did not start: /dev/mshv does not exist"
        );
    }

    #[test]
    fn a_missing_worker_program_says_where_it_is_looked_for() {
        let dir = TempDir::new().unwrap();
        let e = detach(Path::new("/nonexistent/vmwp"), &[], dir.as_path(), "a").unwrap_err();
        assert!(e.to_string().contains("--vmwp"), "{e}");
    }
}
