// SPDX-License-Identifier: GPL-2.0
//! `hvctl`, the command line tool.

use clap::Parser;
use hvctl::cli::Cli;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    match hvctl::execute(cli) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("hvctl: {e}");
            if json {
                println!("{}", e.to_json());
            }
            ExitCode::FAILURE
        }
    }
}
