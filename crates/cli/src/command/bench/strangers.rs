//! Callers without a key, who come beside those that are measured.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::v1::cohort_client::CohortClient;
use proto::v1::{GenerateRequest, TokenIds, generate_request};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::client;

/// Calls that are open at once; a server that is later with its refusals gets no more until it has answered some.
const OPEN_MAX: usize = 4096;

/// How calls ended, by status code.
pub(super) type Ends = BTreeMap<String, u64>;

/// Strangers that come until they are told to stop.
pub(super) struct Strangers {
    stop: CancellationToken,
    coming: JoinHandle<Ends>,
}

impl Strangers {
    /// So many a second, on a connection of their own.
    pub(super) fn come(channel: Channel, per_second: f64) -> Self {
        let stop = CancellationToken::new();
        let coming = tokio::spawn(keep_coming(channel, per_second, stop.clone()));
        Self { stop, coming }
    }

    /// What became of them.
    ///
    /// # Errors
    /// When the task that sent them has failed.
    pub(super) async fn stop(self) -> anyhow::Result<Ends> {
        self.stop.cancel();
        Ok(self.coming.await?)
    }
}

async fn keep_coming(channel: Channel, per_second: f64, stop: CancellationToken) -> Ends {
    let mut times = tokio::time::interval(Duration::from_secs_f64(1.0 / per_second));
    times.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut calls, mut ends) = (JoinSet::new(), Ends::new());
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(Ok(end)) = calls.join_next() => *ends.entry(end).or_default() += 1,
            _ = times.tick(), if calls.len() < OPEN_MAX => {
                calls.spawn(call(channel.clone()));
            }
        }
    }
    for end in calls.join_all().await {
        *ends.entry(end).or_default() += 1;
    }
    ends
}

/// How one call ended.
async fn call(channel: Channel) -> String {
    let prompt = Some(generate_request::Prompt::TokenIds(TokenIds { ids: vec![1] }));
    let request = GenerateRequest { prompt, ..GenerateRequest::default() };
    match CohortClient::new(channel).generate_once(request).await {
        Ok(_) => "OK".to_owned(),
        Err(status) => client::code_name(status.code()).to_owned(),
    }
}
