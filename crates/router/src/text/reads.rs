//! Which variables a chat template takes from outside although it sets them itself: `{% set x = x | default(1) %}`.
//! The template engine calls such a variable the template's own.

use std::collections::HashSet;

/// The names that are read before the template sets them, in the order of its text.
pub(super) fn read_before_set(source: &str) -> HashSet<String> {
    let mut read = HashSet::new();
    let mut set: HashSet<&str> = HashSet::new();
    for code in blocks(source) {
        let names = names(code);
        let mut own: Vec<&str> = Vec::new();
        let mut used = names.as_slice();
        match names.split_first() {
            // A block's value: `{% set x %}…{% endset %}` reads nothing here.
            Some((first, rest)) if *first == "set" => {
                own.extend(rest.first().copied());
                used = rest.get(1..).unwrap_or_default();
            }
            Some((first, rest)) if *first == "for" => {
                let targets = rest.iter().position(|name| *name == "in").unwrap_or(rest.len());
                own.extend_from_slice(&rest[..targets]);
                used = &rest[targets..];
            }
            Some((first, rest)) if *first == "macro" => {
                own.extend_from_slice(rest);
                used = &[];
            }
            Some(_) | None => {}
        }
        read.extend(used.iter().filter(|name| !set.contains(*name)).map(|name| (*name).to_owned()));
        set.extend(own);
    }
    read
}

/// What is between `{{` and `}}` or `{%` and `%}`.
fn blocks(source: &str) -> impl Iterator<Item = &str> {
    let mut rest = source;
    std::iter::from_fn(move || {
        loop {
            let open = rest.find('{')?;
            let (end, comment) = match rest.as_bytes().get(open + 1)? {
                b'{' => ("}}", false),
                b'%' => ("%}", false),
                b'#' => ("#}", true),
                _ => {
                    rest = &rest[open + 1..];
                    continue;
                }
            };
            let inside = &rest[open + 2..];
            let close = inside.find(end)?;
            rest = &inside[close + end.len()..];
            if !comment {
                return Some(&inside[..close]);
            }
        }
    })
}

/// The identifiers of an expression that may name a variable: none in a text, none after a dot.
fn names(code: &str) -> Vec<&str> {
    let bytes = code.as_bytes();
    let mut names = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            byte if byte.is_ascii_alphabetic() || byte == b'_' => {
                let from = at;
                while at < bytes.len() && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_') {
                    at += 1;
                }
                let before = code[..from].trim_end().as_bytes().last();
                if before != Some(&b'.') {
                    names.push(&code[from..at]);
                }
            }
            _ => at += 1,
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_that_is_read_before_it_is_set_comes_from_outside() {
        let source = "{# ignored #}{% set reasoning = reasoning if reasoning is defined else true %}\
            {% if not override %}{% set override %}text{% endset %}{% endif %}\
            {%- set local = 'quoted' ~ m.attribute -%}{{ local }}{{ \"text\" }}\
            {% for m in messages %}{{ m.role }}{% endfor %}{% macro f(param) %}{% endmacro %}";
        let read = read_before_set(source);
        for name in ["reasoning", "override", "messages"] {
            assert!(read.contains(name), "{name} is not in {read:?}");
        }
        for name in ["local", "quoted", "text", "attribute", "role", "ignored", "param"] {
            assert!(!read.contains(name), "{name} is in {read:?}");
        }
    }
}
