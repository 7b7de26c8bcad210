// SPDX-License-Identifier: Apache-2.0
//! Quantities with units. `ateapi` validates them when a template is created; here they become numbers.

/// Cores × 1000 of "500m", "2" or "0.5"; empty is 0, which means unlimited.
pub fn cpu_millis(text: &str) -> Result<u64, String> {
    if text.is_empty() {
        return Ok(0);
    }
    let bad = || format!("{text:?} is not a number of cores such as \"500m\" or \"2\"");
    if let Some(millis) = text.strip_suffix('m') {
        return digits(millis).filter(|millis| *millis > 0).ok_or_else(bad);
    }
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let fraction_digits = fraction.len();
    if !(1..=3).contains(&fraction_digits) {
        return Err(bad());
    }
    let fraction = digits(fraction).ok_or_else(bad)? * 10_u64.pow(3 - fraction_digits as u32);
    let millis = digits(whole)
        .and_then(|whole| whole.checked_mul(1000)?.checked_add(fraction))
        .filter(|millis| *millis > 0);
    millis.ok_or_else(bad)
}

/// Bytes of "512MiB", "1Gi", "64MB" or "1048576"; empty is 0.
pub fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 15] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("kB", 1_000),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
        ("", 1),
    ];
    if text.is_empty() {
        return Ok(0);
    }
    UNITS
        .iter()
        .find_map(|(unit, size)| text.strip_suffix(unit).map(|number| (number, *size)))
        .and_then(|(number, size)| digits(number)?.checked_mul(size))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("{text:?} is not a size such as \"512MiB\" or \"2GiB\""))
}

fn digits(text: &str) -> Option<u64> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores() {
        for (text, millis) in [("", 0), ("500m", 500), ("2", 2000), ("0.5", 500), ("1.25", 1250), ("1m", 1)] {
            assert_eq!(cpu_millis(text), Ok(millis), "{text}");
        }
        for text in ["0", "0m", "-1", "m", ".5", "1.", "1.2345", "1e3", "2 ", "99999999999999999999"] {
            assert!(cpu_millis(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, size) in [
            ("", 0),
            ("1", 1),
            ("7B", 7),
            ("512MiB", 512 << 20),
            ("1Gi", 1 << 30),
            ("64MB", 64_000_000),
            ("2KB", 2000),
        ] {
            assert_eq!(bytes(text), Ok(size), "{text}");
        }
        for text in ["0", "MiB", "1.5GiB", "-1MiB", "1 MiB", "1M", "99999999999TiB"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
