//! `cohort bench collectives`: what the ranks of a group say to each other, in one process: on the CPU's transports, and
//! between cards (`cards.rs`).

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use collectives::{Collective, InProcess, Member, Rendezvous, RendezvousOptions, TcpOptions, join};
use serde::Serialize;
use serde_json::json;
use types::{TpRank, TpSize};

use super::cards;
use super::steps::median;
use crate::out::say;
use crate::table::{Align, Table};

/// Operations before the measured ones.
const WARM_UP: u32 = 8;
/// Longest wait for a rank.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a rank looks for data before it sleeps, as workers do.
const SPIN: Duration = Duration::from_micros(20);
const ANYWHERE: &str = "127.0.0.1:0";

const MORE: &str = "\
Between cards (nccl, one-shot) each time is that of the card, of many operations recorded in one graph.

Examples:
  cohort bench collectives --ranks 4 --bytes 4096,1048576
  cohort bench collectives --transport nccl,one-shot --bytes 4096,65536,1048576,67108864";

/// Flags of `cohort bench collectives`.
#[derive(Debug, Clone, PartialEq, clap::Args)]
#[command(after_help = MORE)]
pub struct CollectivesArgs {
    /// Ranks of the group
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=128))]
    pub ranks: u32,
    /// How they are connected; several separated by commas
    #[arg(long, value_enum, value_name = "NAME,…", value_delimiter = ',', default_values_t = [Transport::InProcess, Transport::Tcp])]
    pub transport: Vec<Transport>,
    /// Bytes each rank brings; several separated by commas
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [4096, 65_536, 1_048_576], value_parser = clap::value_parser!(u32).range(4..=1 << 30))]
    pub bytes: Vec<u32>,
    /// Measured operations of each kind; the median counts
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub repeats: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How ranks are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// Threads that read each other's memory.
    InProcess,
    /// Sockets of the loopback interface.
    Tcp,
    /// A card each: all-reduces by NCCL, in a recorded graph.
    Nccl,
    /// A card each: all-reduces through the cards' memory, in a recorded graph; sizes above 8 MiB are left out.
    OneShot,
}

impl Transport {
    /// As the command line has it.
    const fn name(self) -> &'static str {
        match self {
            Self::InProcess => "in-process",
            Self::Tcp => "tcp",
            Self::Nccl => "nccl",
            Self::OneShot => "one-shot",
        }
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Operation {
    AllReduceSum,
    /// With the residual stream and its norm, as a layer ends.
    AllReduceNorm,
    ReduceScatterSum,
    AllGather,
    AllToAllV,
    Barrier,
}

impl Operation {
    /// Those of the CPU's transports.
    const ALL: [Self; 5] =
        [Self::AllReduceSum, Self::ReduceScatterSum, Self::AllGather, Self::AllToAllV, Self::Barrier];

    const fn name(self) -> &'static str {
        match self {
            Self::AllReduceSum => "all_reduce_sum",
            Self::AllReduceNorm => "all_reduce_norm",
            Self::ReduceScatterSum => "reduce_scatter_sum",
            Self::AllGather => "all_gather",
            Self::AllToAllV => "all_to_all_v",
            Self::Barrier => "barrier",
        }
    }
}

/// One operation at one size.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measured {
    pub(super) transport: Transport,
    pub(super) operation: Operation,
    pub(super) ranks: u32,
    pub(super) bytes: u32,
    pub(super) us: f64,
    /// Bytes a rank brings over the time; none of a barrier, which carries nothing.
    pub(super) bytes_per_s: Option<f64>,
}

pub(super) fn run(args: &CollectivesArgs) -> anyhow::Result<()> {
    let size = TpSize::new(args.ranks)?;
    let mut rows = Vec::new();
    for &transport in &args.transport {
        rows.extend(match transport {
            Transport::InProcess => measure(args, transport, InProcess::group(size, DEADLINE))?,
            Transport::Tcp => measure(args, transport, tcp_group(size)?)?,
            Transport::Nccl | Transport::OneShot => cards::measure(args, size, transport)?,
        });
    }
    if args.json {
        say!("{}", json!({ "ranks": args.ranks, "repeats": args.repeats, "collectives": rows }));
        return Ok(());
    }
    let [left, right] = [Align::Left, Align::Right];
    let mut table = Table::new([left, left, right, right, right, right]);
    table.row(["transport", "operation", "ranks", "bytes", "µs", "GB/s"].map(str::to_owned));
    for row in rows {
        let bytes = row.bytes_per_s.map(|_| row.bytes.to_string()).unwrap_or_default();
        table.row([
            row.transport.name().to_owned(),
            row.operation.name().to_owned(),
            row.ranks.to_string(),
            bytes,
            format!("{:.1}", row.us),
            row.bytes_per_s.map(|rate| format!("{:.3}", rate / 1e9)).unwrap_or_default(),
        ]);
    }
    table.lines().for_each(|line| say!("{line}"));
    Ok(())
}

