//! The terminal: it is given back as it was, however this ends.

use std::io::IsTerminal;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use anyhow::{Context, bail};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::scrape::Scraper;
use crate::style;
use crate::top::{Cluster, Shown, draw};

/// How long a key may wait to be seen.
const KEY_INTERVAL: Duration = Duration::from_millis(100);
/// The screen that lines are drawn on.
const LINE_WIDTH: u16 = 120;
/// Lines of it beside those of routers and groups.
const FRAME_LINES: usize = 7;

/// Shows the cluster until somebody presses q, or the process is told to stop.
pub(super) fn run(
    runtime: &Runtime,
    scraper: Scraper,
    interval: Duration,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    if !std::io::stdout().is_terminal() {
        bail!("stdout is no terminal; use --once, or --json");
    }
    let (say, heard) = sync_channel(1);
    let looking = runtime.spawn(stop.clone().run_until_cancelled_owned(look(scraper, interval, say)));
    // Restores the terminal on a panic too.
    let terminal = ratatui::try_init().context("take over the terminal")?;
    let shown = show(terminal, &heard, stop);
    ratatui::restore();
    looking.abort();
    shown
}

/// Looks again and again; one that nobody has seen yet is waited for.
async fn look(mut scraper: Scraper, interval: Duration, say: SyncSender<Cluster>) {
    let mut before = None;
    loop {
        let now = scraper.scrape().await;
        let cluster = Cluster::between(before.as_ref(), &now);
        before = Some(now);
        // A screen that is behind sees the next one.
        if let Err(std::sync::mpsc::TrySendError::Disconnected(_)) = say.try_send(cluster) {
            return;
        }
        tokio::time::sleep(interval).await;
    }
}

fn show(
    mut terminal: ratatui::DefaultTerminal,
    heard: &Receiver<Cluster>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut cluster = Cluster::default();
    let mut shown = Shown { colours: style::colours(true), ..Shown::default() };
    loop {
        terminal.draw(|frame| draw(frame, &cluster, shown)).context("draw the screen")?;
        if stop.is_cancelled() {
            return Ok(());
        }
        while event::poll(Duration::ZERO).context("read the keyboard")? {
            match event::read().context("read the keyboard")? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    let control = key.modifiers.contains(KeyModifiers::CONTROL);
                    match key.code {
                        KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                        KeyCode::Char('c') if control => return Ok(()),
                        KeyCode::Char('r') => shown.ranks = !shown.ranks,
                        KeyCode::Down | KeyCode::Char('j') => {
                            let last = cluster.groups.len().saturating_sub(1);
                            shown.scrolled = (shown.scrolled + 1).min(last);
                        }
                        KeyCode::Up | KeyCode::Char('k') => shown.scrolled = shown.scrolled.saturating_sub(1),
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        match heard.recv_timeout(KEY_INTERVAL) {
            Ok(news) => cluster = news,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// The same picture as lines of text, without colours and keys.
pub(super) fn lines(cluster: &Cluster) -> Vec<String> {
    let ranks: usize =
        cluster.groups.iter().filter_map(|group| group.shows.as_ref()).map(|of| of.ranks.len()).sum();
    let height = cluster.routers.len() + cluster.groups.len() + ranks + FRAME_LINES;
    let backend = TestBackend::new(LINE_WIDTH, u16::try_from(height).unwrap_or(u16::MAX));
    let Ok(mut terminal) = Terminal::new(backend);
    let shown = Shown { ranks: true, ..Shown::default() };
    let Ok(_) = terminal.draw(|frame| draw(frame, cluster, shown));
    let buffer = terminal.backend().buffer();
    let width = usize::from(LINE_WIDTH);
    let text = |cells: &[ratatui::buffer::Cell]| cells.iter().map(|cell| cell.symbol()).collect::<String>();
    let mut lines: Vec<String> =
        buffer.content().chunks(width).map(|cells| text(cells).trim_end().to_owned()).collect();
    // The line that names the keys.
    lines.pop();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines
}
