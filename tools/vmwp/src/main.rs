// SPDX-License-Identifier: GPL-2.0
//! `vmwp`: the worker process of one child partition.

use clap::Parser;
use std::process::ExitCode;
use vmwp::cli::Cli;
use vmwp::outcome::EXIT_ERROR;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match vmwp::worker::run(&cli) {
        Ok(summary) => {
            eprintln!("{summary}");
            if cli.json {
                // Strings and numbers always serialize.
                println!("{}", serde_json::to_string(&summary).unwrap_or_default());
            }
            ExitCode::from(summary.exit_code)
        }
        Err(e) => {
            eprintln!("vmwp: {e}");
            if cli.json {
                println!(
                    "{}",
                    serde_json::json!({ "outcome": "error", "detail": e.to_string(), "exit_code": EXIT_ERROR })
                );
            }
            ExitCode::from(EXIT_ERROR)
        }
    }
}
