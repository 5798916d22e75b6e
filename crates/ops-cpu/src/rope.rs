//! Interleaved rotary embedding: pairs (2i, 2i+1) turn by position · theta^(-2i/D). Angles in fp32; cos and sin are
//! rounded to the compute dtype as the reference keeps them.

use ops::Rope;

/// cos and sin of every row of a step, shared by all its layers.
#[derive(Debug, Default)]
pub(crate) struct RopeTable {
    key: Option<(u32, usize)>,
    /// [T, D/2] pairs of (cos, sin).
    turns: Vec<(f32, f32)>,
}

impl RopeTable {
    /// Forgets the last step's positions.
    pub(crate) fn clear(&mut self) {
        self.key = None;
    }

    /// Fills the table for these positions unless it already is.
    pub(crate) fn prepare(&mut self, rope: Rope, head_dim: usize, positions: &[u32], rounds: bool) {
        let key = (rope.theta.to_bits(), head_dim);
        if self.key == Some(key) {
            return;
        }
        self.key = Some(key);
        self.turns.clear();
        let frequencies: Vec<f32> =
            (0..head_dim / 2).map(|i| 1.0 / rope.theta.powf((2 * i) as f32 / head_dim as f32)).collect();
        for &position in positions {
            self.turns.extend(frequencies.iter().map(|frequency| {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                match rounds {
                    true => (half::bf16::from_f32(cos).to_f32(), half::bf16::from_f32(sin).to_f32()),
                    false => (cos, sin),
                }
            }));
        }
    }

    /// Turns one head of row `row` in place.
    pub(crate) fn turn(&self, row: usize, head: &mut [f32]) {
        let half = head.len() / 2;
        let turns = &self.turns[row * half..(row + 1) * half];
        for (pair, &(cos, sin)) in head.chunks_exact_mut(2).zip(turns) {
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = b * cos + a * sin;
        }
    }
}
