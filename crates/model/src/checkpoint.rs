//! A checkpoint on disk: which tensors it has, and reads of exactly the bytes a rank wants of them.

mod element;
mod files;
mod header;
mod index;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use safetensors::Dtype;
use types::Bytes;

pub use element::Element;
pub(crate) use element::stored_bytes;
pub use files::Files;
pub use header::{HEADER_BYTES_MAX, Header, TensorEntry};

use crate::error::{Error, TensorProblem};
use files::Blob;

/// Bytes converted at a time: small enough for the cache, large enough that system calls do not count.
const SCRATCH_BYTES: usize = 256 << 10;

/// A disk is read in pages: where a row is no longer than one, all of it comes along anyway, and a part of every row is
/// read with few calls instead of one for each row.
const PAGE_BYTES: usize = 4 << 10;

/// An open checkpoint. Reads take `&self`, from any number of threads.
#[derive(Debug)]
pub struct Checkpoint {
    files: Files,
    shards: Vec<Blob>,
    tensors: BTreeMap<String, (usize, TensorEntry)>,
    bytes_read: AtomicU64,
}

/// A rectangle of a tensor: `rows` × `cols` of the matrix [rows, cols], of matrix `matrix` of a stack
/// [matrices, rows, cols], or of a vector [cols], which has one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Index into a stack of matrices; 0 when there is one.
    pub matrix: usize,
    /// Rows wanted.
    pub rows: Range<usize>,
    /// Columns wanted.
    pub cols: Range<usize>,
}

impl Block {
    /// Elements in it.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.rows.len() * self.cols.len()
    }
}

impl Checkpoint {
    /// Opens all weight files and reads their headers, no weights.
    ///
    /// # Errors
    /// When files are missing, unreadable, or their headers or index cannot be trusted.
    pub fn open(files: Files) -> Result<Self, Error> {
        let located = index::locate(&files)?;
        Ok(Self { files, shards: located.shards, tensors: located.tensors, bytes_read: AtomicU64::new(0) })
    }

    /// The files it was opened from.
    #[must_use]
    pub const fn files(&self) -> &Files {
        &self.files
    }

    /// Names of all tensors, ascending.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Everything known about a tensor but its elements.
    #[must_use]
    pub fn entry(&self, tensor: &str) -> Option<&TensorEntry> {
        self.tensors.get(tensor).map(|(_, entry)| entry)
    }

    /// Sizes of a tensor, outermost first.
    #[must_use]
    pub fn shape(&self, tensor: &str) -> Option<&[usize]> {
        self.entry(tensor).map(|entry| entry.shape.as_slice())
    }

    /// Element type of a tensor on disk.
    #[must_use]
    pub fn dtype(&self, tensor: &str) -> Option<Dtype> {
        self.entry(tensor).map(|entry| entry.dtype)
    }

    /// Bytes of tensors read so far: those that were asked for, headers not counted.
    #[must_use]
    pub fn bytes_read(&self) -> Bytes {
        Bytes(self.bytes_read.load(Ordering::Relaxed))
    }

    /// Reads a block of a tensor into `out` [rows, cols], converted; only the block's bytes are read.
    ///
    /// # Errors
    /// [`Error::Tensors`] when there is no such tensor or its type is not read; [`Error::Io`].
    ///
    /// # Panics
    /// When the block reaches outside the tensor, or `out` has another size: bugs of the caller.
    pub fn read<T: Element>(&self, tensor: &str, block: &Block, out: &mut [T]) -> Result<(), Error> {
        let Some((shard, entry)) = self.tensors.get(tensor) else {
            return Err(self.problem(TensorProblem::Missing { name: tensor.to_owned(), shape: Vec::new() }));
        };
        let Some(size) = stored_bytes(entry.dtype) else {
            return Err(self.problem(TensorProblem::Dtype { name: tensor.to_owned(), found: entry.dtype }));
        };
        let [matrices, rows, cols] = stack(&entry.shape);
        assert!(
            block.matrix < matrices && block.rows.end <= rows && block.cols.end <= cols,
            "{block:?} reaches outside {tensor} {:?}",
            entry.shape
        );
        assert_eq!(out.len(), block.elements(), "elements of {block:?} of {tensor}");
        let mut run = Run { blob: &self.shards[*shard], dtype: entry.dtype, size, scratch: Vec::new() };
        let at = |row: usize| {
            entry.start + (((block.matrix * rows + row) * cols + block.cols.start) * size) as u64
        };
        if block.cols.len() == cols {
            run.read(at(block.rows.start), out)?;
        } else if cols * size <= PAGE_BYTES {
            let first = entry.start + ((block.matrix * rows + block.rows.start) * cols * size) as u64;
            run.read_columns(first, (cols, &block.cols), out)?;
        } else if !block.cols.is_empty() {
            for (row, out) in block.rows.clone().zip(out.chunks_exact_mut(block.cols.len())) {
                run.read(at(row), out)?;
            }
        }
        self.bytes_read.fetch_add((block.elements() * size) as u64, Ordering::Relaxed);
        Ok(())
    }

    fn problem(&self, problem: TensorProblem) -> Error {
        Error::Tensors { place: self.files.place(), problems: vec![problem] }
    }
}

/// Any shape as [matrices, rows, cols]; a scalar is one element, and more than three sizes fold into the first.
fn stack(shape: &[usize]) -> [usize; 3] {
    match shape {
        [] => [1, 1, 1],
        [cols] => [1, 1, *cols],
        [rest @ .., rows, cols] => [rest.iter().product(), *rows, *cols],
    }
}

/// A run of consecutive elements of one file.
struct Run<'a> {
    blob: &'a Blob,
    dtype: Dtype,
    /// Bytes of one stored element.
    size: usize,
    /// Reused from run to run.
    scratch: Vec<u8>,
}

impl Run<'_> {
    fn read<T: Element>(&mut self, offset: u64, out: &mut [T]) -> Result<(), Error> {
        if self.dtype == T::STORED {
            return self.blob.read_exact_at(bytemuck::cast_slice_mut(out), offset);
        }
        self.scratch.resize(SCRATCH_BYTES.min(out.len() * self.size), 0);
        let mut offset = offset;
        for out in out.chunks_mut(SCRATCH_BYTES / self.size) {
            let bytes = &mut self.scratch[..out.len() * self.size];
            self.blob.read_exact_at(bytes, offset)?;
            element::convert(self.dtype, bytes, out);
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    /// Reads the same columns `wanted` of consecutive rows of `cols` elements, which begin at `offset`.
    fn read_columns<T: Element>(
        &mut self,
        offset: u64,
        (cols, wanted): (usize, &Range<usize>),
        out: &mut [T],
    ) -> Result<(), Error> {
        if wanted.is_empty() {
            return Ok(());
        }
        let row = cols * self.size;
        let inner = wanted.start * self.size..wanted.end * self.size;
        let rows_each = SCRATCH_BYTES / row;
        let mut offset = offset;
        for out in out.chunks_mut(rows_each * wanted.len()) {
            self.scratch.resize(out.len() / wanted.len() * row, 0);
            self.blob.read_exact_at(&mut self.scratch, offset)?;
            offset += self.scratch.len() as u64;
            let rows = self.scratch.chunks_exact(row);
            for (row, out) in rows.zip(out.chunks_exact_mut(wanted.len())) {
                let bytes = &row[inner.clone()];
                if self.dtype == T::STORED {
                    bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
                } else {
                    element::convert(self.dtype, bytes, out);
                }
            }
        }
        Ok(())
    }
}
