//! The requests of a batch.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use types::limits::MESSAGE_BYTES_MAX;

/// Where a batch may go.
const URLS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v2/chat", "/cohere/v2/chat"];
/// A body of the largest size, and what is around it.
const LINE_BYTES_MAX: u64 = MESSAGE_BYTES_MAX as u64 + 4096;
/// Wrong lines that are told of at once.
const FAULTS_MAX: usize = 10;

/// One request.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// The caller's name for it.
    pub custom_id: String,
    /// Always POST.
    pub method: String,
    /// The path it goes to.
    pub url: String,
    /// Sent as it is written.
    pub body: Box<RawValue>,
}

/// The only field of a body that is looked at.
#[derive(Deserialize)]
struct Body {
    stream: Option<bool>,
}

impl Line {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let line: Self = serde_json::from_str(text)?;
        if line.custom_id.is_empty() {
            bail!("custom_id is empty");
        }
        if line.method != "POST" {
            bail!("method is {}; only POST is supported", line.method);
        }
        if !URLS.contains(&line.url.as_str()) {
            bail!("url is {}; it must be one of {}", line.url, URLS.join(", "));
        }
        let body: Body = serde_json::from_str(line.body.get()).context("body")?;
        if body.stream == Some(true) {
            bail!("body.stream is true; a batch has no streams");
        }
        Ok(line)
    }
}

/// A file whose every line is a request.
#[derive(Debug)]
pub struct Checked {
    ids: HashSet<String>,
}

impl Checked {
    /// Reads the whole file once, before anything is sent.
    ///
    /// # Errors
    /// When it cannot be read, a line is no request, or two have the same `custom_id`; the first wrong lines are named
    /// by their numbers.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let mut ids = HashSet::new();
        let mut faults = Vec::new();
        for (number, text) in numbered(path)? {
            let fault = match Line::parse(&text?) {
                Ok(line) if ids.contains(&line.custom_id) => {
                    format!("line {number}: custom_id `{}` is that of an earlier line", line.custom_id)
                }
                Ok(line) => {
                    ids.insert(line.custom_id);
                    continue;
                }
                Err(error) => format!("line {number}: {error:#}"),
            };
            faults.push(fault);
            if faults.len() == FAULTS_MAX {
                break;
            }
        }
        if !faults.is_empty() {
            bail!("{}: nothing was sent\n  {}", path.display(), faults.join("\n  "));
        }
        if ids.is_empty() {
            bail!("{}: there is no request in it", path.display());
        }
        Ok(Self { ids })
    }

    /// All of them by their `custom_id`.
    #[must_use]
    pub const fn ids(&self) -> &HashSet<String> {
        &self.ids
    }
}

/// The lines that are not blank, with their numbers from 1.
fn numbered(path: &Path) -> anyhow::Result<impl Iterator<Item = (usize, anyhow::Result<String>)> + use<>> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut reader = BufReader::new(file);
    let mut number = 0;
    let shown = path.display().to_string();
    Ok(std::iter::from_fn(move || {
        loop {
            number += 1;
            let line = read_line(&mut reader).with_context(|| format!("{shown}: line {number}"));
            match line {
                Ok(None) => return None,
                Ok(Some(line)) if line.trim().is_empty() => {}
                Ok(Some(line)) => return Some((number, Ok(line))),
                Err(error) => return Some((number, Err(error))),
            }
        }
    }))
}

fn read_line(reader: &mut impl BufRead) -> anyhow::Result<Option<String>> {
    let mut bytes = Vec::new();
    reader.take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut bytes)?;
    if bytes.len() as u64 > LINE_BYTES_MAX {
        bail!("has more than {LINE_BYTES_MAX} bytes");
    }
    if bytes.is_empty() {
        return Ok(None);
    }
    String::from_utf8(bytes).map(Some).map_err(|error| anyhow!("is not UTF-8: {error}"))
}

/// The requests that are not `done`, read as they are asked for on a thread of their own; ends early with `stop`.
pub(super) fn stream(
    path: &Path,
    done: HashSet<String>,
    stop: CancellationToken,
) -> anyhow::Result<mpsc::Receiver<anyhow::Result<Line>>> {
    let (give, take) = mpsc::channel(1);
    let lines = numbered(path)?;
    let read = move || {
        for (number, text) in lines {
            let line = text.and_then(|text| Line::parse(&text).with_context(|| format!("line {number}")));
            let wanted = !line.as_ref().is_ok_and(|line| done.contains(&line.custom_id));
            if stop.is_cancelled() || (wanted && give.blocking_send(line).is_err()) {
                return;
            }
        }
    };
    std::thread::Builder::new().name("batch-input".into()).spawn(read).context("start the reader")?;
    Ok(take)
}
