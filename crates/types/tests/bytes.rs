//! Sizes as people write them.

use types::Bytes;

#[test]
fn a_size_is_read_in_binary_and_decimal_units() {
    let cases = [
        ("0", 0),
        ("4096", 4096),
        ("12B", 12),
        ("139GiB", 139 << 30),
        ("80 GB", 80_000_000_000),
        ("1.5TiB", 3 << 39),
        ("0.5KiB", 512),
    ];
    for (text, bytes) in cases {
        assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
    }
}

#[test]
fn what_is_no_size_is_refused_with_an_example() {
    let wrong =
        ["", "GiB", "-1", "1e9", "1.2.3GB", "12 parsecs", "99999999999TiB", "99999999999.5TiB", "NaN"];
    for text in wrong {
        let refused = text.parse::<Bytes>().map_err(|error| error.contains("139GiB"));
        assert_eq!(refused, Err(true), "{text}");
    }
}
