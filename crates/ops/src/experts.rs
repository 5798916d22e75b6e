//! Which rank holds which expert, and where copies of an expert are.

use types::TokenId;

use crate::Error;

/// Which rank holds an expert: rank r holds `experts_each` of them, from `r · experts_each` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertOwners {
    /// Ranks that share the experts.
    pub ranks: usize,
    /// Experts each of them holds; at least 1.
    pub experts_each: usize,
}

impl ExpertOwners {
    /// The rank that holds `expert`.
    #[must_use]
    pub const fn owner(self, expert: usize) -> usize {
        expert / self.experts_each
    }
}

/// Where the copies of each expert are: in numbered slots, of which every rank holds equally many. Slots take the place
/// of expert numbers once [`crate::Backend::place`] has chosen a copy for each row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertSlots {
    /// Expert e has copies `first[e]..first[e + 1]` of `slots`; one entry more than there are experts.
    first: Vec<u32>,
    slots: Vec<u32>,
}

impl ExpertSlots {
    /// Of `experts` experts, `held[s]` being the one in slot s.
    ///
    /// # Errors
    /// [`Error::Shape`] when a slot holds an unknown expert, or an expert is in no slot.
    pub fn new(experts: usize, held: &[u32]) -> Result<Self, Error> {
        let wrong = |detail| Err(Error::Shape { op: "expert slots", detail });
        let mut slots: Vec<u32> = (0u32..).take(held.len()).collect();
        slots.sort_by_key(|&slot| held[slot as usize]);
        let mut first = vec![0; experts + 1];
        for (slot, &expert) in held.iter().enumerate() {
            match first.get_mut(expert as usize + 1) {
                Some(copies) => *copies += 1,
                None => return wrong(format!("slot {slot} holds expert {expert} of {experts}")),
            }
        }
        if let Some(expert) = first[1..].iter().position(|copies| *copies == 0) {
            return wrong(format!("expert {expert} of {experts} is in no slot"));
        }
        (1..=experts).for_each(|expert| first[expert] += first[expert - 1]);
        Ok(Self { first, slots })
    }

    /// Experts that have slots.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.first.len() - 1
    }

    /// The slots with a copy of `expert`, ascending.
    #[must_use]
    pub fn copies(&self, expert: usize) -> &[u32] {
        &self.slots[self.first[expert] as usize..self.first[expert + 1] as usize]
    }

    /// The slot that works for a row of `token` at `position` that chose `expert`. It follows from the row alone, so it
    /// is the same on every rank and in every batch.
    #[must_use]
    pub fn of_row(&self, expert: usize, token: TokenId, position: u32) -> u32 {
        let copies = self.copies(expert);
        copies[token.0.wrapping_add(position) as usize % copies.len()]
    }
}
