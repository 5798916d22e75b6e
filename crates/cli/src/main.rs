//! The one binary.
#![forbid(unsafe_code)]

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
            cli::write_note(format_args!("error: {}", cli::report::chain(&error)));
            ExitCode::FAILURE
        }
    }
}
