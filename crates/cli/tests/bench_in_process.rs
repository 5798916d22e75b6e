//! `cohort bench decode|prefill|kernels|collectives` on the CPU, at tiny shapes: every number is there and makes sense.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::process::{Command, Output};

use serde_json::Value;

fn bench(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cohort"));
    command.env_clear().arg("bench").args(line.split_whitespace()).output().unwrap()
}

fn json(line: &str) -> Value {
    let output = bench(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{line}: {error}"))
}

/// The number at `key`, which is positive.
fn positive(row: &Value, key: &str) -> f64 {
    let number = row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"));
    assert!(number.is_finite() && number > 0.0, "{key} of {row}");
    number
}

const DEMO: &str = "--device cpu --threads 1 --load-format dummy --json";

#[test]
fn decode_counts_the_bytes_of_the_experts_it_touched() {
    let found = json(&format!("decode --batch 1,4 --context 200 --steps 3 {DEMO}"));
    assert_eq!(found["model"], "cohort-demo");
    for ceiling in ["copy_bytes_per_s", "matmul_flop_per_s"] {
        positive(&found["machine"], ceiling);
    }
    let rows = found["decode"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        let (batch, ms) = (positive(row, "batch"), positive(row, "step_ms"));
        assert!((positive(row, "tokens_per_s") * ms / 1e3 / batch - 1.0).abs() < 1e-6, "{row}");
        let share = positive(row, "floor_ms") / ms;
        assert!((positive(row, "share_of_floor") / share - 1.0).abs() < 1e-6, "{row}");
    }
    let touched = |row: usize| positive(&rows[row], "experts_touched");
    // The demo model chooses 4 of 16 experts for a token.
    assert!((touched(0) - 4.0).abs() < 1e-9, "one row touches what it chose: {}", touched(0));
    assert!(touched(1) > 4.0 && touched(1) <= 16.0, "{}", touched(1));
    assert!(positive(&rows[1], "bytes") > positive(&rows[0], "bytes"));
}

#[test]
fn ranks_of_a_group_decode_together_and_read_a_share_of_the_bytes() {
    let of = |flags: &str| {
        let found = json(&format!("decode --batch 2 --context 60 --steps 2 {flags} {DEMO}"));
        let row = &found["decode"].as_array().unwrap()[0];
        assert!(positive(row, "tokens_per_s") > 0.0);
        (found["machine"]["device"].as_str().unwrap().to_owned(), positive(row, "bytes"))
    };
    let (_, alone) = of("");
    for experts in ["tensor", "expert"] {
        let (device, shared) = of(&format!("--tensor-parallel 2 --experts {experts}"));
        assert!(device.starts_with("2 × cpu"), "{device}");
        assert!(shared < 0.8 * alone, "{experts}: {shared} of {alone}");
    }
}

#[test]
fn prefill_and_kernels_and_collectives_report_their_floors() {
    let found = json(&format!("prefill --prompt 40,96 --chunk 32 --repeats 2 {DEMO}"));
    let rows = found["prefill"].as_array().unwrap();
    assert!(positive(&rows[1], "flop") > 2.0 * positive(&rows[0], "flop"));
    assert!(rows.iter().all(|row| positive(row, "tokens_per_s") > 0.0));

    let found = json(&format!("kernels --rows 1,3 --context 64 --repeats 2 {DEMO}"));
    let names: Vec<&str> =
        found["kernels"].as_array().unwrap().iter().map(|row| row["op"].as_str().unwrap()).collect();
    for op in
        ["norm", "qkv", "attention, full", "attention, sliding", "attention out", "router", "experts", "head"]
    {
        assert_eq!(names.iter().filter(|name| **name == op).count(), 2, "{op} in {names:?}");
    }

    let found = json("collectives --ranks 3 --bytes 64,4096 --repeats 5 --json");
    let rows = found["collectives"].as_array().unwrap();
    // Two transports; four operations at two sizes, and a barrier.
    assert_eq!(rows.len(), 2 * (4 * 2 + 1));
    assert!(rows.iter().all(|row| positive(row, "us") > 0.0));
}

#[test]
fn tables_line_up_and_bad_sizes_are_refused() {
    let output = bench("decode --batch 2 --context 50 --steps 2 --device cpu --threads 1");
    let shown = String::from_utf8(output.stdout).unwrap();
    let widths: Vec<usize> = shown.lines().skip(1).map(|line| line.chars().count()).collect();
    assert!(widths.len() == 2 && widths[0] == widths[1], "{shown}");
    for (line, part) in [
        ("decode --context 99999999 --device cpu", "holds sequences of up to"),
        ("decode --batch 0", "--batch"),
        ("decode --layers 2 --device cuda --threads 0", "--threads"),
        ("prefill --chunk 0", "--chunk"),
        ("collectives --bytes 1", "--bytes"),
        ("decode --tensor-parallel 3 --device cpu", "cannot hold its part of the model"),
        ("kernels --preset north", "north-mini-code"),
    ] {
        let output = bench(line);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(part), "{line}: {said}");
    }
    // No machine has so many cards; most that run this have no driver.
    let output = bench("collectives --ranks 128 --transport one-shot");
    let said = String::from_utf8_lossy(&output.stderr);
    let expected = ["needs as many of them", "is not found", "finds no device", "driver"];
    assert!(!output.status.success() && expected.iter().any(|part| said.contains(part)), "{said}");
}
