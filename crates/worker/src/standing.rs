//! What routers make of a group. Pure.

use std::collections::BTreeMap;

/// What all of them together make of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// None has said anything.
    Unknown,
    /// One sends requests, whatever others say.
    Acknowledged,
    /// None does, for this reason.
    Refused(String),
    /// Those that did have gone.
    Left,
}

impl Standing {
    /// In a few words, for whoever probes.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Unknown => "no router has come yet".to_owned(),
            Self::Acknowledged => "acknowledged".to_owned(),
            Self::Refused(why) => format!("refused: {why}"),
            Self::Left => "all routers have gone".to_owned(),
        }
    }
}

/// A router that watches.
#[derive(Debug, Default)]
struct Router {
    /// Of one that connects anew before the old connection has ended there are two.
    watches: u32,
    /// What it said last: why it does not use the group, or nothing when it does.
    says: Option<String>,
}

/// Every router that is there, and what it says. The word of a router counts while it watches: one that is gone sends
/// nothing.
#[derive(Debug, Default)]
pub(crate) struct Routers {
    watching: BTreeMap<String, Router>,
    /// Routers that do not let the group register, and why.
    closed: BTreeMap<String, String>,
    /// Whether one has used it before.
    used: bool,
}

impl Routers {
    /// A router begins to watch.
    pub(crate) fn comes(&mut self, router: &str) {
        self.watching.entry(router.to_owned()).or_default().watches += 1;
    }

    /// It does not watch any more.
    pub(crate) fn goes(&mut self, router: &str) {
        let Some(known) = self.watching.get_mut(router) else { return };
        known.watches -= 1;
        if known.watches == 0 {
            self.watching.remove(router);
        }
    }

    /// It says why it does not use the group, or nothing when it does.
    pub(crate) fn says(&mut self, router: &str, refusal: &str) {
        if let Some(known) = self.watching.get_mut(router) {
            known.says = Some(refusal.to_owned());
            self.used |= refusal.is_empty();
        }
    }

    /// A router answers a registration: why not, or nothing when it is taken.
    pub(crate) fn answers(&mut self, router: &str, refusal: &str) {
        match refusal {
            "" => _ = self.closed.remove(router),
            why => _ = self.closed.insert(router.to_owned(), why.to_owned()),
        }
    }

    /// What all of it amounts to.
    pub(crate) fn standing(&self) -> Standing {
        let said = || self.watching.values().filter_map(|router| router.says.as_deref());
        if said().any(str::is_empty) {
            return Standing::Acknowledged;
        }
        match said().chain(self.closed.values().map(String::as_str)).next() {
            Some(why) => Standing::Refused(why.to_owned()),
            None if self.used => Standing::Left,
            None => Standing::Unknown,
        }
    }
}
