//! Rows on their way to the ranks that hold their experts, and back.

use ops::{Error, ExpertOwners, ExpertSlots};
use types::TokenId;

use crate::route::Routed;
use crate::tensor::Tensor;

/// Rows of `routed` that chose an expert of rank `owner`, ascending.
fn rows_for(routed: &Routed, owners: ExpertOwners, owner: usize) -> impl Iterator<Item = usize> {
    let rows = routed.experts.chunks_exact(routed.top_k).enumerate();
    let chose = move |chosen: &[u32]| chosen.iter().any(|&expert| owners.owner(expert as usize) == owner);
    rows.filter(move |(_, chosen)| chose(chosen)).map(|(row, _)| row)
}

/// See [`ops::Backend::place`]; `rows` are the token and position of each row.
pub(crate) fn place(
    routed: &mut Routed,
    slots: &ExpertSlots,
    rows: impl Iterator<Item = (TokenId, u32)>,
) -> Result<(), Error> {
    for (chosen, (token, position)) in routed.experts.chunks_exact_mut(routed.top_k).zip(rows) {
        for expert in chosen {
            if *expert as usize >= slots.experts() {
                let detail = format!("expert {expert} of {} that have slots", slots.experts());
                return Err(Error::Shape { op: "place", detail });
            }
            *expert = slots.of_row(*expert as usize, token, position);
        }
    }
    Ok(())
}

/// See [`ops::Backend::pack`].
pub(crate) fn pack(
    x: &Tensor,
    routed: &Routed,
    owners: ExpertOwners,
    counts: &mut Vec<usize>,
) -> Result<Tensor, Error> {
    let k = routed.top_k;
    if routed.experts.len() != x.rows() * k {
        let detail = format!("{} rows with {} choices, {k} a row", x.rows(), routed.experts.len());
        return Err(Error::Shape { op: "pack", detail });
    }
    let width = x.width() + 2 * k;
    let most = routed.experts.len().min(x.rows() * owners.ranks) * width;
    counts.clear();
    Ok(Tensor::collect(width, most, |data| {
        for owner in 0..owners.ranks {
            let before = data.len();
            for row in rows_for(routed, owners, owner) {
                data.extend_from_slice(x.row(row));
                // Expert numbers are far below 2^24, so fp32 holds them exactly.
                data.extend(routed.experts[row * k..(row + 1) * k].iter().map(|&expert| expert as f32));
                data.extend_from_slice(&routed.weights[row * k..(row + 1) * k]);
            }
            counts.push((data.len() - before) / width);
        }
    }))
}

/// See [`ops::Backend::unpack`].
pub(crate) fn unpack(packed: &Tensor, hidden: usize) -> Result<(Tensor, Routed), Error> {
    let Some(extra) = packed.width().checked_sub(hidden).filter(|extra| *extra > 0 && extra % 2 == 0) else {
        let detail = format!("rows of {} are not {hidden} and pairs of expert and weight", packed.width());
        return Err(Error::Shape { op: "unpack", detail });
    };
    let top_k = extra / 2;
    let rows = packed.rows();
    let mut routed = Routed::with_room(rows, top_k);
    let x = Tensor::collect(hidden, rows * hidden, |x| {
        for row in packed.as_slice().chunks_exact(packed.width()) {
            let (values, chosen) = row.split_at(hidden);
            let (experts, weights) = chosen.split_at(top_k);
            x.extend_from_slice(values);
            routed.experts.extend(experts.iter().map(|&expert| expert as u32));
            routed.weights.extend_from_slice(weights);
        }
    });
    Ok((x, routed))
}

/// See [`ops::Backend::combine`].
pub(crate) fn combine(returned: &Tensor, routed: &Routed, owners: ExpertOwners) -> Result<Tensor, Error> {
    let rows = routed.experts.len() / routed.top_k;
    let sources = (0..owners.ranks).flat_map(|owner| rows_for(routed, owners, owner));
    let mut sum = Tensor::zeros(rows, returned.width());
    let (out, width) = (sum.as_mut_slice(), returned.width());
    let mut used = 0;
    for (source, part) in sources.zip(returned.as_slice().chunks_exact(width)) {
        let out = &mut out[source * width..(source + 1) * width];
        out.iter_mut().zip(part).for_each(|(o, &p)| *o += p);
        used += 1;
    }
    let sent: usize = (0..owners.ranks).map(|owner| rows_for(routed, owners, owner).count()).sum();
    if used != sent || used != returned.rows() {
        let detail = format!("{} rows came back for {sent} that were sent", returned.rows());
        return Err(Error::Shape { op: "combine", detail });
    }
    Ok(sum)
}
