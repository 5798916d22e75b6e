//! The pages: what they link to is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The workspace root. This file is a test of `crates/cli`.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The README, and every page of the book.
fn pages() -> Vec<PathBuf> {
    let listing = fs::read_dir(root().join("docs")).unwrap_or_else(|error| panic!("docs: {error}"));
    let book = listing.filter_map(|entry| Some(entry.ok()?.path()));
    let mut pages: Vec<PathBuf> =
        book.filter(|path| path.extension().is_some_and(|end| end == "md")).collect();
    pages.extend([root().join("README.md"), root().join("helm/README.md")]);
    pages.sort();
    pages
}

/// Lines outside of fenced blocks, with their numbers from 1.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().map(|(index, line)| (index + 1, line)).filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// What the links of a page point to: `[words](target)`.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        let targets = line.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
        found.extend(targets.map(|(target, _)| (number, target.to_owned())));
    }
    found
}

/// The names of a page's headings, as links write them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text).filter_map(|(_, line)| line.strip_prefix('#'));
    let anchor = |heading: &str| {
        let words = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = words.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

/// What is wrong with a link of a page.
fn fault(page: &Path, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (path, anchor) = target.split_once('#').map_or((target, None), |(path, anchor)| (path, Some(anchor)));
    let file = if path.is_empty() { page.to_owned() } else { page.parent()?.join(path) };
    if !file.exists() {
        return Some(format!("{target} is not there"));
    }
    let anchor = anchor?;
    (!anchors(&read(&file)).contains(anchor)).then(|| format!("{target} names no heading"))
}

#[test]
fn every_link_of_the_pages_leads_somewhere() {
    let mut faults = Vec::new();
    let mut checked = 0;
    for page in pages() {
        for (line, target) in links(&read(&page)) {
            checked += 1;
            if let Some(fault) = fault(&page, &target) {
                faults.push(format!("{}:{line}: {fault}", page.display()));
            }
        }
    }
    assert!(faults.is_empty(), "links that lead nowhere:\n  {}", faults.join("\n  "));
    assert!(checked >= 20, "{checked} links");
}

#[test]
fn every_page_of_the_book_is_in_its_contents() {
    let contents = root().join("docs/README.md");
    let linked: BTreeSet<String> = links(&read(&contents)).into_iter().map(|(_, target)| target).collect();
    let missing: Vec<String> = pages()
        .iter()
        .filter(|page| page.parent().is_some_and(|folder| folder.ends_with("docs")))
        .filter_map(|page| Some(page.file_name()?.to_str()?.to_owned()))
        .filter(|name| name != "README.md" && !linked.contains(name))
        .collect();
    assert!(missing.is_empty(), "docs/README.md does not list {missing:?}");
}

#[test]
fn a_link_that_leads_nowhere_is_found() {
    let page = root().join("docs/README.md");
    assert_eq!(fault(&page, "architecture.md"), None);
    assert_eq!(fault(&page, "architecture.md#rooms"), None);
    assert_eq!(fault(&page, "https://example.com/x"), None);
    assert!(fault(&page, "gone.md").is_some());
    assert!(fault(&page, "architecture.md#gone").is_some());
    let text = "# One `two`: three\n[a](b.md) and [c](#one-two-three)\n```\n[x](y)\n```\n";
    assert_eq!(links(text), [(2, "b.md".to_owned()), (2, "#one-two-three".to_owned())]);
    assert!(anchors(text).contains("one-two-three"));
}
