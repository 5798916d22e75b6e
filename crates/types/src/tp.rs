//! Who is who among the ranks of a group.

use std::fmt;
use std::ops::Range;

use crate::Error;
use crate::limits::RANKS_MAX;

/// How many ranks share a tensor-parallel model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TpSize(u32);

impl TpSize {
    /// A group of one: nothing is split, nothing is reduced.
    pub const ONE: Self = Self(1);

    /// A group of `size` ranks.
    ///
    /// # Errors
    /// [`Error::Count`] when `size` is 0 or above [`RANKS_MAX`].
    pub const fn new(size: u32) -> Result<Self, Error> {
        if size == 0 || size > RANKS_MAX {
            return Err(Error::Count {
                what: "tensor parallel size",
                got: size as u64,
                max: RANKS_MAX as u64,
            });
        }
        Ok(Self(size))
    }

    /// The number of ranks.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number of ranks as an index type.
    #[must_use]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }

    /// Every rank of the group, in order.
    pub fn ranks(self) -> impl Iterator<Item = TpRank> {
        (0..self.0).map(move |index| TpRank { index, size: self })
    }
}

/// One rank of a group; always below the group's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TpRank {
    index: u32,
    size: TpSize,
}

impl TpRank {
    /// The only rank of a group of one.
    pub const SOLO: Self = Self { index: 0, size: TpSize::ONE };

    /// Rank `index` of a group of `size`.
    ///
    /// # Errors
    /// [`Error::Rank`] when `index` is not below `size`.
    pub const fn new(index: u32, size: TpSize) -> Result<Self, Error> {
        if index >= size.0 {
            return Err(Error::Rank { rank: index, size: size.0 });
        }
        Ok(Self { index, size })
    }

    /// The rank's number, from 0.
    #[must_use]
    pub const fn index(self) -> u32 {
        self.index
    }

    /// The rank's number as an index type.
    #[must_use]
    pub const fn as_usize(self) -> usize {
        self.index as usize
    }

    /// The size of the group.
    #[must_use]
    pub const fn size(self) -> TpSize {
        self.size
    }

    /// Rank 0 plans and samples; the others follow.
    #[must_use]
    pub const fn is_leader(self) -> bool {
        self.index == 0
    }

    /// This rank's equal share of `count` items, or `None` when `count` does not divide by the group size.
    #[must_use]
    pub const fn share_of(self, count: usize) -> Option<Range<usize>> {
        let size = self.size.0 as usize;
        if !count.is_multiple_of(size) {
            return None;
        }
        let each = count / size;
        let start = each * self.index as usize;
        Some(start..start + each)
    }
}

impl fmt::Display for TpRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.index, self.size.0)
    }
}

impl fmt::Display for TpSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
