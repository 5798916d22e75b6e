//! On which line of a cluster file each key stands, so that a mistake can be found.

use std::collections::BTreeMap;

use config::FileFormat;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use yaml_rust2::Event;
use yaml_rust2::parser::{MarkedEventReceiver, Parser};
use yaml_rust2::scanner::Marker;

/// Lines, from 1, by full key.
pub(crate) type Lines = BTreeMap<String, usize>;

/// The lines of a file's keys; of a file that cannot be parsed, those before the mistake.
pub(crate) fn of(text: &str, format: FileFormat) -> Lines {
    if format == FileFormat::Yaml { of_yaml(text) } else { of_toml(text) }
}

/// A key in a section.
pub(crate) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

fn of_toml(text: &str) -> Lines {
    let (table, _) = DeTable::parse_recoverable(text);
    // Ends of lines, in bytes: the line of an offset is the number of ends before it, and one.
    let ends: Vec<usize> = text.match_indices('\n').map(|(at, _)| at).collect();
    let mut lines = Lines::new();
    toml_table(table.get_ref(), "", &ends, &mut lines);
    lines
}

fn toml_table(table: &DeTable<'_>, prefix: &str, ends: &[usize], lines: &mut Lines) {
    for (name, value) in table {
        let key = join(prefix, name.get_ref());
        let line = ends.partition_point(|&end| end < start(name)) + 1;
        if let DeValue::Table(table) = value.get_ref() {
            toml_table(table, &key, ends, lines);
        }
        lines.insert(key, line);
    }
}

fn start<T>(spanned: &Spanned<T>) -> usize {
    spanned.span().start
}

fn of_yaml(text: &str) -> Lines {
    let mut reader = YamlReader::default();
    // What is wrong with the file has been said by whoever read its values.
    let _ = Parser::new_from_str(text).load(&mut reader, false);
    reader.lines
}

/// Follows a YAML file's events; sequences are passed over.
#[derive(Default)]
struct YamlReader {
    lines: Lines,
    /// The open mappings, each with the key that stands before the next value.
    open: Vec<Mapping>,
    sequences: usize,
}

#[derive(Default)]
struct Mapping {
    prefix: String,
    key: Option<String>,
}

impl MarkedEventReceiver for YamlReader {
    fn on_event(&mut self, event: Event, mark: Marker) {
        match event {
            Event::SequenceStart(..) => self.sequences += 1,
            Event::SequenceEnd => {
                self.sequences = self.sequences.saturating_sub(1);
                self.value_ended();
            }
            _ if self.sequences > 0 => {}
            Event::MappingStart(..) => {
                let prefix = self.open.last().and_then(|mapping| mapping.key.clone()).unwrap_or_default();
                self.open.push(Mapping { prefix, key: None });
            }
            Event::MappingEnd => {
                self.open.pop();
                self.value_ended();
            }
            Event::Scalar(text, ..) => self.scalar(&text, mark.line()),
            Event::Alias(_) => self.value_ended(),
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart
            | Event::DocumentEnd => {}
        }
    }
}

impl YamlReader {
    fn scalar(&mut self, text: &str, line: usize) {
        let Some(mapping) = self.open.last_mut() else { return };
        if mapping.key.is_some() {
            return self.value_ended();
        }
        let key = join(&mapping.prefix, text);
        self.lines.insert(key.clone(), line);
        mapping.key = Some(key);
    }

    fn value_ended(&mut self) {
        if self.sequences == 0
            && let Some(mapping) = self.open.last_mut()
        {
            mapping.key = None;
        }
    }
}
