//! The one binary.
#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, reason = "the last word of a failed command goes to its terminal")]

use std::process::ExitCode;

use clap::Parser;
use cli::command::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let supervised = cli.command.supervised();
    match cli.command.run(&cli.log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if supervised => {
            cli::report::say_failed(&error);
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {}", cli::report::chain(&error));
            ExitCode::FAILURE
        }
    }
}
