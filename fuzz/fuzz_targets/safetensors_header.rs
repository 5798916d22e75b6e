//! Any bytes as a safetensors file: refused, or a header whose tensors lie inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::Header;

fuzz_target!(|content: &[u8]| {
    if let Ok(header) = Header::from_bytes("fuzzed.safetensors", content) {
        for tensor in &header.tensors {
            let end = tensor.start.checked_add(tensor.bytes).expect("no overflow");
            assert!(end <= content.len() as u64, "{tensor:?} reaches outside the file");
        }
    }
});
