// SPDX-License-Identifier: GPL-2.0
//! `hvctl`: looks at the root partition, and starts, lists, stops and attaches to child partitions.
//!
//! | module | idea |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`status`] | the module's status document, read leniently |
//! | [`show`] | the same for people |
//! | [`features`] | what children see of the hypervisor |
//! | [`table`] | aligned columns |
//! | [`partitions`] | `ls` and `stop`: the worker processes behind their control sockets |
//! | [`run`] | `run`: starts a worker process |
//! | [`console`] | `console`: attaches to one |
//! | [`pages`] | shell completion and manual pages |
//! | [`error`] | what can go wrong |

pub mod cli;
pub mod console;
pub mod error;
pub mod features;
pub mod pages;
pub mod partitions;
pub mod run;
pub mod show;
pub mod status;
pub mod table;

pub use error::{Error, Result};

use cli::{Cli, Command};
use serde::Serialize;

/// Carries out a command and returns the exit code.
pub fn execute(cli: Cli) -> Result<u8> {
    match cli.command {
        Command::Status => status(cli.json),
        Command::Features => features(cli.json),
        Command::Run(options) => run::run(&options, cli.json),
        Command::Ls => ls(cli.json),
        Command::Stop { name } => stop(&name, cli.json),
        Command::Console { name } => console::attach(&name).map(|()| 0),
        Command::Completion { shell, program } => {
            pages::completion(shell, program, &mut std::io::stdout());
            Ok(0)
        }
        Command::Man { dir } => {
            let written = pages::manual(&dir)?;
            if cli.json {
                print_json(&written)?;
            }
            Ok(0)
        }
    }
}

fn status(json: bool) -> Result<u8> {
    let document = status::read(&status::debugfs())?;
    if json {
        print_json(&document)?;
    } else {
        print!(
            "{}",
            show::status(&status::Status::from_document(&document))
        );
    }
    Ok(0)
}

fn features(json: bool) -> Result<u8> {
    if json {
        print_json(&features::list())?;
    } else {
        print!("{}", features::table());
    }
    Ok(0)
}

fn ls(json: bool) -> Result<u8> {
    let list = partitions::list(&vmwp::control::run_dir())?;
    if json {
        print_json(&list)?;
    } else {
        print!("{}", show::partitions(&list));
    }
    Ok(0)
}

fn stop(name: &str, json: bool) -> Result<u8> {
    partitions::stop(&vmwp::control::run_dir(), name)?;
    if json {
        print_json(&serde_json::json!({ "name": name, "stopped": true }))?;
    } else {
        println!("{name} has stopped");
    }
    Ok(0)
}

fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<()> {
    println!(
        "{}",
        serde_json::to_string_pretty(value).map_err(|e| Error::Other(e.to_string()))?
    );
    Ok(())
}
