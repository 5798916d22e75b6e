//! Rows on their way to the ranks that hold their experts, and back. Which row goes where is worked out on the host: it
//! must know the counts for the exchange anyway, so each sparse layer of such a plan waits for its router once.

use std::cell::OnceCell;
use std::ops::Range;

use ops::{Error, ExpertOwners, ExpertSlots};
use types::{DType, TokenId};

use crate::arena::Piece;
use crate::backend::CudaBackend;
use crate::device::Grid;
use crate::kernels::{Address, CombineRowsParams, PackParams, SumParams, UnpackParams};
use crate::tensor::{Routed, Tensor, size};

const WORD: usize = size_of::<u32>();

/// Rows that chose an expert of rank `owner`, ascending.
fn rows_for(
    experts: &[u32],
    top_k: usize,
    owners: ExpertOwners,
    owner: usize,
) -> impl Iterator<Item = usize> {
    let chose = move |chosen: &[u32]| chosen.iter().any(|&expert| owners.owner(expert as usize) == owner);
    experts.chunks_exact(top_k).enumerate().filter(move |(_, chosen)| chose(chosen)).map(|(row, _)| row)
}

/// Where the rows that came back belong: row t of the batch takes `place[first[t]..first[t + 1]]`, in rank order.
fn places(experts: &[u32], top_k: usize, owners: ExpertOwners) -> (Vec<u32>, Vec<u32>) {
    let mut of_row = vec![Vec::new(); experts.len() / top_k];
    let sources = (0..owners.ranks).flat_map(|owner| rows_for(experts, top_k, owners, owner));
    for (back, row) in (0_u32..).zip(sources) {
        of_row[row].push(back);
    }
    let mut first = vec![0];
    let mut place = Vec::new();
    for backs in of_row {
        place.extend(backs);
        first.push(u32::try_from(place.len()).unwrap_or(u32::MAX));
    }
    (first, place)
}

impl CudaBackend {
    fn words(&self, from: Address, count: usize) -> Result<Vec<u32>, Error> {
        let mut bytes = vec![0; count * WORD];
        self.device().download(&mut bytes, from)?;
        Ok(bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect())
    }

    fn upload_words(&self, words: &[u32]) -> Result<Piece, Error> {
        let piece = Piece::new(self.device(), words.len() * WORD)?;
        if !words.is_empty() {
            self.device().upload(piece.address(), words)?;
        }
        Ok(piece)
    }

