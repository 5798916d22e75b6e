//! Writing answers to stdout. Whoever reads may stop early (`cohort demo | head`): that ends the command quietly.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

/// Prints a line to stdout as `println!` does; see [`write_line`].
macro_rules! say {
    () => { $crate::out::write_line(format_args!("")) };
    ($($arguments:tt)*) => { $crate::out::write_line(format_args!($($arguments)*)) };
}
pub(crate) use say;

/// Writes a line to stdout; ends the process when nobody reads any more.
pub(crate) fn write_line(line: Arguments<'_>) {
    end_if_unread(writeln!(io::stdout(), "{line}"));
}

/// Writes a line to stderr, if that can be: a disk that is full, or nobody who reads, ends nothing.
pub fn write_note(line: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes text as it is and shows it at once; ends the process when nobody reads any more.
pub(crate) fn write_text(text: &str) {
    let mut stdout = io::stdout().lock();
    end_if_unread(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()));
}

/// Ends the process when a write failed: quietly when nobody reads any more, else with the reason. Children see their
/// lifelines end.
fn end_if_unread(written: io::Result<()>) {
    match written {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            write_note(format_args!("error: the answer cannot be written to stdout: {error}"));
            std::process::exit(1);
        }
    }
}