/// Every operation at every size, as rank 0 sees it.
fn measure<C: Collective<[f32]> + Send>(
    args: &CollectivesArgs,
    transport: Transport,
    group: Vec<C>,
) -> anyhow::Result<Vec<Measured>> {
    let rank = |mut line: C| -> Result<Vec<Measured>, collectives::Error> {
        let mut rows = Vec::new();
        for operation in Operation::ALL {
            // A barrier has no size.
            let sizes = if operation == Operation::Barrier { &args.bytes[..1] } else { &args.bytes[..] };
            for &bytes in sizes {
                let time = time(&mut line, operation, (bytes, args.repeats))?;
                let bytes_per_s = (operation != Operation::Barrier).then(|| f64::from(bytes) / time);
                rows.push(Measured {
                    transport,
                    operation,
                    ranks: args.ranks,
                    bytes,
                    us: time * 1e6,
                    bytes_per_s,
                });
            }
        }
        Ok(rows)
    };
    thread::scope(|scope| {
        let rank = &rank;
        let running: Vec<_> = group.into_iter().map(|line| scope.spawn(move || rank(line))).collect();
        let mut found = Vec::new();
        for thread in running {
            found.push(thread.join().map_err(|_| anyhow!("a rank's thread ended"))??);
        }
        Ok(found.swap_remove(0))
    })
}

/// Seconds of one operation, the median.
fn time<C: Collective<[f32]>>(
    line: &mut C,
    operation: Operation,
    (bytes, repeats): (u32, u32),
) -> Result<f64, collectives::Error> {
    let ranks = line.rank().size().as_usize();
    let each = (bytes as usize / size_of::<f32>()).div_ceil(ranks).max(1);
    let (mut data, mut all) = (vec![1.0_f32; each * ranks], vec![0.0_f32; each * ranks]);
    let mut own = vec![1.0_f32; each];
    let counts = vec![each; ranks];
    let mut times = Vec::new();
    for round in 0..WARM_UP + repeats {
        line.barrier()?;
        let started = Instant::now();
        match operation {
            Operation::AllReduceSum | Operation::AllReduceNorm => line.all_reduce_sum(&mut data)?,
            Operation::ReduceScatterSum => line.reduce_scatter_sum(&data, &counts, &mut own)?,
            Operation::AllGather => line.all_gather(&own, &counts, &mut all)?,
            Operation::AllToAllV => line.all_to_all_v(&data, &counts, &mut all, &counts)?,
            Operation::Barrier => line.barrier()?,
        }
        if round >= WARM_UP {
            times.push(started.elapsed().as_secs_f64());
        }
        // Sums of sums would overflow.
        data.fill(1.0);
    }
    Ok(median(times))
}

/// Ranks of this process that meet as workers do.
fn tcp_group(size: TpSize) -> anyhow::Result<Vec<collectives::Tcp>> {
    let tcp = TcpOptions { deadline: DEADLINE, spin: SPIN };
    let options = RendezvousOptions { within: DEADLINE, tcp, ..RendezvousOptions::default() };
    let member = |rank: TpRank| Member { rank, plan: "bench".to_owned(), config_hash: [0; 32] };
    let rendezvous = Rendezvous::bind(ANYWHERE.parse().context("the loopback address")?)?;
    let address = rendezvous.local_addr().to_string();
    let joined = thread::scope(|scope| {
        let (options, address) = (&options, &address);
        let followers: Vec<_> = size
            .ranks()
            .filter(|rank| !rank.is_leader())
            .map(|rank| scope.spawn(move || join(address, &member(rank), options)))
            .collect();
        let mut joined = vec![rendezvous.lead(&member(TpRank::new(0, size)?), options)?];
        for follower in followers {
            joined.push(follower.join().map_err(|_| anyhow!("a rank's thread ended"))??);
        }
        anyhow::Ok(joined)
    })?;
    Ok(joined.into_iter().map(|joined| joined.collective).collect())
}
