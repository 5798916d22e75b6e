//! What backends do on the host that have nothing better.

use crate::sample::{Choice, Plain, drawn};

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
pub fn draw_rows(logits: &[f32], width: usize, how: &[Option<Plain>]) -> Vec<Choice> {
    let rows = logits.chunks_exact(width).zip(how).enumerate();
    rows.map(|(row, (logits, how))| how.map_or(Choice::Left, |how| drawn(row, logits, &how))).collect()
}
