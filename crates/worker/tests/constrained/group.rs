//! A group that is asked for answers of a form, and the text of what it says.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use futures::future::join_all;
use grammar::{Begin, Form, TokenTable};
use proto::worker::{FinishReason, GenerateChunk, GenerateRequest, Generation, Guide};
use types::{Constraint, TokenId};
use worker::{Config, Limits, Report};

use crate::support::{Client, Rank, among, config, demo};

pub(crate) struct Group {
    ranks: Vec<Rank>,
    pub(crate) client: Client,
}

impl Group {
    pub(crate) fn start(size: u32, change: impl Fn(&mut Limits)) -> Self {
        Self::of(size, |rank| config(rank, size), change)
    }

    /// Of `data` sub-groups of `tensor` ranks.
    pub(crate) fn among(tensor: u32, data: u32, change: impl Fn(&mut Limits)) -> Self {
        Self::of(tensor * data, |rank| among(rank, tensor, data), change)
    }

    fn of(size: u32, config: impl Fn(u32) -> Config, change: impl Fn(&mut Limits)) -> Self {
        let changed = |rank| {
            let mut config = config(rank);
            config.limits.running_max = 32;
            config.limits.waiting_requests_max = 512;
            config.limits.waiting_tokens_max = 1 << 20;
            config.limits.kv_tokens = 1 << 15;
            change(&mut config.limits);
            config
        };
        let leader = Rank::start(changed(0));
        let address = leader.listening();
        let mut ranks = vec![leader];
        if size > 1 {
            let rendezvous = ranks[0].wait(|r| if let Report::Rendezvous(at) = r { Some(*at) } else { None });
            ranks.extend((1..size).map(|rank| Rank::start(Config { rendezvous, ..changed(rank) })));
        }
        let client = Client::connect(address);
        ranks.iter().for_each(Rank::ready);
        Self { ranks, client }
    }

    /// All requests at once; the answers of each, by their number.
    pub(crate) fn ask(&self, requests: Vec<GenerateRequest>) -> Vec<Vec<Answer>> {
        let calls = requests.into_iter().map(|request| {
            let mut client = self.client.client.clone();
            async move {
                let mut stream = client.generate(request).await.unwrap().into_inner();
                let mut answers: BTreeMap<u32, Answer> = BTreeMap::new();
                while let Some(chunk) = stream.message().await.unwrap() {
                    answers.entry(chunk.index).or_default().take(chunk);
                }
                answers.into_values().collect()
            }
        });
        self.client.runtime.block_on(join_all(calls))
    }

    pub(crate) fn stop(self) {
        self.ranks[0].shutdown.cancel();
        for rank in self.ranks {
            rank.end().unwrap();
        }
    }
}

/// One answer as it came.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    reason: Option<FinishReason>,
}

impl Answer {
    fn take(&mut self, chunk: GenerateChunk) {
        self.tokens.extend(chunk.token_ids);
        self.reason = chunk.finish.map(|finish| finish.reason()).or(self.reason);
    }

    /// Its text, markers included, without the end of sequence, which must have come.
    pub(crate) fn text(&self) -> String {
        let (end, tokens) = self.tokens.split_last().unwrap();
        let bytes: Vec<u8> = tokens.iter().flat_map(|&id| table().bytes(TokenId(id))).copied().collect();
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(self.reason, Some(FinishReason::Eos), "cut off: {text}");
        assert!([6, 9].contains(end), "{end}");
        text
    }
}

pub(crate) fn table() -> &'static TokenTable {
    static TABLE: OnceLock<TokenTable> = OnceLock::new();
    TABLE.get_or_init(|| TokenTable::read(&std::fs::read(demo().join("tokenizer.json")).unwrap()).unwrap())
}

/// The grammar of an answer that is nothing but this.
pub(crate) fn plain(content: &Constraint) -> String {
    Form { begin: Begin::Plain, marks: None, content: Some(content), calls: None }.compose().unwrap()
}

/// Draws at temperature 1 from this grammar.
pub(crate) fn guided(grammar: String, seed: u64) -> GenerateRequest {
    let generation = Generation {
        max_tokens: Some(1500),
        temperature: Some(1.0),
        seed: Some(seed),
        ..Generation::default()
    };
    GenerateRequest {
        request_id: format!("guided-{seed}"),
        prompt: (0..20).map(|i| 30 + (i * 37 + seed as u32 * 911) % 4000).collect(),
        generation: Some(generation),
        guide: Some(Guide { grammar, thinking: None }),
        ..GenerateRequest::default()
    }
}
