//! Seeded weights made on a card are those made on the host, bit for bit.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what it ran on, and stops when it cannot be set up"
)]

mod support;

use ops::{Backend, Batch, BatchSequence, BlockTable, Dummy, DummyPiece, HostTensor};
use support::{backend, skipped};
use types::{DType, Position, TokenId};

#[test]
fn a_card_makes_the_values_the_host_makes() {
    if skipped() {
        return;
    }
    let (rows, cols) = (70_001, 96);
    let piece = |tensor, first, rows| DummyPiece { tensor, first, stride: 200, rows, cols };
    let pieces = vec![piece(7, 100, 70_000 - 5), piece(u64::MAX, 1 << 33, 5)];
    for dtype in [DType::F32, DType::BF16] {
        let mut backend = backend(dtype).unwrap();
        for (centre, scale) in [(0.0, 0.038), (1.0, 0.1)] {
            let dummy = Dummy { shape: vec![rows, cols], centre, scale, pieces: pieces.clone() };
            let table = backend.dummy_weight(&dummy).unwrap();
            let HostTensor::F32 { data: expected, .. } = dummy.host(DType::F32) else { unreachable!() };
            // An embedding gives a table's rows as they are.
            for first in (0..rows).step_by(1000) {
                let count = 1000.min(rows - first);
                let tokens = (first..first + count).map(|row| TokenId(row as u32)).collect();
                let tables = [BlockTable::default(), BlockTable::default()];
                let sequence = BatchSequence { rows: 0..count, start: Position(0), tables };
                let batch = Batch { tokens, sequences: vec![sequence], ..Batch::default() };
                backend.begin_step(&batch).unwrap();
                let out = backend.embed(&table, TokenId(0)).unwrap();
                let read = backend.read(&out).unwrap();
                let wanted = &expected[first * cols..(first + count) * cols];
                let differs = read.iter().zip(wanted).position(|(a, b)| a.to_bits() != b.to_bits());
                assert_eq!(differs, None, "{dtype}, rows from {first}");
            }
        }
    }
}
