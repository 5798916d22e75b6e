//! The caller's deadline, as gRPC carries it.

use std::time::Duration;

use tonic::metadata::MetadataMap;

use crate::{Failure, Violation};

/// The `grpc-timeout` of a call, or `None` when it has none.
///
/// # Errors
/// [`Failure::Invalid`] when the header is not at most eight digits and a unit (gRPC over HTTP/2, "Timeout").
pub fn timeout(headers: &MetadataMap) -> Result<Option<Duration>, Failure> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(parse);
    let wrong = || Violation::new("grpc-timeout", "must be at most 8 digits and one of H M S m u n");
    parsed.map(Some).ok_or_else(|| wrong().into())
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_read_and_everything_else_refused() {
        let read = [
            ("2H", 7200.0),
            ("3M", 180.0),
            ("99999999S", 99_999_999.0),
            ("5m", 5e-3),
            ("7u", 7e-6),
            ("9n", 9e-9),
        ];
        for (text, seconds) in read {
            assert!((parse(text).unwrap().as_secs_f64() - seconds).abs() < 1e-9, "{text}");
        }
        for text in ["", "S", "1", "1x", "-1S", "123456789S", "1 S", "１S"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
