//! What a person sees while ranks start: bars on a terminal, plain lines elsewhere. All of it on stderr.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use types::Bytes;

use crate::out::write_note;
use crate::report::{Event, Line, Loaded, Phase};
use crate::style::Paint;

/// Plain lines report loading in steps of this many percent.
const PERCENT_STEP: u64 = 25;

/// A rank among the groups of this machine.
type Key = (u32, u32);

/// Progress of every rank.
pub(crate) struct Progress {
    bars: Option<MultiProgress>,
    ranks: BTreeMap<Key, Rank>,
    paint: Paint,
    one_group: bool,
}

#[derive(Default)]
struct Rank {
    bar: Option<ProgressBar>,
    /// The phase and the share of it that was last printed as a line.
    printed: Option<(Phase, u64)>,
}

impl Progress {
    /// For this many groups.
    pub(crate) fn new(groups: u32) -> Self {
        let bars = io::stderr().is_terminal().then(MultiProgress::new);
        Self { bars, ranks: BTreeMap::new(), paint: Paint::stderr(), one_group: groups == 1 }
    }

    /// A rank said something.
    pub(crate) fn report(&mut self, group: u32, line: &Line) {
        let key = (group, line.rank.unwrap_or(0));
        match &line.event {
            Event::Phase { phase, done, total } => self.phase(key, *phase, *done, *total),
            Event::Loaded(loaded) => self.loaded(key, loaded),
            Event::Ready { .. } => self.settle(key),
            Event::Rendezvous { .. }
            | Event::Listening { .. }
            | Event::Alive
            | Event::Serving(_)
            | Event::Configured { .. }
            | Event::Failed { .. } => {}
        }
    }

    /// Prints a line above the bars.
    pub(crate) fn print(&self, text: &str) {
        match &self.bars {
            Some(bars) => _ = bars.println(text),
            None => write_note(format_args!("{text}")),
        }
    }

    /// Prints a line on stdout, for people and scripts. A cluster goes on when nobody reads it.
    pub(crate) fn announce(&self, text: &str) {
        let print = || _ = writeln!(io::stdout(), "{text}");
        match &self.bars {
            Some(bars) => bars.suspend(print),
            None => print(),
        }
    }

    /// Takes a group's bars away: it is gone.
    pub(crate) fn forget(&mut self, group: u32) {
        let keys: Vec<Key> = self.ranks.keys().filter(|(of, _)| *of == group).copied().collect();
        for key in keys {
            self.settle(key);
            self.ranks.remove(&key);
        }
    }

    fn name(&self, (group, rank): Key) -> String {
        if self.one_group { format!("rank {rank}") } else { format!("group {group} rank {rank}") }
    }

    fn phase(&mut self, key: Key, phase: Phase, done: u64, total: u64) {
        let started = matches!(phase, Phase::Serving | Phase::Draining);
        if started && self.bars.is_some() {
            self.settle(key);
            return;
        }
        let name = self.name(key);
        let rank = self.ranks.entry(key).or_default();
        if let Some(bars) = &self.bars {
            let bar = rank.bar.get_or_insert_with(|| new_bar(bars, name));
            bar.set_message(phase.name());
            bar.set_style(style(total > 0));
            if total > 0 {
                bar.set_length(total);
                bar.set_position(done);
            }
            return;
        }
        let share = (done * 100).checked_div(total).unwrap_or(0) / PERCENT_STEP * PERCENT_STEP;
        if rank.printed == Some((phase, share)) {
            return;
        }
        rank.printed = Some((phase, share));
        let counted = match total {
            0 => String::new(),
            _ => format!(" {share:>3} %  {} of {}", Bytes(done), Bytes(total)),
        };
        self.print(&format!("{name}  {}{counted}", phase.name()));
    }

    fn loaded(&mut self, key: Key, loaded: &Loaded) {
        let seconds = Duration::from_millis(loaded.elapsed_ms).as_secs_f64();
        let summary = format!(
            "{}  {} resident  {} read in {seconds:.2} s  {} tensors  {}",
            self.paint.bold(self.name(key)),
            Bytes(loaded.resident),
            Bytes(loaded.read),
            loaded.tensors,
            self.paint.dim(&loaded.device),
        );
        self.print(&summary);
        // Every rank leaves them alone; one line says so.
        if key.1 == 0 && loaded.skipped_tensors > 0 {
            let (count, bytes) = (loaded.skipped_tensors, Bytes(loaded.skipped_bytes));
            self.print(&format!(
                "{}  {count} vision tensors ({bytes}) skipped: text only",
                self.paint.bold(self.name(key))
            ));
        }
    }

    fn settle(&mut self, key: Key) {
        if let Some(bar) = self.ranks.get_mut(&key).and_then(|rank| rank.bar.take()) {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(bars: &MultiProgress, name: String) -> ProgressBar {
    bars.add(ProgressBar::new(0)).with_style(style(false)).with_prefix(name)
}

/// A phase that counts bytes is shown with how many, others by name only.
fn style(counted: bool) -> ProgressStyle {
    let template = if counted {
        "{prefix}  {bar:24.cyan/dim}  {bytes:>10} of {total_bytes:<10}  {binary_bytes_per_sec:>12}  {msg}"
    } else {
        "{prefix}  {msg}"
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("━╸─")
}
