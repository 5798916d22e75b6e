//! Shares of the requests, as they are written: `ADDRESS=WEIGHT`.

use std::collections::BTreeMap;

use types::limits::WEIGHT_MAX;

use crate::check::{Fault, is_worker_address};
use crate::tree::{Cluster, Router};

/// An address or name of workers, and its weight.
///
/// # Errors
/// What is wrong with it.
fn parse(entry: &str) -> Result<(&str, u32), String> {
    let wrong = || {
        format!(
            "{entry:?} is not an address and its weight, 0 to {WEIGHT_MAX}, such as http://10.0.0.1:7000=2"
        )
    };
    let (address, weight) = entry.rsplit_once('=').ok_or_else(wrong)?;
    let weight: u32 = weight.trim().parse().ok().filter(|weight| *weight <= WEIGHT_MAX).ok_or_else(wrong)?;
    match is_worker_address(address) {
        true => Ok((address, weight)),
        false => Err(wrong()),
    }
}

/// The weights of checked settings.
pub(crate) fn by_address(router: &Router) -> BTreeMap<String, u32> {
    let entries = router.weights.iter().filter_map(|entry| parse(entry).ok());
    entries.map(|(address, weight)| (address.to_owned(), weight)).collect()
}

/// A weight of a worker that does not exist would be a weight that somebody believes in.
pub(crate) fn check(router: &Router, cluster: &Cluster, faults: &mut Vec<Fault>) {
    let key = "router.weights";
    // The addresses of names, and those that register, are known later.
    let listed = !router.registration && !router.workers.iter().any(|worker| worker.starts_with("dns+"));
    let mut seen = BTreeMap::new();
    for entry in &router.weights {
        match parse(entry) {
            Err(reason) => faults.push((key, reason)),
            Ok((address, _)) if listed && !router.workers.iter().any(|worker| worker == address) => {
                faults.push((key, format!("{address} is not in router.workers")));
            }
            Ok((address, weight)) => {
                if let Some(other) = seen.insert(address, weight) {
                    faults.push((key, format!("{address} has two weights, {other} and {weight}")));
                }
            }
        }
    }
    let key = "cluster.weights";
    for weight in cluster.weights.iter().filter(|weight| **weight > WEIGHT_MAX) {
        faults.push((key, format!("must be between 0 and {WEIGHT_MAX} each, not {weight}")));
    }
    let (weights, groups) = (cluster.weights.len(), cluster.groups);
    if weights as u64 > u64::from(groups) {
        faults.push((key, format!("has {weights} weights for {groups} group(s)")));
    }
}
