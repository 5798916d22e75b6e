//! How a group's ranks talk about tensors on their cards. A rank that is alone copies; ranks with a card each use NCCL,
//! found at run time, and for small sums each other's memory, where their cards see it; ranks that share a card, which
//! NCCL does not allow, send their numbers through the hosts.

mod cards;
mod meet;
mod peer;
mod solo;
mod staged;
mod watch;

use std::fs;
use std::rc::Rc;
use std::time::Duration;

use collectives::Collective;
use sha2::{Digest, Sha256};
use types::{Bytes, TpSize};

pub use self::peer::line_bytes;
pub use self::solo::SoloDevice;
pub use self::staged::Staged;

use self::cards::Cards;
pub(crate) use self::peer::OpenSum;
pub(crate) use self::watch::{Queued, Watch};
use crate::nccl::{Communicator, ID_BYTES, Nccl};
use crate::{CudaBackend, Error, Tensor};

/// How a rank's tensors go to the other ranks.
pub type CardLine = Box<dyn Collective<Tensor>>;

/// How long ranks have for what is said about them.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For all ranks to come together.
    pub boot: Duration,
    /// For a step's collective.
    pub step: Duration,
}

/// Largest sum of a group that goes through its cards' memory ([`one_shot`]), in bytes of one rank's part; 0: none.
pub const ONE_SHOT_VARIABLE: &str = "COHORT_CUDA_ONE_SHOT_BYTES_MAX";
/// What it is between two ranks without a word about it: 256 rows of 2,048 numbers. NCCL is slower up to 4 MiB and faster at
/// 8 MiB (two H200s, `cohort bench collectives --transport nccl,one-shot`, `docs/performance.md`).
pub const ONE_SHOT_DEFAULT: Bytes = Bytes(2 << 20);

/// Largest sum that goes through the cards' memory in a group whose reduces are among so many ranks, as [`ONE_SHOT_VARIABLE`]
/// says. A rank sends its part to every other one, so without a word about it more ranks have a lower bound.
///
/// # Errors
/// [`Error::Setting`] when that is no number of bytes.
pub fn one_shot(ranks: TpSize) -> Result<Bytes, Error> {
    let Some(value) = std::env::var_os(ONE_SHOT_VARIABLE) else {
        return Ok(Bytes(2 * ONE_SHOT_DEFAULT.0 / u64::from(ranks.get().max(2))));
    };
    let value = value.to_string_lossy().into_owned();
    value.parse().map(Bytes).map_err(|_| Error::Setting { name: ONE_SHOT_VARIABLE, value })
}

/// The line between the cards of a group; `line` connects their hosts. All ranks call it together.
///
/// # Errors
/// When a rank that needs NCCL does not have it, named; when the ranks do not come together in time.
pub fn connect<C>(
    backend: &CudaBackend,
    mut line: C,
    patience: Patience,
    one_shot: Bytes,
) -> Result<CardLine, Error>
where
    C: Collective<[f32]> + 'static,
{
    let rank = line.rank();
    let ranks = rank.size().as_usize();
    if ranks == 1 {
        return Ok(Box::new(SoloDevice::new(line)?));
    }
    let card = backend.device().identity()?;
    let cards = told(&mut line, &card)?;
    let shared = (1..ranks).find(|&rank| cards[..rank].contains(&cards[rank]));
    if let Some(rank) = shared {
        let other = cards.iter().position(|card| *card == cards[rank]).unwrap_or(0);
        tracing::warn!(
            "ranks {other} and {rank} share a card: their numbers go through the hosts, not through NCCL, which is slow"
        );
        return Ok(Box::new(Staged::new(line)));
    }
    connect_cards(backend, line, patience, one_shot)
}

/// As [`connect`], through NCCL in any case, also for a rank that is alone; sums of up to `one_shot` through the cards'
/// memory, where all ranks' cards see each other's.
///
/// # Errors
/// As [`connect`]; when two ranks share a card.
pub fn connect_cards<C>(
    backend: &CudaBackend,
    mut line: C,
    patience: Patience,
    one_shot: Bytes,
) -> Result<CardLine, Error>
where
    C: Collective<[f32]> + 'static,
{
    let rank = line.rank();
    let nccl = Nccl::find();
    let found = told(&mut line, &[u8::from(nccl.is_ok())])?;
    let nccl = nccl?;
    if let Some(rank) = found.iter().position(|found| *found == [0]) {
        let reason = format!("rank {rank} does not find it; its own log says how to get it");
        let (version, call) = (nccl.version(), "looking for the library on every rank");
        return Err(Error::Nccl { rank: u32::try_from(rank).unwrap_or(u32::MAX), version, call, reason });
    }
    let mut id = [0.0; ID_BYTES];
    if rank.is_leader() {
        id = nccl.unique_id(rank)?.map(f32::from);
    }
    line.broadcast(0, &mut id)?;
    let before = backend.memory_free()?;
    let communicator = Communicator::join(nccl, &id.map(byte), rank, patience.boot)?;
    let taken = Bytes(before.0.saturating_sub(backend.memory_free()?.0));
    tracing::info!(version = nccl.version(), ranks = rank.size().get(), memory = %taken, "cards talk through NCCL");
    let one_shot = usize::try_from(one_shot.0).unwrap_or(usize::MAX);
    let peer = meet::meet(backend, &mut line, one_shot)?.map(Rc::new);
    let watch = Rc::new(Watch::new(communicator, peer, Box::new(line), patience.step)?);
    backend.device().watch(Rc::clone(&watch));
    Ok(Box::new(Cards::new(watch)))
}

/// Which of its machine's ranks each rank is, counted from 0: `own` of this rank. All ranks call it together.
///
/// # Errors
/// When a rank is lost or late.
pub fn place_on_machine<C: Collective<[f32]>>(line: &mut C) -> Result<usize, Error> {
    let rank = line.rank().as_usize();
    if line.rank().size().as_usize() == 1 {
        return Ok(0);
    }
    let machines = told(line, &machine())?;
    Ok(machines[..rank].iter().filter(|machine| **machine == machines[rank]).count())
}

/// What tells this machine apart. Two containers on one machine have cards of their own and names of their own.
fn machine() -> [u8; 16] {
    let read = |path| fs::read(path).unwrap_or_default();
    let name = [read("/proc/sys/kernel/random/boot_id"), read("/proc/sys/kernel/hostname")].concat();
    let digest = Sha256::digest(name);
    std::array::from_fn(|i| digest[i])
}

/// Tells every rank the same number of bytes, and hears theirs.
fn told<C: Collective<[f32]>>(line: &mut C, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let own: Vec<f32> = own.iter().map(|&byte| f32::from(byte)).collect();
    let ranks = line.rank().size().as_usize();
    let mut all = vec![0.0; ranks * own.len()];
    line.all_gather(&own, &vec![own.len(); ranks], &mut all)?;
    Ok(all.chunks_exact(own.len()).map(|rank| rank.iter().map(|&number| byte(number)).collect()).collect())
}

/// A byte that travelled as a number.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "made of a byte by `f32::from`")]
const fn byte(number: f32) -> u8 {
    number as u8
}
