//! The `cohort` command line: one file per subcommand under `command`, the supervisor of the processes of one
//! machine, and what a person sees of them.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line talks to its terminal")]

pub mod args;
pub mod client;
pub mod command;
mod embedded;
pub mod generation;
pub mod hosts;
mod identity;
mod out;
mod progress;
mod reload;
pub mod report;
mod run_dir;
mod style;
pub mod supervisor;
mod table;
pub mod telemetry;
pub mod top;
mod wire;

pub use out::write_note;
