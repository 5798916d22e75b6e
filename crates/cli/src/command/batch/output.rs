//! The answers of a batch: a file that only grows, and that a killed batch leaves in a state to go on from.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::lines::Line;
use super::send::Answer;

/// A file of answers.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    file: File,
    done: HashSet<String>,
}

#[derive(Deserialize)]
struct Done {
    custom_id: String,
}

impl Output {
    /// Opens or makes the file and reads which requests it has answers to. A last line that was not written to its end
    /// is dropped.
    ///
    /// # Errors
    /// When the file cannot be used, another batch writes to it, or a line is no answer.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .with_context(|| format!("open {shown}"))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("{shown}: another batch writes to it");
        }
        let mut done = HashSet::new();
        let mut whole = 0;
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let bytes = reader.read_until(b'\n', &mut line).with_context(|| format!("read {shown}"))?;
            if bytes == 0 || line.last() != Some(&b'\n') {
                break;
            }
            let answer: Done = serde_json::from_slice(&line)
                .with_context(|| format!("{shown}: line {number} is not an answer of a batch"))?;
            done.insert(answer.custom_id);
            whole += bytes as u64;
        }
        drop(reader);
        file.set_len(whole).with_context(|| format!("drop the torn last line of {shown}"))?;
        file.seek(SeekFrom::End(0)).with_context(|| format!("seek in {shown}"))?;
        Ok(Self { path: path.to_owned(), file, done })
    }

    /// The `custom_id` of every request that has an answer.
    #[must_use]
    pub const fn done(&self) -> &HashSet<String> {
        &self.done
    }

    /// Adds an answer, in one write.
    pub(super) fn write(&mut self, line: &Line, answer: &Answer) -> anyhow::Result<()> {
        let quoted;
        // What is no JSON, as a proxy might answer, is kept as a text.
        let body = match serde_json::from_str::<&RawValue>(&answer.body) {
            Ok(body) => body.get(),
            Err(_) => {
                quoted = serde_json::to_string(&answer.body)?;
                &quoted
            }
        };
        let (id, custom_id) = (json!(format!("batch_req_{}", answer.request_id)), json!(line.custom_id));
        let (status, request_id) = (answer.status, json!(answer.request_id));
        // A body may be spread over lines; an answer is one.
        let body = body.replace(['\n', '\r'], " ");
        let text = format!(
            "{{\"id\":{id},\"custom_id\":{custom_id},\"response\":{{\"status_code\":{status},\"request_id\":{request_id},\
             \"body\":{body}}},\"error\":null}}\n"
        );
        self.file.write_all(text.as_bytes()).with_context(|| format!("write {}", self.path.display()))
    }

    /// Sees to it that everything is on the disk.
    pub(super) fn finish(&self) -> anyhow::Result<()> {
        self.file.sync_all().with_context(|| format!("write {}", self.path.display()))
    }
}
