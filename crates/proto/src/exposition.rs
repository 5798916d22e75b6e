//! The two forms of a metrics page that scrapers ask for.

use std::collections::BTreeSet;
use std::fmt::Write;

/// What the OpenMetrics text format is called.
pub const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// What Prometheus' own, older text format is called.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A page in the form that `accept`, the header of the same name, asks for, and what that form is called. OpenMetrics is what
/// is written unless only the older one is taken.
#[must_use]
pub fn exposed(open_metrics: String, accept: Option<&str>) -> (&'static str, String) {
    match accept {
        Some(accept) if accept.contains("text/plain") && !accept.contains("openmetrics") => {
            (TEXT, as_text(&open_metrics))
        }
        _ => (OPEN_METRICS, open_metrics),
    }
}

/// In the older form a counter is called what its sample is called, and there are neither units nor an end.
fn as_text(page: &str) -> String {
    let counters: BTreeSet<&str> = page.lines().filter_map(counter).collect();
    let mut text = String::with_capacity(page.len());
    for line in page.lines() {
        let head = ["# HELP ", "# TYPE "].into_iter().find(|head| line.starts_with(head));
        let named = head.and_then(|head| Some((head, line[head.len()..].split_once(' ')?)));
        // Writing to a string does not fail.
        let _ = match named {
            Some((head, (name, rest))) if counters.contains(name) => {
                writeln!(text, "{head}{name}_total {rest}")
            }
            None if line == "# EOF" || line.starts_with("# UNIT ") => Ok(()),
            Some(_) | None => writeln!(text, "{line}"),
        };
    }
    text
}

/// The name of the counter that a line announces.
fn counter(line: &str) -> Option<&str> {
    line.strip_prefix("# TYPE ")?.strip_suffix(" counter")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str =
        "# HELP a Things.\n# TYPE a counter\na_total{x=\"1\"} 5\n# HELP b Now.\n# TYPE b gauge\nb 1\n# EOF\n";

    #[test]
    fn a_scraper_gets_open_metrics_unless_it_takes_the_older_form_only() {
        for accept in [None, Some("*/*"), Some("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")]
        {
            assert_eq!(exposed(PAGE.to_owned(), accept), (OPEN_METRICS, PAGE.to_owned()));
        }
        let text = "# HELP a_total Things.\n# TYPE a_total counter\na_total{x=\"1\"} 5\n# HELP b Now.\n# TYPE b gauge\nb 1\n";
        assert_eq!(exposed(PAGE.to_owned(), Some("text/plain;version=0.0.4")), (TEXT, text.to_owned()));
    }
}
