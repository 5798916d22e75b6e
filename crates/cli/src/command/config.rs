//! `cohort config`: checks, shows and explains configurations.

use anyhow::bail;
use serde_json::{Value, json};
use settings::{Error, Key, Loaded, Origin, Settings, Sources};

mod reference;

use crate::args::{self, ConfigFlags, FileFlag, StartedBy};
use crate::out::say;
use crate::style::Paint;
use crate::table::{Align, Table};

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
    Check(Form),
    /// Print every key with the value in effect, as TOML
    Show(Form),
    /// Say what a key does, what may be written, its value and where that comes from
    Explain {
        /// A key such as group.kv_tokens, or a section such as router.limits
        key: String,
        /// The configuration it is looked up in.
        #[command(flatten)]
        form: Form,
    },
    /// Print the keys that differ from the defaults, or from another file, and where their values come from
    Diff {
        /// Compare with the configuration of this file instead of the defaults
        #[arg(long, value_name = "FILE")]
        against: Vec<std::path::PathBuf>,
        /// The configuration that is compared.
        #[command(flatten)]
        form: Form,
    },
    /// Print the JSON Schema of a cluster file
    Schema,
    /// Print the reference of all keys, as Markdown
    Reference,
}

/// A configuration and the form of what is said of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct Form {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub file: FileFlag,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Does what was asked.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    match &args.action {
        Action::Check(form) => check(form),
        Action::Show(form) => {
            show(&form.load()?.settings, form.json);
            Ok(())
        }
        Action::Explain { key, form } => explain(key, form),
        Action::Diff { against, form } => diff(against, form),
        Action::Schema => {
            say!("{:#}", Settings::schema());
            Ok(())
        }
        Action::Reference => {
            crate::out::write_text(&reference::page());
            Ok(())
        }
    }
}

impl Form {
    fn load(&self) -> Result<Loaded, Error> {
        args::load_traced(StartedBy::User, &self.file, &[])
    }
}

