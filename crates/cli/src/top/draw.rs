//! How a person sees it.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Table};
use types::Bytes;

use super::cluster::{Cluster, Endpoint, Group, Rank, Router};

/// What a person chose to see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shown {
    /// Whether the ranks of each group are shown.
    pub ranks: bool,
    /// Lines of the groups that are scrolled away.
    pub scrolled: usize,
    /// Whether there are colours.
    pub colours: bool,
}

const GOOD: Color = Color::Green;
const BAD: Color = Color::Red;
const WARN: Color = Color::Yellow;
/// Share of the KV blocks above which sequences soon wait for memory.
const KV_FULL: f64 = 0.95;
/// Share of a router's places above which it soon refuses.
const PLACES_FULL: f64 = 0.9;

/// Draws the whole screen.
pub fn draw(frame: &mut Frame<'_>, cluster: &Cluster, shown: Shown) {
    let routers = u16::try_from(cluster.routers.len()).unwrap_or(u16::MAX).saturating_add(3);
    let parts =
        [Constraint::Length(1), Constraint::Length(routers), Constraint::Min(3), Constraint::Length(1)];
    let [head, routers, groups, foot] = Layout::vertical(parts).areas(frame.area());
    let pen = Pen(shown.colours);
    frame.render_widget(Paragraph::new(summary(cluster, pen)), head);
    draw_routers(frame, routers, cluster, pen);
    draw_groups(frame, groups, cluster, shown);
    let keys = " q quit   r ranks   ↑ ↓ scroll";
    frame.render_widget(Paragraph::new(Span::styled(keys, pen.dim())), foot);
}

/// Colours, or none.
#[derive(Debug, Clone, Copy)]
struct Pen(bool);

impl Pen {
    fn of(self, colour: Color) -> Style {
        if self.0 { Style::new().fg(colour) } else { Style::new() }
    }

    const fn dim(self) -> Style {
        if self.0 { Style::new().add_modifier(Modifier::DIM) } else { Style::new() }
    }

    const fn bold(self) -> Style {
        if self.0 { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() }
    }

    /// A value that is worth a look when it is too high.
    fn above(self, high: bool, colour: Color) -> Style {
        if high { self.of(colour) } else { Style::new() }
    }
}

fn summary(cluster: &Cluster, pen: Pen) -> Line<'static> {
    let up = cluster.groups.iter().filter(|group| group.shows.as_ref().is_some_and(serves)).count();
    let (all, tokens) = (cluster.groups.len(), cluster.total(|group| group.output_tokens_per_s));
    let sum = |of: fn(&Group) -> f64| cluster.total(|group| Some(of(group))).unwrap_or(0.0);
    Line::from(vec![
        Span::styled(" cohort top", pen.bold()),
        Span::raw(format!("   {} router(s)   ", cluster.routers.len())),
        Span::styled(
            format!("{up} of {all} group(s) serve"),
            pen.of(if up == all && all > 0 { GOOD } else { BAD }),
        ),
        Span::raw(format!(
            "   {} tokens/s   {} running   {} waiting",
            rate(tokens),
            count(sum(|group| group.running)),
            count(sum(|group| group.waiting)),
        )),
    ])
}

fn serves(group: &Group) -> bool {
    group.phase == "serving"
}

fn heading(columns: &[&'static str], pen: Pen) -> Row<'static> {
    let cells = columns.iter().enumerate().map(|(at, column)| right(at, (*column).to_owned()));
    Row::new(cells.collect::<Vec<_>>()).style(pen.dim())
}

/// The first column is text, the others are numbers.
fn right(at: usize, text: String) -> Cell<'static> {
    let line = Line::from(text);
    Cell::from(if at == 0 { line } else { line.right_aligned() })
}

fn widths(numbers: &[u16]) -> Vec<Constraint> {
    let first = Constraint::Min(24);
    std::iter::once(first).chain(numbers.iter().map(|width| Constraint::Length(*width))).collect()
}

/// The rest of a line whose endpoint does not answer.
fn down<T>(endpoint: &Endpoint<T>, pen: Pen) -> Option<Line<'static>> {
    let why = endpoint.down.as_ref()?;
    let text = format!(" {}  DOWN: {why}", endpoint.address);
    Some(Line::from(Span::styled(text, pen.of(BAD))))
}

fn draw_routers(frame: &mut Frame<'_>, area: Rect, cluster: &Cluster, pen: Pen) {
    const COLUMNS: [&str; 9] =
        [" router", "open", "of", "req/s", "fail/s", "tokens/s", "first p50", "first p99", "groups"];
    let block = Block::new().borders(Borders::TOP).title(" Routers ");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let mut rows = vec![Entry::Row(heading(&COLUMNS, pen))];
    for router in &cluster.routers {
        rows.push(match (&router.shows, down(router, pen)) {
            (Some(shows), _) => Entry::Row(router_row(&router.address, shows, pen)),
            (None, Some(line)) => Entry::Line(line),
            (None, None) => continue,
        });
    }
    place(frame, inner, rows, &widths(&[7, 7, 8, 8, 9, 10, 10, 8]));
}