    /// The choices of `routed` on the host, copied once.
    fn choices<'a>(&self, routed: &'a Routed) -> Result<&'a [u32], Error> {
        if let Some(there) = routed.on_host.get() {
            return Ok(there);
        }
        self.settle(routed)?;
        let words = self.words(routed.experts.address(), routed.rows * routed.top_k)?;
        Ok(routed.on_host.get_or_init(|| words))
    }

    /// See [`ops::Backend::place`].
    pub(crate) fn place_choices(
        &self,
        routed: Routed,
        slots: &ExpertSlots,
        first_row: usize,
    ) -> Result<Routed, Error> {
        let (rows, top_k) = (routed.rows, routed.top_k);
        let batch = self.step().rows();
        if first_row + rows > batch {
            let detail = format!("rows {first_row}..{} of a step of {batch}", first_row + rows);
            return Err(Error::Shape { op: "place", detail });
        }
        let mut chosen = self.choices(&routed)?.to_vec();
        let at = |start: Address| start + (first_row * WORD) as u64;
        let tokens = self.words(at(self.step().tokens()), rows)?;
        let positions = self.words(at(self.step().positions()), rows)?;
        for (chosen, (&token, &position)) in chosen.chunks_exact_mut(top_k).zip(tokens.iter().zip(&positions))
        {
            for expert in chosen {
                if *expert as usize >= slots.experts() {
                    let detail = format!("expert {expert} of {} that have slots", slots.experts());
                    return Err(Error::Shape { op: "place", detail });
                }
                *expert = slots.of_row(*expert as usize, TokenId(token), position);
            }
        }
        let experts = self.upload_words(&chosen)?;
        Ok(Routed {
            experts,
            weights: routed.weights,
            rows,
            top_k,
            left: None,
            on_host: OnceCell::from(chosen),
        })
    }

    /// See [`ops::Backend::slice_rows`].
    pub(crate) fn slice(&self, x: &Tensor, rows: Range<usize>) -> Result<Tensor, Error> {
        if rows.start > rows.end || rows.end > x.rows() {
            let detail = format!("rows {rows:?} of {}", x.rows());
            return Err(Error::Shape { op: "slice_rows", detail });
        }
        let out = Tensor::new(self.device(), rows.len(), x.width(), x.dtype())?;
        let from = x.address() + (rows.start * x.width() * x.dtype().bytes()) as u64;
        self.device().copy(out.address(), from, out.bytes())?;
        Ok(out)
    }

    /// See [`ops::Backend::pack`].
    pub(crate) fn pack_rows(
        &self,
        (x, routed): (&Tensor, &Routed),
        owners: ExpertOwners,
        counts: &mut Vec<usize>,
    ) -> Result<Tensor, Error> {
        let k = routed.top_k;
        if routed.rows != x.rows() {
            let detail = format!("{} rows with the choices of {}", x.rows(), routed.rows);
            return Err(Error::Shape { op: "pack", detail });
        }
        let experts = self.choices(routed)?;
        let mut source: Vec<u32> = Vec::with_capacity(experts.len());
        counts.clear();
        for owner in 0..owners.ranks {
            let before = source.len();
            source.extend(
                rows_for(experts, k, owners, owner).map(|row| u32::try_from(row).unwrap_or(u32::MAX)),
            );
            counts.push(source.len() - before);
        }
        let rows = Tensor::new(self.device(), source.len(), x.width() + 2 * k, DType::F32)?;
        let indices = self.upload_words(&source)?;
        let params = PackParams {
            out: rows.address(),
            x: x.address(),
            experts: routed.experts.address(),
            weights: routed.weights.address(),
            source: indices.address(),
            width: size("pack", x.width())?,
            top_k: size("pack", k)?,
            x_f32: x.is_f32(),
        };
        let grid = Grid::new(size("pack", source.len())?, 1, 256);
        self.device().launch(self.device().kernels.pack, grid, &params)?;
        Ok(rows)
    }

    /// See [`ops::Backend::unpack`].
    pub(crate) fn unpack_rows(&self, packed: &Tensor, hidden: usize) -> Result<(Tensor, Routed), Error> {
        let extra = packed.width().checked_sub(hidden).filter(|extra| *extra > 0 && extra.is_multiple_of(2));
        let (Some(extra), DType::F32) = (extra, packed.dtype()) else {
            let (width, dtype) = (packed.width(), packed.dtype());
            let detail =
                format!("rows of {width} {dtype} are not {hidden} and pairs of expert and weight in f32");
            return Err(Error::Shape { op: "unpack", detail });
        };
        let (rows, top_k) = (packed.rows(), extra / 2);
        let x = self.tensor(rows, hidden)?;
        let routed = Routed {
            experts: Piece::new(self.device(), rows * top_k * WORD)?,
            weights: Piece::new(self.device(), rows * top_k * WORD)?,
            rows,
            top_k,
            left: None,
            on_host: OnceCell::new(),
        };
        let params = UnpackParams {
            x: x.address(),
            experts: routed.experts.address(),
            weights: routed.weights.address(),
            rows: packed.address(),
            width: size("unpack", hidden)?,
            top_k: size("unpack", top_k)?,
        };
        let grid = Grid::new(size("unpack", rows)?, 1, 256);
        self.device().launch(self.device().kernels.unpack, grid, &params)?;
        Ok((x, routed))
    }

    /// See [`ops::Backend::combine`].
    pub(crate) fn combine_rows(
        &self,
        returned: &Tensor,
        routed: &Routed,
        owners: ExpertOwners,
    ) -> Result<Tensor, Error> {
        let (first, place) = places(self.choices(routed)?, routed.top_k, owners);
        if place.len() != returned.rows() || returned.dtype() != DType::F32 {
            let (back, dtype) = (returned.rows(), returned.dtype());
            let detail =
                format!("{back} rows of {dtype} came back for {} of f32 that were sent", place.len());
            return Err(Error::Shape { op: "combine", detail });
        }
        let width = returned.width();
        let out = Tensor::new(self.device(), routed.rows, width, DType::F32)?;
        let (first, place) = (self.upload_words(&first)?, self.upload_words(&place)?);
        let params = CombineRowsParams {
            out: out.address(),
            returned: returned.address(),
            first: first.address(),
            place: place.address(),
            width: size("combine", width)?,
        };
        let grid = Grid::new(size("combine", routed.rows)?, 1, 256);
        self.device().launch(self.device().kernels.combine_rows, grid, &params)?;
        Ok(out)
    }

    /// See [`ops::Backend::add_rows`].
    pub(crate) fn add_some_rows(
        &self,
        a: Tensor,
        first_row: usize,
        b: &Tensor,
        scale: f32,
    ) -> Result<Tensor, Error> {
        if a.width() != b.width() || first_row + b.rows() > a.rows() || a.dtype() != DType::F32 {
            let (have, from, more) = (a.rows(), a.width(), b.width());
            let detail =
                format!("rows {first_row}..{} of {have}, {more} wide on {from}, f32", first_row + b.rows());
            return Err(Error::Shape { op: "add_rows", detail });
        }
        let at = a.address() + (first_row * a.width() * WORD) as u64;
        let params = SumParams {
            out: at,
            a: at,
            b: b.address(),
            count: b.elements() as u64,
            scale,
            out_f32: 1,
            a_f32: 1,
            b_f32: b.is_f32(),
        };
        self.device().launch(self.device().kernels.sum, Grid::over(b.elements()), &params)?;
        Ok(a)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNERS: ExpertOwners = ExpertOwners { ranks: 3, experts_each: 2 };
    /// Four rows, two choices each: ranks 0 and 2; 1; 0; 1 and 2.
    const EXPERTS: [u32; 8] = [0, 5, 2, 3, 1, 0, 3, 4];

    #[test]
    fn a_row_goes_once_to_every_rank_that_holds_one_of_its_experts() {
        let of = |owner| rows_for(&EXPERTS, 2, OWNERS, owner).collect::<Vec<_>>();
        assert_eq!([of(0), of(1), of(2)], [vec![0, 2], vec![1, 3], vec![0, 3]]);
    }

    #[test]
    fn what_comes_back_is_added_up_in_rank_order() {
        let (first, place) = places(&EXPERTS, 2, OWNERS);
        assert_eq!(first, [0, 2, 3, 4, 6]);
        assert_eq!(place, [0, 4, 2, 1, 3, 5]);
    }
}
