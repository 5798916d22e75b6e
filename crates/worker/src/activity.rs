//! What the ranks have done, as routers and tools are told.

use collectives::Op;
use model::Activity;
use proto::worker::{CollectiveActivity, GroupActivity, LayerChoices, RankActivity};
use types::TpSize;

/// The parallel plan of a group.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// In words.
    pub(crate) name: String,
    /// Ranks of a sub-group: those compute the same rows.
    pub(crate) tensor: TpSize,
}

/// The message of a group with this plan whose ranks did this.
pub(crate) fn wire(plan: &Plan, ranks: &[Activity]) -> GroupActivity {
    let rows: u64 = ranks.iter().map(|rank| rank.rows).sum();
    GroupActivity {
        plan: plan.name.clone(),
        ranks: ranks.iter().map(rank).collect(),
        layers: layers(ranks),
        tokens: rows / u64::from(plan.tensor.get()),
    }
}

fn rank(activity: &Activity) -> RankActivity {
    let of = |op: Op| {
        let traffic = activity.collectives.of(op);
        CollectiveActivity {
            operation: op.name().to_owned(),
            calls: traffic.ops,
            messages_sent: traffic.messages_sent,
            bytes_sent: traffic.bytes_sent,
            bytes_received: traffic.bytes_received,
            seconds: activity.collectives.time(op).as_secs_f64(),
        }
    };
    RankActivity {
        steps: activity.steps,
        rows: activity.rows,
        rows_sent: activity.rows_sent,
        rows_received: activity.rows_received,
        collectives: Op::ALL.into_iter().map(of).filter(|of| of.calls > 0).collect(),
    }
}

/// Choices of the whole group. Ranks that send rows route a slice each; the others all route the same rows.
fn layers(ranks: &[Activity]) -> Vec<LayerChoices> {
    let Some(first) = ranks.first() else { return Vec::new() };
    if first.chosen.iter().flatten().all(|count| *count == 0) && first.collectives.of(Op::AllToAll).ops == 0 {
        return Vec::new();
    }
    let routing = if first.collectives.of(Op::AllToAll).ops > 0 { ranks } else { &ranks[..1] };
    let layer = |at: usize| {
        let mut chosen = vec![0; first.chosen[at].len()];
        for of_rank in routing {
            chosen.iter_mut().zip(&of_rank.chosen[at]).for_each(|(sum, count)| *sum += count);
        }
        LayerChoices { chosen }
    };
    (0..first.chosen.len()).map(layer).collect()
}
