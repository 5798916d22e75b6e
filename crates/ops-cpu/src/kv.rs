//! One layer's paged key/value cache: [blocks, K, block, D] for keys and for values, so that a head's keys within a
//! block are contiguous.

use half::bf16;
use ops::{Error, KvLayerSpec, dummy_unit};
use types::{Bytes, DType};

use crate::element::Element;

/// √3: numbers uniform in ± this have variance 1.
const UNIT_VARIANCE: f32 = 1.732_050_8;

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
    fn fill(&mut self, seed: u64) {
        let elements = self.keys.iter_mut().chain(&mut self.values);
        for (index, element) in (0..).zip(elements) {
            *element = E::narrow(UNIT_VARIANCE * dummy_unit(seed, index));
        }
    }

    fn new(elements: usize) -> Result<Self, Error> {
        let plane = || -> Result<Vec<E>, Error> {
            let mut plane = Vec::new();
            plane.try_reserve_exact(elements).map_err(|_| Error::Memory {
                what: "one plane of a KV layer".into(),
                needed: Bytes((elements * size_of::<E>()) as u64),
                available: Bytes(0),
            })?;
            plane.resize(elements, E::narrow(0.0));
            Ok(plane)
        };
        Ok(Self { keys: plane()?, values: plane()? })
    }
}

impl KvLayer {
    pub(crate) fn new(spec: &KvLayerSpec, dtype: DType) -> Result<Self, Error> {
        let per_block = spec.kv_heads * spec.block_size.tokens() as usize * spec.head_dim;
        let elements = per_block * spec.blocks;
        let store = match dtype {
            DType::F32 => Store::F32(Planes::new(elements)?),
            DType::BF16 => Store::BF16(Planes::new(elements)?),
        };
        Ok(Self { spec: *spec, store })
    }

    /// Seeded numbers everywhere.
    pub(crate) fn fill(&mut self, seed: u64) {
        match &mut self.store {
            Store::F32(planes) => planes.fill(seed),
            Store::BF16(planes) => planes.fill(seed),
        }
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
