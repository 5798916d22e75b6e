//! `cohort keys`: API keys for callers.

use anyhow::Context;
use security::Limits;
use serde_json::json;

use crate::out::say;

const MORE: &str = "\
The key is shown once and kept nowhere: the file of keys (router.keys_file) holds its SHA-256. Add the printed line to it;
routers see the change by themselves. Remove the line to refuse the key.

Example:
  cohort keys new alice --requests-per-minute 600 --concurrency 16";

/// Flags of `cohort keys`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub what: What,
}

/// What can be done with keys.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum What {
    /// Make a key, print it once, and the line for the file of keys
    New(NewArgs),
}

/// Flags of `cohort keys new`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
#[command(after_help = MORE)]
pub struct NewArgs {
    /// Whose key it is: letters, digits, - and _
    pub name: String,
    /// Calls in a minute [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub requests_per_minute: Option<u64>,
    /// Prompt and generated tokens in a minute [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub tokens_per_minute: Option<u64>,
    /// Calls at once [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub concurrency: Option<u32>,
    /// The most urgent priority it may ask for; lower numbers are served first [default: any]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub priority_min: Option<i32>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Makes and prints a key.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let What::New(args) = &args.what;
    let NewArgs { name, requests_per_minute, tokens_per_minute, concurrency, priority_min, json } = args;
    let limits = Limits {
        requests_per_minute: *requests_per_minute,
        tokens_per_minute: *tokens_per_minute,
        concurrency: *concurrency,
        priority_min: *priority_min,
    };
    let key = security::generate_key()?;
    let line = security::key_line(name, &key, &limits)
        .with_context(|| format!("{name:?} is no name for a key: use letters, digits, - and _"))?;
    if *json {
        say!("{}", json!({ "name": name, "key": key, "line": line }));
    } else {
        say!("key   {key}");
        say!("line  {line}");
    }
    Ok(())
}
