//! Clusters that cannot start say which file, tensor, field, flag or rank is to blame, and end with an error code.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use crate::support::{cohort, demo, ended, root};

/// A copy of the demo model, changed.
fn model(change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let model = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(demo().join(file), model.path().join(file)).unwrap();
    }
    change(model.path());
    model
}

fn edit_config(directory: &Path, from: &str, to: &str) {
    let path = directory.join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in config.json");
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

fn refused(flags: &[&str], names: &[&str]) {
    let mut args = vec!["up", "--grpc-listen=127.0.0.1:0", "--http-listen=off", "--device=cpu"];
    args.extend(flags);
    let (status, said) = ended(&args);
    assert!(!status.success(), "{flags:?} was accepted: {said}");
    for name in names {
        assert!(said.contains(name), "{flags:?}: no `{name}` in: {said}");
    }
}

#[test]
fn a_bad_checkpoint_is_named_by_file_and_tensor_or_field() {
    type Change = fn(&Path);
    let table: &[(Change, &[&str])] = &[
        (|d| edit_config(d, "\"logit_scale\": 0.5,", ""), &["config.json", "logit_scale"]),
        (
            |d| edit_config(d, "\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\""),
            &["config.json", "hidden_act"],
        ),
        (
            |d| edit_config(d, "\"hidden_size\": 256", "\"hidden_size\": 512"),
            &["embed_tokens", "[4096, 256]"],
        ),
        (|d| fs::remove_file(d.join("config.json")).unwrap(), &["config.json"]),
        (|d| fs::remove_file(d.join("model.safetensors")).unwrap(), &["model.safetensors"]),
        (
            |d| {
                let bytes = fs::read(d.join("model.safetensors")).unwrap();
                fs::write(d.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
            },
            &["model.safetensors"],
        ),
        (
            |d| fs::write(d.join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap(),
            &["model.safetensors", "header"],
        ),
    ];
    for (change, names) in table {
        let model = model(change);
        let path = format!("--model={}", model.path().display());
        refused(&["--tensor-parallel=2", &path], names);
    }
}

#[test]
fn ranks_that_do_not_divide_the_model_are_refused_with_the_numbers() {
    refused(&["--tensor-parallel=3"], &["8 query heads", "3 ranks"]);
    refused(&["--tensor-parallel=3", "--experts=expert"], &["16 routed experts", "3 ranks"]);
}

#[test]
fn a_kv_cache_larger_than_the_machine_is_refused_with_both_numbers() {
    refused(&["--kv-tokens=2147483647"], &["KV cache", "TiB", "available"]);
}

#[test]
fn a_cluster_file_with_an_unknown_key_is_refused_with_the_key() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cluster.toml");
    fs::write(&file, "[group]\ntensor_paralel = 2\n").unwrap();
    let flag = format!("--config={}", file.display());
    refused(&[&flag], &["cluster.toml", "tensor_paralel", "tensor_parallel"]);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let flag = format!("--grpc-listen={address}");
    let (status, said) = ended(&["up", &flag, "--http-listen=off", "--device=cpu"]);
    assert!(!status.success() && said.contains(&address) && said.contains("--grpc-listen"), "{said}");
}

#[test]
fn cuda_without_a_driver_says_which_library_is_missing() {
    match ops_cuda::probe() {
        Err(ops_cuda::Error::LibraryMissing { library, .. }) => {
            let (status, said) =
                ended(&["up", "--grpc-listen=127.0.0.1:0", "--http-listen=off", "--device=cuda"]);
            assert!(!status.success() && said.contains(library), "{said}");
        }
        Ok(_) | Err(_) => refused(&["--device=cuda"], &["cuda"]),
    }
}

#[test]
fn cuda_with_a_driver_and_no_kernel_compiler_says_how_to_get_one() {
    let compiles = ended(&["kernels", "check", "--arch=sm_90a"]);
    if compiles.0.success() {
        // This machine has one where every process finds it.
        return;
    }
    assert!(
        compiles.1.contains("libnvrtc") && compiles.1.contains("COHORT_CUDA_LIBRARIES"),
        "{}",
        compiles.1
    );
    // Any library stands in for the driver: it is not called before the compiler is found.
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let some_library = maps.split_whitespace().find(|word| word.contains("/libc.so")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(some_library, folder.path().join("libcuda.so")).unwrap();
    let args = ["up", "--grpc-listen=127.0.0.1:0", "--http-listen=off", "--device=cuda"];
    let output = cohort(&args).env("LD_LIBRARY_PATH", folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("libnvrtc") && said.contains("install"), "{said}");
}

#[test]
fn kernels_for_a_card_that_is_too_old_are_refused_with_the_targets_there_are() {
    let (status, said) = ended(&["kernels", "check", "--arch=sm_70"]);
    assert!(!status.success() && said.contains("sm_70") && said.contains("sm_90a"), "{said}");
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let (status, said) = ended(&["worker", "--rank=0", "--tensor-parallel=2", "--boot-timeout=1"]);
    assert!(!status.success() && said.contains("rank 1 did not join"), "{said}");
}

#[test]
fn two_ranks_with_different_configurations_are_told_what_differs() {
    let mut leader =
        cohort(&["worker", "--rank=0", "--tensor-parallel=2", "--boot-timeout=20"]).spawn().unwrap();
    let mut errors = BufReader::new(leader.stderr.take().unwrap());
    let mut rendezvous = String::new();
    while !rendezvous.contains("--rendezvous ") {
        rendezvous.clear();
        assert!(errors.read_line(&mut rendezvous).unwrap() > 0, "the leader did not say where it listens");
    }
    let address = rendezvous.split("--rendezvous ").nth(1).unwrap().trim().to_owned();
    let flag = format!("--rendezvous={address}");
    let golden = format!("--model={}", root().join("tests/golden/north").display());
    let (status, said) = ended(&["worker", "--rank=1", "--tensor-parallel=2", &flag, &golden]);
    assert!(!status.success() && said.contains("hash"), "{said}");
    let mut rest = String::new();
    errors.read_to_string(&mut rest).unwrap();
    assert!(!leader.wait().unwrap().success());
    assert!(rest.contains("rank 1") && rest.contains("hash"), "{rest}");
}
