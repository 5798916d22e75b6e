//! A small seeded generator (SplitMix64): the same seed gives the same run on every machine.

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `low..=high`.
    pub fn range(&mut self, low: u32, high: u32) -> u32 {
        let span = u64::from(high - low) + 1;
        low + u32::try_from(self.next() % span).unwrap()
    }

    /// A number in `-most..=most`.
    pub fn signed(&mut self, most: i32) -> i32 {
        let span = u32::try_from(2 * most).unwrap();
        i32::try_from(self.range(0, span)).unwrap() - most
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u32) -> bool {
        self.range(1, n) == 1
    }
}

pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
