//! Tokens that are drawn on the devices of a group go from one step to the next there, on every rank: what comes out is what
//! a rank alone says to which the host feeds every token.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod golden;

use std::thread;
use std::time::Duration;

use collectives::{Collective, Counters, Error, InProcess};
use golden::{CASES, Golden, load};
use model::{Checkpoint, Files, KvBudget, Model, Parts, ShardPlan};
use ops::conformance::Random;
use ops::sample::{Ask, Choice, Plain, Recipe};
use ops::{Batch, BatchSequence, BlockTable, Fed};
use ops_cpu::{CpuBackend, HostCollective, Tensor};
use types::{BlockId, BlockSize, DType, Dispatch, ExpertSharding, Position, TokenId, TpRank, TpSize};

const SEED: u64 = 77;
const SEQUENCES: usize = 3;
const BLOCKS_EACH: u32 = 16;
const STEPS: usize = 20;
/// The row that has a rule.
const RULED: usize = 1;

/// A collective on the host that says of itself what one between cards says: that its operations are queued.
struct Queued(HostCollective<InProcess>);

impl Collective<Tensor> for Queued {
    fn rank(&self) -> TpRank {
        self.0.rank()
    }

    fn all_reduce_sum(&mut self, data: &mut Tensor) -> Result<(), Error> {
        self.0.all_reduce_sum(data)
    }

    fn reduce_scatter_sum(&mut self, data: &Tensor, counts: &[usize], own: &mut Tensor) -> Result<(), Error> {
        self.0.reduce_scatter_sum(data, counts, own)
    }

    fn all_gather(&mut self, own: &Tensor, counts: &[usize], all: &mut Tensor) -> Result<(), Error> {
        self.0.all_gather(own, counts, all)
    }

    fn all_to_all_v(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        self.0.all_to_all_v(send, send_counts, recv, recv_counts)
    }

    fn all_to_all_open(
        &mut self,
        send: &Tensor,
        send_counts: &[usize],
        recv: &mut Tensor,
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), Error> {
        self.0.all_to_all_open(send, send_counts, recv, room, came)
    }

    fn broadcast(&mut self, root: u32, data: &mut Tensor) -> Result<(), Error> {
        self.0.broadcast(root, data)
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.0.barrier()
    }

    fn queues(&self) -> bool {
        true
    }

    fn counters(&self) -> Counters {
        self.0.counters()
    }

    fn abort(&mut self) {
        self.0.abort();
    }
}

struct Rank {
    model: Model<CpuBackend, Queued>,
    lengths: [u32; SEQUENCES],
}

impl Rank {
    fn new(golden: &Golden, rank: TpRank, line: InProcess) -> Self {
        let plan = ShardPlan::sharded(&golden.config, rank, ExpertSharding::Tensor).unwrap();
        let mut backend = CpuBackend::new(DType::F32, 1).unwrap();
        let checkpoint = Checkpoint::open(Files::Directory(golden.directory.clone())).unwrap();
        let (weights, _) = model::load(&checkpoint, &golden.config, &plan, &mut backend, &()).unwrap();
        let (config, comm) = (golden.config.clone(), Queued(HostCollective(line)));
        let parts =
            Parts { config, plan, backend, comm, subgroup: None, weights, dispatch: Dispatch::Replicated };
        let blocks = [BLOCKS_EACH * SEQUENCES as u32; 2];
        let budget = KvBudget { block_size: BlockSize::new(4).unwrap(), blocks };
        Self { model: Model::new(parts, budget).unwrap(), lengths: [0; SEQUENCES] }
    }

    fn add(&mut self, batch: &mut Batch, sequence: usize, tokens: &[TokenId]) {
        let rows = batch.tokens.len()..batch.tokens.len() + tokens.len();
        batch.tokens.extend(tokens);
        batch.logit_rows.push(rows.end as u32 - 1);
        let blocks = (0..BLOCKS_EACH).map(|at| BlockId(sequence as u32 * BLOCKS_EACH + at)).collect();
        let table = BlockTable { first: 0, blocks };
        let start = Position(self.lengths[sequence]);
        batch.sequences.push(BatchSequence { rows, start, tables: [table.clone(), table] });
        self.lengths[sequence] += tokens.len() as u32;
    }

