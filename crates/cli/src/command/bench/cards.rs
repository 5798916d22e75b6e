//! All-reduces between cards, one rank a thread: what one takes inside a recorded graph, by NCCL or through the cards' memory.

use std::thread;

use anyhow::{anyhow, bail};
use collectives::{Collective, InProcess, Op};
use ops::{Backend, Batch, Norm};
use ops_cuda::{CardLine, CudaBackend, KernelCache, Options};
use types::{Bytes, DType, TpRank, TpSize};

use super::collectives::{CollectivesArgs, Measured, Operation, Transport};
use super::machine::{PATIENCE, weight};
use super::steps::median;

/// Operations in one graph: few of what takes long.
const GRAPHED: u32 = 64;
const GRAPHED_LARGE: u32 = 8;
const LARGE_BYTES: u32 = 4 << 20;
/// Launches before the measured ones, and measured ones at least.
const WARM_UP: u32 = 3;
const LAUNCHES_MIN: u32 = 10;
/// Largest sum through the cards' memory that is measured.
const ONE_SHOT_MAX: u32 = 8 << 20;
/// H of the rows that end in a norm, and rows at most.
const WIDTH: usize = 2048;
const ROWS_MAX: usize = 64;
/// Memory for what is not the numbers themselves.
const SPARE: u64 = 64 << 20;

/// All-reduces at every size, plain and with the norm that ends a layer, as rank 0 sees them.
pub(super) fn measure(
    args: &CollectivesArgs,
    size: TpSize,
    transport: Transport,
) -> anyhow::Result<Vec<Measured>> {
    let cards = ops_cuda::probe()?.cards.len();
    if cards < size.as_usize() {
        bail!("--ranks {size} between cards needs as many of them, and there are {cards}");
    }
    thread::scope(|scope| {
        let each = size.ranks().zip(InProcess::group(size, PATIENCE.step));
        let running: Vec<_> =
            each.map(|(rank, line)| scope.spawn(move || of_rank(args, transport, rank, line))).collect();
        let mut found = Vec::new();
        for thread in running {
            found.push(thread.join().map_err(|_| anyhow!("a rank's thread ended"))??);
        }
        Ok(found.swap_remove(0))
    })
}

fn of_rank(
    args: &CollectivesArgs,
    transport: Transport,
    rank: TpRank,
    line: InProcess,
) -> anyhow::Result<Vec<Measured>> {
    let one_shot = transport == Transport::OneShot;
    let sizes: Vec<u32> =
        args.bytes.iter().copied().filter(|&bytes| !one_shot || bytes <= ONE_SHOT_MAX).collect();
    let most = sizes.iter().copied().max().unwrap_or(0);
    let options = Options {
        ordinal: rank.as_usize(),
        dtype: DType::BF16,
        activations: Bytes(3 * u64::from(most) + SPARE),
        cache: KernelCache::user(),
        heads: None,
    };
    let mut backend = CudaBackend::new(&options)?;
    let by_memory = Bytes(if one_shot { u64::from(most) } else { 0 });
    let mut line = ops_cuda::connect_cards(&backend, line, PATIENCE, by_memory)?;
    backend.begin_step(&Batch::default())?;
    let mut found = Vec::new();
    let mut keep = |operation, bytes: u32, us: f64| {
        let bytes_per_s = Some(f64::from(bytes) / us * 1e6);
        found.push(Measured { transport, operation, ranks: args.ranks, bytes, us, bytes_per_s });
    };
    for &bytes in &sizes {
        let us = plain(&mut backend, &mut line, (bytes, args.repeats))?;
        keep(Operation::AllReduceSum, bytes, us);
    }
    for &bytes in &sizes {
        let elements = bytes as usize / size_of::<f32>();
        let width = elements.min(WIDTH);
        let rows = elements / width;
        if width.is_multiple_of(8) && rows <= ROWS_MAX {
            let us = with_norm(&mut backend, &mut line, (rows, width), args.repeats)?;
            keep(Operation::AllReduceNorm, bytes, us);
        }
    }
    let by_memory = line.counters().of(Op::AllReduce).messages_sent > 0;
    if one_shot && !by_memory {
        bail!(
            "the cards do not see each other's memory (the log says why), so there is no one-shot to measure"
        );
    }
    Ok(found)
}

/// Microseconds of one operation, the median over the launches.
fn time(
    backend: &mut CudaBackend,
    (bytes, repeats): (u32, u32),
    op: impl FnMut(&mut CudaBackend) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let graphed = if bytes > LARGE_BYTES { GRAPHED_LARGE } else { GRAPHED };
    let launches = repeats.div_ceil(graphed).max(LAUNCHES_MIN) + WARM_UP;
    let times = backend.time_recorded((graphed, launches), op)?;
    Ok(median(times.iter().skip(WARM_UP as usize).map(|time| time.as_secs_f64() * 1e6).collect()))
}

fn plain(
    backend: &mut CudaBackend,
    line: &mut CardLine,
    (bytes, repeats): (u32, u32),
) -> anyhow::Result<f64> {
    let mut data = backend.buffer(1, bytes as usize / size_of::<f32>())?;
    time(backend, (bytes, repeats), |_| Ok(line.all_reduce_sum(&mut data)?))
}

/// As a layer ends: the sum is added to the residual stream, whose norm is made.
fn with_norm(
    backend: &mut CudaBackend,
    line: &mut CardLine,
    (rows, width): (usize, usize),
    repeats: u32,
) -> anyhow::Result<f64> {
    let weight = backend.dummy_weight(&weight(&[width], 80))?;
    let stream = backend.buffer(rows, width)?;
    let mut stream = Some(backend.round(stream)?);
    let bytes = u32::try_from(rows * width * size_of::<f32>())?;
    time(backend, (bytes, repeats), |backend| {
        let mut sum = backend.buffer(rows, width)?;
        if !line.begin_all_reduce_sum(&sum)? {
            line.all_reduce_sum(&mut sum)?;
        }
        let Some(x) = stream.take() else { bail!("the residual stream was lost") };
        let (x, _) = backend.residual_norm(x, (sum, None), (&weight, Norm::Rms { eps: 1e-6 }))?;
        stream = Some(x);
        Ok(())
    })
}
