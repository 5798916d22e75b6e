//! One layer's paged key/value cache: [blocks, K, block, D] for keys and for values, so that a head's keys within a
//! block are contiguous.

use half::bf16;
use ops::{Error, KvLayerSpec};
use types::{Bytes, DType};

use crate::element::Element;

/// A layer's cache on this rank.
#[derive(Debug)]
pub struct KvLayer {
    spec: KvLayerSpec,
    pub(crate) store: Store,
}

#[derive(Debug)]
pub(crate) enum Store {
    F32(Planes<f32>),
    BF16(Planes<bf16>),
}

/// Keys and values of one storage type.
#[derive(Debug)]
pub(crate) struct Planes<E> {
    pub(crate) keys: Vec<E>,
    pub(crate) values: Vec<E>,
}

impl<E: Element> Planes<E> {
    fn new(elements: usize) -> Self {
        let zero = E::narrow(0.0);
        Self { keys: vec![zero; elements], values: vec![zero; elements] }
    }
}

impl KvLayer {
    pub(crate) fn new(spec: &KvLayerSpec, dtype: DType) -> Result<Self, Error> {
        let per_block = spec.kv_heads * spec.block_size.tokens() as usize * spec.head_dim;
        let too_large = || Error::Memory {
            what: format!("a KV layer of {} blocks", spec.blocks),
            needed: Bytes(u64::MAX),
            available: Bytes(0),
        };
        let elements = per_block.checked_mul(spec.blocks).ok_or_else(too_large)?;
        let store = match dtype {
            DType::F32 => Store::F32(Planes::new(elements)),
            DType::BF16 => Store::BF16(Planes::new(elements)),
        };
        Ok(Self { spec: *spec, store })
    }

    pub(crate) fn spec(&self) -> &KvLayerSpec {
        &self.spec
    }
}

/// Offset of a block's first element of KV head `head`.
#[inline(always)]
pub(crate) fn block_offset(spec: &KvLayerSpec, block: usize, head: usize) -> usize {
    (block * spec.kv_heads + head) * spec.block_size.tokens() as usize * spec.head_dim
}
