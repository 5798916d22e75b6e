//! `cohort config`: checks and shows configurations.

use crate::args::{self, FileFlag, StartedBy};
use crate::out::say;
use settings::Settings;

/// Flags of `cohort config`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Args {
    /// What to do with it.
    #[command(subcommand)]
    pub action: Action,
}

/// What can be done with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Action {
    /// List everything that is wrong with it; nothing is started
    Check(FileFlag),
    /// Print every key with the value in effect, as TOML
    Show(FileFlag),
}

/// Checks or shows.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    match &args.action {
        Action::Check(file) => {
            args::load(StartedBy::User, file, &[])?;
            say!("no mistakes found");
        }
        Action::Show(file) => show(&args::load(StartedBy::User, file, &[])?),
    }
    Ok(())
}

fn show(settings: &Settings) {
    for (key, value) in settings.entries() {
        match value {
            serde_json::Value::Null => say!("# {key} is not set"),
            value => say!("{key} = {value}"),
        }
    }
}
