//! The flight recorder: what the last steps of a group were like, for when it fails and for whoever asks.

use std::fs::{self, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::{Load, StepPlan};
use proto::worker::StepRecord;
use serde_json::{Value, json};
use types::Micros;

/// Steps that are kept.
pub const STEPS_KEPT: usize = 2048;
/// Dumps that are kept in a directory: a group that fails again and again does not fill the disk.
const DUMPS_KEPT: usize = 8;
/// How the files begin.
const DUMP_PREFIX: &str = "cohort-steps-";

/// One step. A plain value, so that keeping it allocates nothing.
#[derive(Debug, Clone, Copy, Default)]
struct Record {
    step: u64,
    planned: Micros,
    prefill_rows: u32,
    decode_rows: u32,
    logit_rows: u32,
    running: u32,
    waiting: u32,
    kv_free: [u32; 2],
    plan_us: u32,
    gap_us: Option<u32>,
    idle_us: Option<u32>,
    step_us: Option<u32>,
}

#[derive(Debug, Default)]
struct Ring {
    /// Step `n` is at `(n - 1) % STEPS_KEPT`.
    records: Vec<Record>,
    /// Rows of each sub-group, those of one step after those of another, in the places of `records`.
    rows: Vec<u32>,
    sub_groups: usize,
    /// Slots of a sub-group.
    slots: u32,
    /// Steps there have been.
    steps: u64,
}

/// The last [`STEPS_KEPT`] steps of a group. Written by the engine's thread, read by anybody at any time: also while that
/// thread is stuck.
#[derive(Debug, Default)]
pub struct FlightRecorder(Mutex<Ring>);

impl FlightRecorder {
    /// Makes room for the steps of an engine with this configuration; later calls allocate nothing.
    pub fn begin(&self, config: &engine::Config) {
        let sub_groups = config.data_parallel as usize;
        let rows = vec![0; STEPS_KEPT * sub_groups];
        let records = vec![Record::default(); STEPS_KEPT];
        *self.ring() = Ring { records, rows, sub_groups, slots: config.running_max, steps: 0 };
    }

    /// Takes note of a step that was planned at `now`, which took `plan_time` and left the engine with `load`.
    pub fn planned(&self, plan: &StepPlan, load: &Load, plan_time: Duration, now: Micros) {
        let mut ring = self.ring();
        let Ring { records, rows, sub_groups, slots, steps } = &mut *ring;
        let at = place(plan.step());
        let Some(record) = records.get_mut(at) else { return };
        let [full, sliding] = [0, 1].map(|group| load.blocks[group] - load.blocks_used[group]);
        *record = Record {
            step: plan.step(),
            planned: now,
            running: load.running,
            waiting: load.waiting,
            kv_free: [full, sliding],
            plan_us: micros(plan_time),
            ..Record::default()
        };
        let rows = &mut rows[at * *sub_groups..(at + 1) * *sub_groups];
        rows.fill(0);
        for sequence in plan.sequences() {
            let own = u32::try_from(sequence.rows.len()).unwrap_or(u32::MAX);
            rows[(sequence.slot.0 / *slots) as usize] += own;
            record.logit_rows += sequence.logit_rows;
            let decodes = own == 1 && sequence.logit_rows == 1;
            *if decodes { &mut record.decode_rows } else { &mut record.prefill_rows } += own;
        }
        *steps = plan.step();
    }

    /// Takes note of a step that has run: how long the executor waited for it, when there was work all the time, how long the
    /// device had nothing to do, where that is known, and how long it took.
    pub fn ran(&self, step: u64, (gap, idle): (Option<Duration>, Option<Duration>), took: Duration) {
        let mut ring = self.ring();
        let Some(record) = ring.records.get_mut(place(step)).filter(|one| one.step == step) else { return };
        record.gap_us = gap.map(micros);
        record.idle_us = idle.filter(|_| gap.is_some()).map(micros);
        record.step_us = Some(micros(took));
    }

    /// The last `most` steps, the oldest first.
    #[must_use]
    pub fn last(&self, most: usize) -> Vec<StepRecord> {
        // Copied, so that the engine's thread waits for no more than that.
        let (records, rows, sub_groups, steps) = {
            let ring = self.ring();
            (ring.records.clone(), ring.rows.clone(), ring.sub_groups, ring.steps)
        };
        let kept = steps.min(most.min(STEPS_KEPT) as u64);
        let one = |step| {
            let at = place(step);
            wire(&records[at], &rows[at * sub_groups..(at + 1) * sub_groups])
        };
        (steps + 1 - kept..=steps).map(one).collect()
    }

    /// Writes all steps that are kept into a new file in `directory` (the system's for temporary files when there is none),
    /// one JSON object a line behind one with the reason; to stderr when that is impossible. A group that has run no
    /// step writes nothing.
    pub(crate) fn dump(&self, directory: Option<&Path>, model: &str, why: &str) {
        let steps = self.last(STEPS_KEPT);
        if steps.is_empty() {
            return;
        }
        let directory = directory.map_or_else(std::env::temp_dir, Path::to_owned);
        let head = json!({ "fault": why, "model": model, "pid": std::process::id(), "steps": steps.len() });
        match write_file(&directory, &head, &steps) {
            Ok(path) => {
                tracing::error!(path = %path.display(), steps = steps.len(), "the last steps are written down");
            }
            Err(error) => {
                tracing::error!(directory = %directory.display(), %error, "the last steps follow here");
                // There is nowhere left to complain.
                let _ = write_lines(&mut io::stderr().lock(), &head, &steps);
            }
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes down the last steps when the thread that holds it panics.
pub(crate) struct DumpOnPanic<'a> {
    pub(crate) flight: &'a FlightRecorder,
    pub(crate) config: &'a crate::Config,
}

impl Drop for DumpOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { flight, config } = self;
            flight.dump(config.fault_dir.as_deref(), &config.model_name, "a thread panicked");
        }
    }
}

