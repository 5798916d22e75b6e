//! What backends do on the host that have nothing better.

use crate::sample::{Ask, Choice, answer};

/// [`crate::Backend::join_ranks`] on the host, of ranks that have `each` columns.
#[must_use]
pub fn joined(parts: &[f32], (rows, each, width): (usize, usize, usize)) -> Vec<f32> {
    let ranks = parts.len() / (rows * each).max(1);
    let mut whole = Vec::with_capacity(rows * width);
    for row in 0..rows {
        for rank in 0..ranks {
            let real = width.saturating_sub(rank * each).min(each);
            let start = (rank * rows + row) * each;
            whole.extend_from_slice(&parts[start..start + real]);
        }
    }
    whole
}

/// [`crate::Backend::draw`] on the host: of rows of logits [V], already scaled.
#[must_use]
pub fn draw_rows(logits: &[f32], width: usize, asks: &[Ask<'_>]) -> Vec<Choice> {
    let rows = logits.chunks_exact(width).zip(asks).enumerate();
    rows.map(|(row, (logits, ask))| answer(row, logits, ask)).collect()
}
