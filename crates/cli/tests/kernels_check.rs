//! `cohort kernels check`: a table for people, JSON for machines, and one word about a missing compiler.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on, or is skipped, says so"
)]

use std::env;
use std::process::{Command, Output};

fn check(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cohort"));
    command.env_clear();
    // Where the compiler may be is the machine's business, unlike all other settings.
    for name in ["LD_LIBRARY_PATH", ops_cuda::FOLDERS_VARIABLE] {
        command.envs(env::var_os(name).map(|value| (name, value)));
    }
    command.args(["kernels", "check"]).args(line.split_whitespace()).output().unwrap()
}

#[test]
fn the_kernels_of_a_preset_are_reported() {
    let output = check("--arch sm_90a --preset north-mini-code --json");
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("libnvrtc") {
        println!("skipped: {said}");
        return;
    }
    assert!(output.status.success(), "{said}");
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["model"], "north-mini-code");
    let programs = found["programs"].as_array().unwrap();
    let attention = programs.iter().find(|program| program["file"] == "attention.cu").unwrap();
    assert!(attention["constants"].as_array().unwrap().contains(&"D=128".into()));
    for program in programs {
        assert_eq!(program["arch"], "sm_90a");
        for kernel in program["kernels"].as_array().unwrap() {
            assert!(kernel["registers"].as_u64().unwrap() > 0, "{kernel}");
            assert_eq!(kernel["spill_bytes"], 0, "{kernel}");
        }
    }
    let table = String::from_utf8(check("--arch sm_80 --model crates/none --dtype bf16").stderr).unwrap();
    assert!(table.contains("config.json"), "{table}");
}