fn check(form: &Form) -> anyhow::Result<()> {
    let loaded = form.load();
    if form.json {
        say!("{:#}", verdict(&loaded));
    }
    match loaded {
        Ok(_) if form.json => Ok(()),
        Ok(_) => {
            say!("no mistakes found");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// What is wrong, for machines.
fn verdict(loaded: &Result<Loaded, Error>) -> Value {
    let mistakes = match loaded {
        Ok(_) => Vec::new(),
        Err(Error::Invalid(complaints)) => {
            let mistake = |complaint: &settings::Complaint| {
                let mut origin = origin_json(&complaint.origin);
                origin["key"] = complaint.key.as_str().into();
                origin["reason"] = complaint.reason.as_str().into();
                origin
            };
            complaints.iter().map(mistake).collect()
        }
        Err(error @ (Error::File { .. } | Error::Layers(_))) => vec![json!({ "reason": error.to_string() })],
    };
    json!({ "ok": loaded.is_ok(), "mistakes": mistakes })
}

fn origin_json(origin: &Origin) -> Value {
    match origin {
        Origin::Default => json!({ "from": "defaults" }),
        Origin::File { path, line } => {
            json!({ "from": "file", "file": path.display().to_string(), "line": line })
        }
        Origin::Variable(name) => json!({ "from": "variable", "variable": name }),
        Origin::Flag(flag) => json!({ "from": "flag", "flag": flag }),
    }
}

fn show(settings: &Settings, as_json: bool) {
    if as_json {
        say!("{:#}", serde_json::to_value(settings).unwrap_or_default());
        return;
    }
    for (key, value) in settings.entries() {
        match value {
            Value::Null => say!("# {key} is not set"),
            value => say!("{key} = {value}"),
        }
    }
}

fn explain(asked: &str, form: &Form) -> anyhow::Result<()> {
    let loaded = form.load()?;
    let keys: Vec<Key> = Settings::sections().into_iter().flat_map(|section| section.keys).collect();
    let inside = format!("{asked}.");
    let (found, several): (Vec<&Key>, bool) = match keys.iter().find(|key| key.name == asked) {
        Some(key) => (vec![key], false),
        None => (keys.iter().filter(|key| key.name.starts_with(&inside)).collect(), true),
    };
    if found.is_empty() {
        let nearest = Settings::nearest_key(asked).unwrap_or_default();
        bail!("there is no key or section {asked}; did you mean {nearest}?");
    }
    let values = loaded.settings.entries();
    let value_of =
        |key: &Key| values.iter().find(|(name, _)| *name == key.name).map(|(_, value)| value.clone());
    let told = found.into_iter().map(|key| Told {
        key,
        value: value_of(key).unwrap_or_default(),
        origin: loaded.origin(&key.name),
    });
    if form.json {
        let all: Vec<Value> = told.map(|told| told.json()).collect();
        say!("{:#}", Value::from(all));
        return Ok(());
    }
    for told in told {
        told.print();
        if several {
            say!();
        }
    }
    Ok(())
}

/// A key as `explain` tells it.
struct Told<'a> {
    key: &'a Key,
    value: Value,
    origin: Origin,
}

impl Told<'_> {
    fn print(&self) {
        let Self { key, value, origin } = self;
        say!("{}", Paint::stdout().bold(&key.name));
        say!("  {}", key.description);
        let mut table = Table::new([Align::Left; 2]);
        let mut row = |name: &str, text: String| table.row([name.to_owned(), text]);
        row("values", key.values.clone());
        row("default", or_not_set(&key.default));
        row("now", format!("{} ({origin})", or_not_set(value)));
        row("variable", key.variable.clone());
        if let Some(flag) = flag_of(&key.name) {
            row("flag", flag);
        }
        table.lines().for_each(|line| say!("{line}"));
    }

    fn json(&self) -> Value {
        let Key { name, description, values, default, variable } = self.key;
        json!({
            "key": name,
            "description": description,
            "values": values,
            "default": default,
            "value": self.value,
            "origin": origin_json(&self.origin),
            "variable": variable,
            "flag": flag_of(name),
        })
    }
}

fn or_not_set(value: &Value) -> String {
    if value.is_null() { "not set".to_owned() } else { value.to_string() }
}

/// The flag that sets a key.
fn flag_of(key: &str) -> Option<String> {
    let mut settings = Settings::default();
    settings.model.path = Some("DIR".into());
    settings.model.name = Some("NAME".into());
    settings.model.window_keys = Some(1);
    settings.model.preset = Some(model::Preset::NorthMiniCode);
    settings.model.layers = Some(1);
    settings.group.expert_placement = Some("FILE".into());
    settings.group.threads = Some(1);
    let file = || Some("FILE".into());
    let tls = || settings::Tls { certificate: file(), key: file(), client_ca: file() };
    (settings.router.tls, settings.group.tls) = (tls(), tls());
    (settings.router.keys_file, settings.cluster.secret_file) = (file(), file());
    let jwt = &mut settings.router.jwt;
    (jwt.jwks_file, jwt.issuers, jwt.audiences) = (file(), vec![String::new()], vec![String::new()]);
    (jwt.requests_per_minute, jwt.tokens_per_minute) = (Some(1), Some(1));
    (jwt.concurrency, jwt.priority_min) = (Some(1), Some(0));
    settings.cluster.tls = settings::ClusterTls { ca: file(), certificate: file(), key: file() };
    settings.group.fault_dir = Some("DIR".into());
    settings.group.routers = vec!["URL".to_owned()];
    (settings.group.advertise, settings.group.routers_ca) = (Some("URL".to_owned()), file());
    let groups: [&dyn ConfigFlags; 4] = [
        &args::ModelFlags::from(&settings),
        &args::ComputeFlags::from(&settings),
        &args::GroupFlags::from(&settings),
        &args::RouterFlags::from(&settings),
    ];
    let own = [
        ("router.workers", "--workers"),
        ("router.weights", "--weights"),
        ("group.hosts", "--hosts"),
        ("cluster.groups", "--groups"),
        ("cluster.weights", "--group-weights"),
    ];
    let shared = groups.iter().flat_map(|group| group.flags()).map(|flag| (flag.key, flag.flag));
    shared.chain(own).find(|(of, _)| *of == key).map(|(_, flag)| flag.to_owned())
}

fn diff(against: &[std::path::PathBuf], form: &Form) -> anyhow::Result<()> {
    let loaded = form.load()?;
    let other = if against.is_empty() {
        Settings::default()
    } else {
        Settings::load(&Sources { files: against.to_vec(), ..Sources::default() })?
    };
    let pairs = other.entries().into_iter().zip(loaded.settings.entries());
    let changed: Vec<_> = pairs.filter(|(before, after)| before.1 != after.1).collect();
    if form.json {
        let each = changed.iter().map(|((key, before), (_, after))| {
            json!({ "key": key, "before": before, "after": after, "origin": origin_json(&loaded.origin(key)) })
        });
        say!("{:#}", each.collect::<Value>());
        return Ok(());
    }
    if changed.is_empty() {
        say!("no key differs");
        return Ok(());
    }
    let mut table = Table::new([Align::Left; 5]);
    for ((key, before), (_, after)) in &changed {
        let origin = loaded.origin(key).to_string();
        table.row([key.clone(), or_not_set(before), "→".into(), or_not_set(after), origin]);
    }
    table.lines().for_each(|line| say!("{line}"));
    Ok(())
}
