//! `strftime_now` for chat templates, in UTC: a server has no time zone of its own.

use std::fmt::Write;

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Formats a moment, in seconds since 1970 UTC, as C's `strftime` does. Knows the directives
/// `%Y %y %m %d %e %j %B %b %h %A %a %H %I %M %S %p %F %T %D %Z %z %%`, and `%-d` and the like without leading zeros.
///
/// # Errors
/// The directive that is not known.
pub fn strftime(format: &str, unix_seconds: u64) -> Result<String, String> {
    let now = Moment::new(unix_seconds);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = rest.next();
        let bare = directive == Some('-');
        if bare {
            directive = rest.next();
        }
        let start = out.len();
        now.write(&mut out, directive)?;
        if bare {
            let number = out.split_off(start);
            let trimmed = number.trim_start_matches(['0', ' ']);
            out.push_str(if trimmed.is_empty() { "0" } else { trimmed });
        }
    }
    Ok(out)
}

/// A moment of UTC in calendar terms.
struct Moment {
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    /// From 1.
    day_of_year: u64,
    /// From Sunday, 0.
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Moment {
    fn new(unix_seconds: u64) -> Self {
        let (mut days, second_of_day) = (unix_seconds / 86_400, unix_seconds % 86_400);
        // 1 January 1970 was a Thursday.
        let weekday = usize::try_from((days + 4) % 7).unwrap_or(0);
        // Whole cycles of 400 years first, so the loops below stay short.
        let mut year = 1970 + days / 146_097 * 400;
        days %= 146_097;
        while days >= year_days(year) {
            days -= year_days(year);
            year += 1;
        }
        let day_of_year = days + 1;
        let mut month = 0;
        while days >= month_days(year, month) {
            days -= month_days(year, month);
            month += 1;
        }
        let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
        Self { year, month, day: days + 1, day_of_year, weekday, hour, minute, second }
    }

    fn write(&self, out: &mut String, directive: Option<char>) -> Result<(), String> {
        let month = self.month + 1;
        let hour12 = (self.hour + 11) % 12 + 1;
        let written = match directive {
            Some('Y') => write!(out, "{}", self.year),
            Some('y') => write!(out, "{:02}", self.year % 100),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{:02}", self.day),
            Some('e') => write!(out, "{:2}", self.day),
            Some('j') => write!(out, "{:03}", self.day_of_year),
            Some('B') => write!(out, "{}", MONTHS[self.month]),
            Some('b' | 'h') => write!(out, "{}", &MONTHS[self.month][..3]),
            Some('A') => write!(out, "{}", DAYS[self.weekday]),
            Some('a') => write!(out, "{}", &DAYS[self.weekday][..3]),
            Some('H') => write!(out, "{:02}", self.hour),
            Some('I') => write!(out, "{hour12:02}"),
            Some('M') => write!(out, "{:02}", self.minute),
            Some('S') => write!(out, "{:02}", self.second),
            Some('p') => write!(out, "{}", if self.hour < 12 { "AM" } else { "PM" }),
            Some('F') => write!(out, "{}-{month:02}-{:02}", self.year, self.day),
            Some('D') => write!(out, "{month:02}/{:02}/{:02}", self.day, self.year % 100),
            Some('T') => write!(out, "{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
            Some('Z') => write!(out, "UTC"),
            Some('z') => write!(out, "+0000"),
            Some('%') => write!(out, "%"),
            Some(other) => return Err(format!("strftime: directive %{other} is not supported")),
            None => return Err("strftime: the format ends in %".to_owned()),
        };
        written.map_err(|error| error.to_string())
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn year_days(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn month_days(year: u64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}
