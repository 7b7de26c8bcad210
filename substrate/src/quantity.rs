// SPDX-License-Identifier: Apache-2.0
//! Quantities as a person types and reads them.
use std::time::Duration;

/// Parses `500ms`, `30s`, `5m`, `2h`, `1d`; for clap.
///
/// # Errors
/// When there is no number or no known unit.
pub fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong(text))?;
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong(text)),
    };
    number.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(|| wrong(text))
}

fn wrong(text: &str) -> String {
    format!("{text:?} is not a duration: write a whole number and ms, s, m, h or d, for example 90s")
}

/// `0`, `512B`, `1.5MiB`, `12GiB`: binary units, one digit below ten.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    if count == 0 {
        return "0".to_owned();
    }
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit > 0 && value < 9.95 {
        format!("{value:.1}{}", UNITS[unit])
    } else {
        format!("{value:.0}{}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_number_and_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["", "s", "10", "1.5s", "10 s", "99999999999999999999d", "5y"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_read_well() {
        let cases: [(u64, &str); 6] = [
            (0, "0"),
            (512, "512B"),
            (1536, "1.5KiB"),
            (10_800_000, "10MiB"),
            (96 << 20, "96MiB"),
            (3 << 30, "3.0GiB"),
        ];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
    }
}