/// A step as one flat JSON object; what is not known is null.
#[must_use]
pub fn step_json(step: &StepRecord) -> Value {
    json!({
        "step": step.step,
        "planned_us": step.planned_us,
        "prefill_rows": step.prefill_rows,
        "decode_rows": step.decode_rows,
        "logit_rows": step.logit_rows,
        "sub_group_rows": step.sub_group_rows,
        "running": step.running,
        "waiting": step.waiting,
        "kv_free_full": step.kv_free_full,
        "kv_free_sliding": step.kv_free_sliding,
        "plan_us": step.plan_us,
        "gap_us": step.gap_us,
        "idle_us": step.idle_us,
        "step_us": step.step_us,
    })
}

/// Where a ring keeps step `step`, which is at least 1.
fn place(step: u64) -> usize {
    usize::try_from(step.saturating_sub(1) % STEPS_KEPT as u64).unwrap_or(0)
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

fn wire(record: &Record, rows: &[u32]) -> StepRecord {
    StepRecord {
        step: record.step,
        planned_us: record.planned.0,
        prefill_rows: record.prefill_rows,
        decode_rows: record.decode_rows,
        logit_rows: record.logit_rows,
        sub_group_rows: rows.to_vec(),
        running: record.running,
        waiting: record.waiting,
        kv_free_full: record.kv_free[0],
        kv_free_sliding: record.kv_free[1],
        plan_us: record.plan_us,
        gap_us: record.gap_us,
        idle_us: record.idle_us,
        step_us: record.step_us,
    }
}

fn write_file(directory: &Path, head: &Value, steps: &[StepRecord]) -> io::Result<PathBuf> {
    forget_oldest(directory)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let path = directory.join(format!("{DUMP_PREFIX}{now}-{}.jsonl", std::process::id()));
    let mut file = BufWriter::new(OpenOptions::new().write(true).create_new(true).open(&path)?);
    write_lines(&mut file, head, steps)?;
    file.flush()?;
    Ok(path)
}

fn write_lines(out: &mut impl Write, head: &Value, steps: &[StepRecord]) -> io::Result<()> {
    writeln!(out, "{head}")?;
    steps.iter().try_for_each(|step| writeln!(out, "{}", step_json(step)))
}

/// Leaves room for one more dump. Their names sort by time.
fn forget_oldest(directory: &Path) -> io::Result<()> {
    let dumps = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        entry.file_name().to_str()?.starts_with(DUMP_PREFIX).then(|| entry.path())
    };
    let mut dumps: Vec<PathBuf> = fs::read_dir(directory)?.filter_map(dumps).collect();
    dumps.sort_unstable();
    let excess = (dumps.len() + 1).saturating_sub(DUMPS_KEPT);
    for path in &dumps[..excess] {
        // Another group's of this machine may be gone already, and another user's stays.
        let _ = fs::remove_file(path);
    }
    Ok(())
}
