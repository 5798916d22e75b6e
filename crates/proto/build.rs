//! Compiles the protocol files in Rust (no protoc) and keeps their descriptors for server reflection.

use std::path::{Path, PathBuf};
use std::{env, error, fs};

use prost::Message;

const FILES: [&str; 4] =
    ["cohort/v1/cohort.proto", "cohort/worker/v1/worker.proto", "vllm/inference.proto", "vllm/control.proto"];

fn main() -> Result<(), Box<dyn error::Error>> {
    let root = Path::new("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(FILES, [root])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // Ordered, so that equal messages are equal in every way.
    tonic_prost_build::configure().btree_map(".").codec_path("crate::Codec").compile_fds(descriptors)?;
    Ok(())
}
