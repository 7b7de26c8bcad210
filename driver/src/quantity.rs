// SPDX-License-Identifier: Apache-2.0
//! Quantities as the gateway writes them (Kubernetes style) and as templates spell them.
//!
//! The gateway sends `500m`, `2`, `0.5` for cores and `512Mi`, `4Gi`, `1G`, `1e9` for bytes. Templates say `500m` and
//! `512MiB`. Both are read into integers here and written in one canonical form, so that equal amounts share a template.

/// A quantity that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number of cores.
    #[error("{0:?} is not an amount of CPU: write cores like \"500m\", \"0.5\" or \"2\"")]
    Cpu(String),
    /// Not a number of bytes.
    #[error("{0:?} is not an amount of memory: write bytes like \"512Mi\", \"4Gi\" or \"1G\"")]
    Memory(String),
    /// Not a duration.
    #[error("{0:?} is not a duration: write it like \"500ms\", \"60s\", \"5m\" or \"1h\"")]
    Duration(String),
}

/// Thousandths of a core, at least 1.
pub fn millicores(text: &str) -> Result<u64, QuantityError> {
    let wrong = || QuantityError::Cpu(text.to_owned());
    let (number, scale) = match text.strip_suffix('m') {
        Some(number) => (number, 1),
        None => (text, 1000),
    };
    match scaled(number, scale) {
        Some(value @ 1..=1_000_000_000) => Ok(value),
        _ => Err(wrong()),
    }
}

/// Bytes, at least 1.
pub fn bytes(text: &str) -> Result<u64, QuantityError> {
    const UNITS: [(&str, u64); 18] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("k", 1000),
        ("K", 1000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("B", 1),
    ];
    let wrong = || QuantityError::Memory(text.to_owned());
    let (number, scale) = UNITS
        .iter()
        .find_map(|(unit, scale)| text.strip_suffix(unit).map(|number| (number, *scale)))
        .unwrap_or((text, 1));
    match scaled(number, scale) {
        Some(value @ 1..) => Ok(value),
        _ => Err(wrong()),
    }
}

/// Milliseconds, at least 1.
pub fn milliseconds(text: &str) -> Result<u64, QuantityError> {
    const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
    let value = UNITS
        .iter()
        .find_map(|(unit, scale)| text.strip_suffix(unit).and_then(|number| scaled(number, *scale)));
    match value {
        Some(value @ 1..) => Ok(value),
        _ => Err(QuantityError::Duration(text.to_owned())),
    }
}

/// Cores in their canonical form.
pub fn show_millicores(value: u64) -> String {
    if value.is_multiple_of(1000) { (value / 1000).to_string() } else { format!("{value}m") }
}

/// Bytes in their canonical form: the largest binary unit that divides them.
pub fn show_bytes(value: u64) -> String {
    for (unit, scale) in [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if value.is_multiple_of(scale) {
            return format!("{}{unit}", value / scale);
        }
    }
    format!("{value}B")
}

/// `number` × `scale`, rounded up, when it is a plain decimal and fits.
fn scaled(number: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |s: &str| s.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 9 || number.ends_with('.')
    {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(scale)?;
    let fraction = if fraction.is_empty() {
        0
    } else {
        let denominator = 10u128.pow(u32::try_from(fraction.len()).ok()?);
        let numerator = u128::from(fraction.parse::<u64>().ok()?) * u128::from(scale);
        u64::try_from(numerator.div_ceil(denominator)).ok()?
    };
    whole.checked_add(fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_gateway_writes() {
        assert_eq!(millicores("500m"), Ok(500));
        assert_eq!(millicores("2"), Ok(2000));
        assert_eq!(millicores("0.5"), Ok(500));
        assert_eq!(bytes("512Mi"), Ok(512 << 20));
        assert_eq!(bytes("1G"), Ok(1_000_000_000));
        assert_eq!(bytes("1.5Gi"), Ok(3 << 29));
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(milliseconds("60s"), Ok(60_000));
        assert_eq!(milliseconds("500ms"), Ok(500));
        assert_eq!(milliseconds("1.5h"), Ok(5_400_000));
    }

    #[test]
    fn refuses_nonsense_zero_and_overflow() {
        for text in ["", "0", "-1", "1.", ".5", "two", "5 m", "1e3", "0m", "99999999999999999999"] {
            assert!(millicores(text).is_err(), "{text}");
        }
        for text in ["", "0", "0Mi", "-1Gi", "1Xi", "Mi", "1,5Gi", "99999999999Ti", "lots"] {
            assert!(bytes(text).is_err(), "{text}");
        }
        for text in ["", "60", "s", "0s", "never", "-5s", "5 minutes"] {
            assert!(milliseconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn equal_amounts_are_written_alike() {
        assert_eq!(show_millicores(millicores("1000m").unwrap()), "1");
        assert_eq!(show_millicores(millicores("0.25").unwrap()), "250m");
        assert_eq!(show_bytes(bytes("1024Mi").unwrap()), "1GiB");
        assert_eq!(show_bytes(bytes("512Mi").unwrap()), "512MiB");
        assert_eq!(bytes(&show_bytes(1_000_001)), Ok(1_000_001));
    }
}