    /// The tokens of all steps as the first rank knows them: fed by the host, or on the device.
    fn run(&mut self, feeds: bool, follows: bool) -> Vec<Vec<TokenId>> {
        let (mut random, mut said) = (Random::new(SEED), Vec::<Vec<TokenId>>::new());
        let vocab = self.model.config().vocab_size;
        let mut below = |count: usize| random.below(count);
        let prompts: Vec<Vec<TokenId>> = (0..SEQUENCES)
            .map(|sequence| (0..4 + sequence).map(|_| TokenId(below(vocab) as u32)).collect())
            .collect();
        for _ in 0..STEPS {
            let mut batch = Batch::default();
            for (sequence, prompt) in prompts.iter().enumerate() {
                match said.last() {
                    None => self.add(&mut batch, sequence, prompt),
                    Some(_) if feeds => {
                        let row = sequence as u32;
                        batch.fed.push(Fed { row, from: row });
                        self.add(&mut batch, sequence, &[TokenId(0)]);
                    }
                    Some(before) => self.add(&mut batch, sequence, &[before[sequence]]),
                }
            }
            let own = |row: usize| {
                let (temperature, banned) = (if row == 0 { 0.0 } else { 1.2 }, &[TokenId(3)][..]);
                let how = Plain { temperature, top_k: None, top_p: 0.95, min_p: 0.0, at: random.unit() };
                // One row has a rule as well.
                let banned = if row == RULED { banned } else { &[] };
                Ask::Token(Recipe { banned, ..Recipe::plain(how) })
            };
            let asks: Vec<Ask<'_>> = (0..SEQUENCES).map(own).collect();
            let forward = self.model.begin(&batch, &[batch.tokens.len()]).unwrap();
            let pending = match follows {
                true => self.model.follow(forward).unwrap(),
                false => self.model.draw(forward, &asks).unwrap(),
            };
            assert!(self.model.is_drawn(&pending).unwrap(), "the host has nothing to wait for");
            let choices = self.model.collect(pending).unwrap();
            assert_eq!(choices.len(), SEQUENCES);
            let token = |choice| match choice {
                Choice::Token { token, .. } => token,
                Choice::Left => TokenId(0),
                other => panic!("{other:?}"),
            };
            said.push(choices.into_iter().map(token).collect());
        }
        said
    }
}

/// What the ranks of a group say.
fn group(golden: &Golden, ranks: u32, feeds: bool, followed: bool) -> Vec<Vec<Vec<TokenId>>> {
    let size = TpSize::new(ranks).unwrap();
    let lines = InProcess::group(size, Duration::from_secs(60));
    thread::scope(|scope| {
        let threads: Vec<_> = size
            .ranks()
            .zip(lines)
            .map(|(of, line)| {
                scope.spawn(move || {
                    let mut rank = Rank::new(golden, of, line);
                    assert!(rank.model.feeds());
                    rank.run(feeds, followed && !of.is_leader())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn a_rank_alone_feeds_itself() {
    for name in CASES {
        let golden = load(name);
        assert_eq!(group(&golden, 1, true, false), group(&golden, 1, false, false), "{name}, seed {SEED}");
    }
}

#[test]
fn a_group_feeds_every_rank_what_the_first_one_draws() {
    for name in CASES {
        let golden = load(name);
        let alone = group(&golden, 1, false, false).remove(0);
        for followed in [true, false] {
            let mut told = group(&golden, 2, true, followed);
            let others = told.pop().unwrap();
            assert_eq!(told.remove(0), alone, "{name}, seed {SEED}");
            // The others know nothing of the tokens: they only compute with them.
            assert!(others.iter().flatten().all(|&token| token == TokenId(0)), "{name}");
        }
    }
}