fn router_row(address: &str, router: &Router, pen: Pen) -> Row<'static> {
    let full = router.requests_open >= router.requests_open_max * PLACES_FULL;
    let failing = router.failures_per_s.is_some_and(|rate| rate > 0.0);
    Row::new(vec![
        Cell::from(format!(" {address}")),
        right(1, count(router.requests_open)).style(pen.above(full, WARN)),
        right(2, count(router.requests_open_max)),
        right(3, rate(router.requests_per_s)),
        right(4, rate(router.failures_per_s)).style(pen.above(failing, BAD)),
        right(5, rate(router.output_tokens_per_s)),
        right(6, time(router.first_message.p50_s)),
        right(7, time(router.first_message.p99_s)),
        right(8, format!("{}/{}", router.groups_up, router.groups))
            .style(pen.above(router.groups_up < router.groups, BAD)),
    ])
}

fn draw_groups(frame: &mut Frame<'_>, area: Rect, cluster: &Cluster, shown: Shown) {
    const COLUMNS: [&str; 10] =
        [" group", "phase", "run", "wait", "KV", "tokens/s", "prompt/s", "first p50", "token p50", "gap p99"];
    let pen = Pen(shown.colours);
    let block = Block::new().borders(Borders::TOP).title(" Groups ");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let mut rows = vec![Entry::Row(heading(&COLUMNS, pen))];
    for group in cluster.groups.iter().skip(shown.scrolled) {
        match (&group.shows, down(group, pen)) {
            (Some(shows), _) => {
                rows.push(Entry::Row(group_row(&group.address, shows, pen)));
                let ranks = shows.ranks.iter().filter(|_| shown.ranks);
                rows.extend(ranks.map(|rank| Entry::Line(rank_line(rank, pen))));
            }
            (None, Some(line)) => rows.push(Entry::Line(line)),
            (None, None) => {}
        }
    }
    if cluster.groups.is_empty() {
        let text = " none known: groups serve metrics with --metrics-listen, and routers tell where";
        rows.push(Entry::Line(Line::from(Span::styled(text, pen.dim()))));
    }
    place(frame, inner, rows, &widths(&[9, 6, 6, 6, 9, 9, 10, 10, 9]));
}

fn group_row(address: &str, group: &Group, pen: Pen) -> Row<'static> {
    let paused = serves(group) && group.weight == Some(0.0);
    let phase = match (group.phase.as_str(), group.percent) {
        ("loading", percent) => format!("load {percent:.0}%"),
        ("serving", _) if paused => "weight 0".to_owned(),
        (phase, _) => phase.to_owned(),
    };
    Row::new(vec![
        Cell::from(format!(" {address}")),
        right(1, phase).style(pen.of(if serves(group) && !paused { GOOD } else { WARN })),
        right(2, count(group.running)),
        right(3, count(group.waiting)).style(pen.above(group.waiting > 0.0, WARN)),
        right(4, percent(Some(group.kv_usage))).style(pen.above(group.kv_usage > KV_FULL, BAD)),
        right(5, rate(group.output_tokens_per_s)),
        right(6, rate(group.prompt_tokens_per_s)),
        right(7, time(group.first_token.p50_s)),
        right(8, time(group.between_tokens.p50_s)),
        right(9, time(group.host_gap.p99_s)),
    ])
}

fn rank_line(rank: &Rank, pen: Pen) -> Line<'static> {
    let bytes = rank.sent_bytes_per_s.map_or_else(nothing, |bytes| format!("{}/s", Bytes(bytes as u64)));
    let text = format!(
        "   rank {:<3} {:>9} rows/s   {:>4} of the time in collectives   sends {bytes}",
        rank.rank,
        rate(rank.rows_per_s),
        percent(rank.collective_share),
    );
    Line::from(Span::styled(text, pen.dim()))
}

/// A line of a table: with columns, or as long as it is.
enum Entry {
    Row(Row<'static>),
    Line(Line<'static>),
}

/// One below the other, as far as there is room.
fn place(frame: &mut Frame<'_>, area: Rect, entries: Vec<Entry>, widths: &[Constraint]) {
    for (y, entry) in (area.top()..area.bottom()).zip(entries) {
        let line = Rect { y, height: 1, ..area };
        match entry {
            Entry::Row(row) => frame.render_widget(Table::new([row], widths.to_vec()), line),
            Entry::Line(text) => frame.render_widget(Paragraph::new(text), line),
        }
    }
}

fn nothing() -> String {
    "–".to_owned()
}

fn count(number: f64) -> String {
    format!("{number:.0}")
}

/// Three digits and a unit.
fn rate(rate: Option<f64>) -> String {
    match rate {
        None => nothing(),
        Some(rate) if rate >= 999_500.0 => format!("{:.2}M", rate / 1e6),
        Some(rate) if rate >= 9_995.0 => format!("{:.1}k", rate / 1e3),
        Some(rate) if rate >= 99.95 => format!("{rate:.0}"),
        Some(rate) => format!("{rate:.1}"),
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(nothing, |share| format!("{:.0}%", share * 100.0))
}

fn time(seconds: Option<f64>) -> String {
    match seconds {
        None => nothing(),
        Some(seconds) if seconds < 0.001 => format!("{:.0} µs", seconds * 1e6),
        Some(seconds) if seconds < 1.0 => format!("{:.1} ms", seconds * 1e3),
        Some(seconds) => format!("{seconds:.2} s"),
    }
}
