//! One JSON value, checked character by character as it streams.
//!
//! Two slips that models make inside strings are mended on the way, so that callers can read the value: an escape JSON
//! does not have (`\|` becomes `\\|`) and a control character written as it is (a line break becomes `\n`).

use std::fmt::Write;

/// Deepest nesting taken.
const DEPTH_MAX: usize = 128;

/// What one character did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The value goes on.
    More,
    /// The value ends with this character.
    Ended,
    /// The value has ended before this character, which was not taken. Only numbers end so.
    EndedBefore,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Container {
    Object,
    Array,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
    String { key: bool },
    Escape { key: bool },
    Unicode { key: bool, left: u8 },
    Literal(&'static str),
    Number(Number),
    Done,
}

/// Where in a number: what was read last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    E,
    ESign,
    Exponent,
}

/// Reads one value.
#[derive(Debug, Clone)]
pub(super) struct Scanner {
    open: Vec<Container>,
    at: At,
}

impl Scanner {
    pub(super) const fn new() -> Self {
        Self { open: Vec::new(), at: At::Value }
    }

    /// Takes the next character and appends what it stands for to `out`.
    ///
    /// # Errors
    /// What was expected, when `c` cannot come here.
    pub(super) fn push(&mut self, c: char, out: &mut String) -> Result<Step, &'static str> {
        match self.at {
            At::String { key } => self.in_string(c, key, out),
            At::Escape { key } => self.escaped(c, key, out),
            At::Unicode { key, left } => {
                if !c.is_ascii_hexdigit() {
                    return Err("four hexadecimal digits were expected after \\u");
                }
                self.at = if left == 1 { At::String { key } } else { At::Unicode { key, left: left - 1 } };
                out.push(c);
            }
            At::Literal(rest) => {
                let rest = rest.strip_prefix(c).ok_or("true, false or null was expected")?;
                out.push(c);
                if rest.is_empty() { self.value_ended() } else { self.at = At::Literal(rest) }
            }
            At::Number(number) => match number.next(c) {
                Some(next) => {
                    self.at = At::Number(next);
                    out.push(c);
                }
                None if !number.complete() => return Err("a digit was expected"),
                None => {
                    self.value_ended();
                    if self.at == At::Done {
                        return Ok(Step::EndedBefore);
                    }
                    return self.push(c, out);
                }
            },
            At::Done => return Err("nothing was expected after the value"),
            At::Value | At::ValueOrEnd | At::Key | At::KeyOrEnd | At::Colon | At::CommaOrEnd => {
                if !matches!(c, ' ' | '\t' | '\n' | '\r') {
                    self.structure(c)?;
                }
                out.push(c);
            }
        }
        Ok(if self.at == At::Done { Step::Ended } else { Step::More })
    }

    fn structure(&mut self, c: char) -> Result<(), &'static str> {
        match (self.at, c) {
            (At::Key | At::KeyOrEnd, '"') => self.at = At::String { key: true },
            (At::KeyOrEnd, '}') | (At::ValueOrEnd, ']') => self.close(),
            (At::Colon, ':') => self.at = At::Value,
            (At::CommaOrEnd, ',') if self.open.last() == Some(&Container::Object) => self.at = At::Key,
            (At::CommaOrEnd, ',') => self.at = At::Value,
            (At::CommaOrEnd, '}') if self.open.last() == Some(&Container::Object) => self.close(),
            (At::CommaOrEnd, ']') if self.open.last() == Some(&Container::Array) => self.close(),
            (At::Value | At::ValueOrEnd, _) => self.value(c)?,
            (At::Key | At::KeyOrEnd, _) => return Err("a key in quotes was expected"),
            (At::Colon, _) => return Err("`:` was expected"),
            _ => return Err("`,` or the end of the object or list was expected"),
        }
        Ok(())
    }

    fn value(&mut self, c: char) -> Result<(), &'static str> {
        if matches!(c, '{' | '[') && self.open.len() == DEPTH_MAX {
            return Err("the value is nested too deeply");
        }
        self.at = match c {
            '{' => {
                self.open.push(Container::Object);
                At::KeyOrEnd
            }
            '[' => {
                self.open.push(Container::Array);
                At::ValueOrEnd
            }
            '"' => At::String { key: false },
            't' => At::Literal("rue"),
            'f' => At::Literal("alse"),
            'n' => At::Literal("ull"),
            '-' => At::Number(Number::Minus),
            '0' => At::Number(Number::Zero),
            '1'..='9' => At::Number(Number::Integer),
            _ => return Err("a JSON value was expected"),
        };
        Ok(())
    }

    fn in_string(&mut self, c: char, key: bool, out: &mut String) {
        match c {
            '"' => {
                out.push(c);
                if key { self.at = At::Colon } else { self.value_ended() }
            }
            // Written with the character after it, which says whether JSON has this escape.
            '\\' => self.at = At::Escape { key },
            c => push_in_string(c, out),
        }
    }

    fn escaped(&mut self, c: char, key: bool, out: &mut String) {
        out.push('\\');
        self.at = At::String { key };
        match c {
            '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => out.push(c),
            'u' => {
                out.push(c);
                self.at = At::Unicode { key, left: 4 };
            }
            c => {
                out.push('\\');
                push_in_string(c, out);
            }
        }
    }

    fn close(&mut self) {
        self.open.pop();
        self.value_ended();
    }

    fn value_ended(&mut self) {
        self.at = if self.open.is_empty() { At::Done } else { At::CommaOrEnd };
    }
}

fn push_in_string(c: char, out: &mut String) {
    match c {
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        // Writing to a string cannot fail.
        c if c < ' ' => _ = write!(out, "\\u{:04x}", u32::from(c)),
        c => out.push(c),
    }
}

impl Number {
    const fn next(self, c: char) -> Option<Self> {
        Some(match (self, c) {
            (Self::Minus, '0') => Self::Zero,
            (Self::Minus, '1'..='9') | (Self::Integer, '0'..='9') => Self::Integer,
            (Self::Zero | Self::Integer, '.') => Self::Point,
            (Self::Point | Self::Fraction, '0'..='9') => Self::Fraction,
            (Self::Zero | Self::Integer | Self::Fraction, 'e' | 'E') => Self::E,
            (Self::E, '+' | '-') => Self::ESign,
            (Self::E | Self::ESign | Self::Exponent, '0'..='9') => Self::Exponent,
            _ => return None,
        })
    }

    const fn complete(self) -> bool {
        matches!(self, Self::Zero | Self::Integer | Self::Fraction | Self::Exponent)
    }
}
