//! One metrics page, as text: OpenMetrics, or the older form of Prometheus.

use std::collections::BTreeMap;

/// The samples of a page.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Page {
    samples: Vec<Line>,
}

/// One line.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

/// A line that is no sample.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} is not a metric: {text}")]
pub struct Unread {
    /// Its number, from 1.
    pub line: usize,
    /// Its beginning.
    pub text: String,
}

/// Characters of a line that an error shows.
const SHOWN: usize = 80;

impl Page {
    /// Reads a page.
    ///
    /// # Errors
    /// The first line that is neither a comment nor a sample.
    pub fn parse(text: &str) -> Result<Self, Unread> {
        let mut samples = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let unread = || Unread { line: index + 1, text: line.chars().take(SHOWN).collect() };
            samples.push(sample(line).ok_or_else(unread)?);
        }
        Ok(Self { samples })
    }

    fn of<'a>(&'a self, name: &'a str, labels: &'a [(&'a str, &'a str)]) -> impl Iterator<Item = &'a Line> {
        let fits = move |line: &&Line| {
            line.name == name && labels.iter().all(|(key, value)| line.label(key) == Some(value))
        };
        self.samples.iter().filter(fits)
    }

    /// The sum of the samples with this name and, among others, these labels; `None` when there are none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.of(name, labels).map(|line| line.value).reduce(|sum, value| sum + value)
    }

    /// The values of one label over the samples with this name whose value is not 0.
    pub fn labels<'a>(&'a self, name: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.of(name, &[]).filter(|line| line.value != 0.0).filter_map(move |line| line.label(key))
    }

    /// The value of label `key` of the sample whose label `of` is `value`.
    #[must_use]
    pub fn label_of(&self, name: &str, (of, value): (&str, &str), key: &str) -> Option<&str> {
        self.samples.iter().find(|line| line.name == name && line.label(of) == Some(value))?.label(key)
    }

    /// A histogram's counts up to and including each bound, over all samples with these labels.
    #[must_use]
    pub fn buckets(&self, name: &str, labels: &[(&str, &str)]) -> Vec<(f64, f64)> {
        let mut counts: BTreeMap<u64, f64> = BTreeMap::new();
        for line in self.of(&format!("{name}_bucket"), labels) {
            let Some(bound) = line.label("le").and_then(number) else { continue };
            // Bounds are above 0, so their bits are in their order.
            *counts.entry(bound.to_bits()).or_default() += line.value;
        }
        counts.into_iter().map(|(bits, count)| (f64::from_bits(bits), count)).collect()
    }
}

impl Line {
    fn label(&self, key: &str) -> Option<&str> {
        self.labels.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

/// `name value`, `name{label="text",…} value`, either with a timestamp or an exemplar behind.
fn sample(line: &str) -> Option<Line> {
    let name_end = line.find(|c: char| c == '{' || c.is_ascii_whitespace())?;
    let (name, mut rest) = line.split_at(name_end);
    if name.is_empty() {
        return None;
    }
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(behind) = rest.strip_prefix('}') {
                rest = behind;
                break;
            }
            let (key, behind) = rest.split_once("=\"")?;
            let (value, behind) = quoted(behind)?;
            labels.push((key.trim().to_owned(), value));
            rest = behind;
        }
    }
    let value = number(rest.split_ascii_whitespace().next()?)?;
    Some(Line { name: name.to_owned(), labels, value })
}

/// The text up to the closing quote, and what is behind it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match characters.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        "-Inf" => Some(f64::NEG_INFINITY),
        text => text.parse().ok(),
    }
}
