//! The header of a safetensors file: eight bytes of length, then a JSON object from tensor name to element type,
//! shape and byte range. Nothing in it is believed before it is checked against the file.

use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, HeaderFault};
use crate::strict_json;

/// Largest header read: the largest published checkpoint has 74,026 tensors of about 130 bytes each in its headers.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Bytes of the length before the header.
const LENGTH_BYTES: u64 = 8;
/// The one key that is not a tensor.
const METADATA: &str = "__metadata__";

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Element type on disk.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub start: u64,
    /// Size in bytes: the shape's product times the element's size.
    pub bytes: u64,
}

/// A header that agrees with its file: every tensor lies inside it, no two overlap, and no byte is left over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The tensors in the order of their bytes.
    pub tensors: Vec<TensorEntry>,
}

impl Header {
    /// Parses the header of a whole file in memory.
    ///
    /// # Errors
    /// [`Error::Header`] naming `file` and what is wrong.
    pub fn from_bytes(file: &str, content: &[u8]) -> Result<Self, Error> {
        Self::read(file, content.len() as u64, |out, offset| {
            // `read` asks only for what it knows to be inside the file.
            let start = offset as usize;
            out.copy_from_slice(&content[start..start + out.len()]);
            Ok(())
        })
    }

    /// Parses the header of a file of `file_bytes` bytes that `read_at` reads from, by position.
    pub(crate) fn read(
        file: &str,
        file_bytes: u64,
        read_at: impl Fn(&mut [u8], u64) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let wrong = |fault| Error::Header { file: file.to_owned(), fault };
        let Some(available) = file_bytes.checked_sub(LENGTH_BYTES) else {
            return Err(wrong(HeaderFault::NoLength { file_bytes }));
        };
        let mut prefix = [0; LENGTH_BYTES as usize];
        read_at(&mut prefix, 0)?;
        let claimed = u64::from_le_bytes(prefix);
        if claimed > available {
            return Err(wrong(HeaderFault::BeyondFile { claimed, available }));
        }
        if claimed > HEADER_BYTES_MAX {
            return Err(wrong(HeaderFault::TooLong { claimed, max: HEADER_BYTES_MAX }));
        }
        let mut json = vec![0; claimed as usize];
        read_at(&mut json, LENGTH_BYTES)?;
        let data = Data { start: LENGTH_BYTES + claimed, bytes: available - claimed };
        parse(&json, data).map_err(wrong)
    }
}

/// Where a file's tensor bytes are.
#[derive(Clone, Copy)]
struct Data {
    /// First byte after the header.
    start: u64,
    /// How many there are.
    bytes: u64,
}

fn parse(json: &[u8], data: Data) -> Result<Header, HeaderFault> {
    let map = strict_json::object(json).map_err(|reason| HeaderFault::Json { reason })?;
    let mut tensors = Vec::with_capacity(map.len());
    for (name, value) in map {
        if name == METADATA {
            continue;
        }
        let parsed = entry(&name, &value, data);
        tensors.push(parsed.map_err(|reason| HeaderFault::Tensor { tensor: name, reason })?);
    }
    tensors.sort_by(|a, b| (a.start, a.bytes, &a.name).cmp(&(b.start, b.bytes, &b.name)));
    check_cover(&tensors, data)?;
    Ok(Header { tensors })
}

fn entry(name: &str, value: &Value, data: Data) -> Result<TensorEntry, String> {
    let Value::Object(fields) = value else {
        return Err(format!("its entry must be an object, not {}", strict_json::kind(value)));
    };
    let dtype = field(fields, "dtype")?;
    let dtype = Dtype::deserialize(dtype)
        .map_err(|_| format!("its dtype {} is not a safetensors element type", strict_json::kind(dtype)))?;
    let shape = numbers(fields, "shape")?;
    let &[start, end] = numbers(fields, "data_offsets")?.as_slice() else {
        return Err("its data_offsets must be two whole numbers, start and end".to_owned());
    };
    if start > end {
        return Err(format!("its data_offsets run backwards, from {start} to {end}"));
    }
    if end > data.bytes {
        let held = data.bytes;
        return Err(format!(
            "its data_offsets {start} to {end} reach beyond the {held} bytes of data in the file: it is truncated"
        ));
    }
    let bits = shape
        .iter()
        .try_fold(1_u64, |product, size| product.checked_mul(*size))
        .and_then(|elements| elements.checked_mul(dtype.bitsize() as u64))
        .ok_or_else(|| format!("its shape {shape:?} is larger than any file"))?;
    if !bits.is_multiple_of(8) || bits / 8 != end - start {
        return Err(format!(
            "its data_offsets span {} bytes, and {shape:?} of {dtype} takes {}",
            end - start,
            bits.div_ceil(8)
        ));
    }
    let shape = shape.into_iter().map(|size| usize::try_from(size).map_err(|error| error.to_string()));
    Ok(TensorEntry {
        name: name.to_owned(),
        dtype,
        shape: shape.collect::<Result<Vec<usize>, String>>()?,
        start: data.start + start,
        bytes: end - start,
    })
}

fn field<'a>(fields: &'a Map<String, Value>, name: &str) -> Result<&'a Value, String> {
    fields.get(name).ok_or_else(|| format!("its entry has no {name}"))
}

fn numbers(fields: &Map<String, Value>, name: &str) -> Result<Vec<u64>, String> {
    let list = field(fields, name)?.as_array();
    let numbers = list.and_then(|items| items.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>());
    numbers.ok_or_else(|| format!("its {name} must be a list of whole numbers"))
}

/// The tensors, sorted by start, must follow each other from the first byte of data to the last.
fn check_cover(tensors: &[TensorEntry], data: Data) -> Result<(), HeaderFault> {
    let mut covered = data.start;
    let mut before: Option<&TensorEntry> = None;
    for tensor in tensors {
        if tensor.start < covered {
            let other = before.map_or("the header", |other| other.name.as_str());
            let reason = format!("its bytes overlap those of {other}");
            return Err(HeaderFault::Tensor { tensor: tensor.name.clone(), reason });
        }
        if tensor.start > covered {
            return Err(gap(covered, tensor.start, data));
        }
        covered += tensor.bytes;
        before = Some(tensor);
    }
    let end = data.start + data.bytes;
    if covered < end { Err(gap(covered, end, data)) } else { Ok(()) }
}

const fn gap(from: u64, to: u64, data: Data) -> HeaderFault {
    HeaderFault::Uncovered { start: from - data.start, end: to - data.start }
}
