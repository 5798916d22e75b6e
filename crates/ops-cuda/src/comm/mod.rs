//! How a group's ranks talk about tensors on their cards. A rank that is alone copies; ranks with a card each use NCCL,
//! found at run time; ranks that share a card, which NCCL does not allow, send their numbers through the hosts.

mod cards;
mod solo;
mod staged;
mod watch;

use std::fs;
use std::rc::Rc;
use std::time::Duration;

use collectives::Collective;
use sha2::{Digest, Sha256};

pub use self::solo::SoloDevice;
pub use self::staged::Staged;

use self::cards::Cards;
pub(crate) use self::watch::Watch;
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

/// The line between the cards of a group; `line` connects their hosts. All ranks call it together.
///
/// # Errors
/// When a rank that needs NCCL does not have it, named; when the ranks do not come together in time.
pub fn connect<C>(backend: &CudaBackend, mut line: C, patience: Patience) -> Result<CardLine, Error>
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
    connect_nccl(backend, line, patience)
}

/// As [`connect`], through NCCL in any case, also for a rank that is alone.
///
/// # Errors
/// As [`connect`]; when two ranks share a card.
pub fn connect_nccl<C>(backend: &CudaBackend, mut line: C, patience: Patience) -> Result<CardLine, Error>
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
    let communicator = Communicator::join(nccl, &id.map(byte), rank, patience.boot)?;
    tracing::info!(version = nccl.version(), ranks = rank.size().get(), "cards talk through NCCL");
    let watch = Rc::new(Watch::new(communicator, Box::new(line), patience.step));
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
    // Two containers on one machine have cards of their own and names of their own.
    let read = |path| fs::read(path).unwrap_or_default();
    let name = [read("/proc/sys/kernel/random/boot_id"), read("/proc/sys/kernel/hostname")].concat();
    let machines = told(line, &Sha256::digest(name)[..16])?;
    Ok(machines[..rank].iter().filter(|machine| **machine == machines[rank]).count())
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
