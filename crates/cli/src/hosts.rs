//! The hosts of one group: which ranks run here, and where they meet the others.

use std::ops::Range;

use anyhow::{Context, bail};
use types::TpSize;

/// Port at which rank 0 meets the others when only its host is named, as by LeaderWorkerSet.
pub const LEADER_PORT: u16 = 7070;

/// One host of a group that spans several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Number of hosts; each runs equally many ranks.
    pub count: u32,
    /// Which of them this is, from 0.
    pub index: u32,
    /// Where rank 0, on host 0, meets the others: `host:port`.
    pub leader: String,
}

impl Host {
    /// This host: of the `hosts` that are configured, with `index` or the one LeaderWorkerSet gives, or of a
    /// LeaderWorkerSet (`LWS_GROUP_SIZE`, `LWS_WORKER_INDEX`, `LWS_LEADER_ADDRESS`). `None` for a group of one host.
    ///
    /// # Errors
    /// When the index is missing or too large, or a variable is no number.
    pub fn find(
        hosts: &[String],
        index: Option<u32>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Option<Self>> {
        let number = |name: &str| {
            let value = variable(name);
            value
                .map(|text| text.parse::<u32>().with_context(|| format!("{name}={text}: must be a number")))
                .transpose()
        };
        let (count, leader) = match hosts.first() {
            Some(first) => (u32::try_from(hosts.len()).unwrap_or(u32::MAX), with_port(first)),
            None => match (number("LWS_GROUP_SIZE")?, variable("LWS_LEADER_ADDRESS")) {
                (None | Some(0 | 1), _) => (1, String::new()),
                (Some(count), Some(leader)) => (count, with_port(&leader)),
                (Some(count), None) => {
                    bail!("LWS_GROUP_SIZE={count} without LWS_LEADER_ADDRESS: where is rank 0?")
                }
            },
        };
        if count == 1 {
            return Ok(None);
        }
        let index = match index {
            Some(index) => Some(index),
            None => number("LWS_WORKER_INDEX")?,
        };
        let Some(index) = index.filter(|index| *index < count) else {
            let got = index.map_or("none was given".to_owned(), |index| format!("not {index}"));
            bail!("a group of {count} hosts needs --host-index 0 to {} on each of them; {got}", count - 1);
        };
        Ok(Some(Self { count, index, leader }))
    }

    /// The ranks that run here, of `all`.
    ///
    /// # Errors
    /// When the ranks do not divide by the hosts.
    pub fn ranks(&self, all: TpSize) -> anyhow::Result<Range<u32>> {
        if !all.get().is_multiple_of(self.count) {
            bail!("{all} ranks do not divide by {} hosts", self.count);
        }
        let each = all.get() / self.count;
        Ok(self.index * each..(self.index + 1) * each)
    }

    /// The port of [`Host::leader`].
    ///
    /// # Errors
    /// When it is no port number.
    pub fn port(&self) -> anyhow::Result<u16> {
        let port = self.leader.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        port.with_context(|| format!("{}: the first host must be HOST or HOST:PORT", self.leader))
    }
}

/// `host` as `host:port`.
fn with_port(host: &str) -> String {
    let numbered = host.rsplit_once(':').is_some_and(|(name, port)| {
        // A bare IPv6 address has colons and no port.
        port.parse::<u16>().is_ok() && (!name.contains(':') || name.ends_with(']'))
    });
    match (numbered, host.contains(':') && !host.starts_with('[')) {
        (true, _) => host.to_owned(),
        (false, true) => format!("[{host}]:{LEADER_PORT}"),
        (false, false) => format!("{host}:{LEADER_PORT}"),
    }
}
