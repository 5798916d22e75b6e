//! What a supervisor tells a process it has started: one JSON object a line down the lifeline.

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Go on as if it had been started with these arguments, as far as that can be changed; answered with
    /// [`Event::Configured`](crate::report::Event::Configured).
    Configure {
        /// The command line, after the program's name.
        argv: Vec<String>,
    },
    /// Log this from now on, and tell those below.
    Log {
        /// A level or filter; `None` leaves it to `RUST_LOG` or the process's own default.
        level: Option<String>,
    },
}

impl Order {
    /// The line, with its end.
    #[must_use]
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }
}
