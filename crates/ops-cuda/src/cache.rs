//! Compiled kernels on disk: a file per hash of source, flags, compiler and card. A file is written aside and renamed,
//! so readers see all of it or nothing; it begins with the hash of its content, so a damaged one is compiled again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use sha2::{Digest, Sha256};

use crate::Error;
use crate::kernels::Source;
use crate::nvrtc::{Compiled, compile, options, version};

const HASH_BYTES: usize = 32;

/// Where compiled kernels are kept between runs; `None` compiles on every start.
#[derive(Debug, Clone, Default)]
pub struct KernelCache(pub Option<PathBuf>);

impl KernelCache {
    /// `$XDG_CACHE_HOME/cohort/kernels` or `$HOME/.cache/cohort/kernels`; none without a home.
    #[must_use]
    pub fn user() -> Self {
        let base = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
        Self(base.map(|base| base.join("cohort").join("kernels")))
    }

    /// The compiled form of `source` for `arch`, from disk when it is there and whole.
    ///
    /// # Errors
    /// As [`compile`]; a cache that cannot be read or written only costs time.
    pub fn get(&self, source: &Source, arch: &str) -> Result<Compiled, Error> {
        let Some(directory) = &self.0 else {
            return compile(source, arch);
        };
        let file = directory.join(format!("{}.cubin", key(source, arch)?));
        let kept = fs::read(&file).unwrap_or_default();
        if let Some(cubin) = whole(&kept) {
            return Ok(Compiled { cubin: cubin.to_vec(), log: String::new() });
        }
        let compiled = compile(source, arch)?;
        store(directory, &file, &compiled.cubin);
        Ok(compiled)
    }
}

fn key(source: &Source, arch: &str) -> Result<String, Error> {
    let mut hash = Sha256::new();
    let (major, minor) = version()?;
    hash.update(format!("nvrtc {major}.{minor} {}\n", options(source, arch).join(" ")));
    hash.update(source.text());
    Ok(format!("{:x}", hash.finalize()))
}

/// The content behind a hash that fits it.
fn whole(file: &[u8]) -> Option<&[u8]> {
    let (hash, content) = file.split_at_checked(HASH_BYTES)?;
    (Sha256::digest(content).as_slice() == hash).then_some(content)
}

/// A kernel that cannot be kept is compiled again next time.
fn store(directory: &Path, file: &Path, cubin: &[u8]) {
    let aside = file.with_extension(format!("{}.part", process::id()));
    let content = [Sha256::digest(cubin).as_slice(), cubin].concat();
    let written = fs::create_dir_all(directory)
        .and_then(|()| fs::write(&aside, content))
        .and_then(|()| fs::rename(&aside, file));
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
}
