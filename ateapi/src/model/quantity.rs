// SPDX-License-Identifier: Apache-2.0
//! Quantities with units, as documents write them: "60s", "256MiB", "500m".
use std::time::Duration;

/// Splits digits (with an optional fraction) from the unit.
fn split(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    if number.is_empty() || number.starts_with('.') || number.ends_with('.') || number.len() > 18 {
        return None;
    }
    Some((number.parse().ok()?, unit))
}

/// "250ms", "60s", "5m", "1.5h", "2d". The unit is required; at most 10 years.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration: write a number and ms, s, m, h or d, as in \"60s\"");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let seconds = match unit {
        "ms" => number / 1e3,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3_600.0,
        "d" => number * 86_400.0,
        _ => return Err(wrong()),
    };
    if seconds > 315_360_000.0 {
        return Err(format!("{text:?} is more than ten years"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// "256MiB", "1GiB", "512Mi", "2GB", "1048576" (bytes).
pub fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!("{text:?} is no amount of bytes: write a number and KiB, MiB, GiB or TiB, as in \"256MiB\"")
    };
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let factor: u64 = match unit {
        "" | "B" => 1,
        "KiB" | "Ki" => 1 << 10,
        "MiB" | "Mi" => 1 << 20,
        "GiB" | "Gi" => 1 << 30,
        "TiB" | "Ti" => 1 << 40,
        "kB" | "KB" | "k" => 1_000,
        "MB" | "M" => 1_000_000,
        "GB" | "G" => 1_000_000_000,
        "TB" | "T" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    let value = number * factor as f64;
    if value > (1_u64 << 60) as f64 {
        return Err(format!("{text:?} is more than an exbibyte"));
    }
    Ok(value.round() as u64)
}

/// Cores as thousandths: "500m" is 500, "2" is 2000, "1.5" is 1500.
pub fn cpu_millis(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no number of cores: write \"500m\", \"2\" or \"1.5\"");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let millis = match unit {
        "" => number * 1e3,
        "m" => number,
        _ => return Err(wrong()),
    };
    if !(1.0..=1e7).contains(&millis) {
        return Err(format!("{text:?} is outside 1m to 10000 cores"));
    }
    Ok(millis.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(duration("60s"), Ok(Duration::from_mins(1)));
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2d"), Ok(Duration::from_hours(48)));
        for bad in ["", "60", "s", "-1s", "1 s", "1.s", ".5s", "1w", "1e3s", "99999d", "60S"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn amounts() {
        assert_eq!(bytes("256MiB"), Ok(268_435_456));
        assert_eq!(bytes("1Gi"), Ok(1 << 30));
        assert_eq!(bytes("1048576"), Ok(1_048_576));
        assert_eq!(bytes("1.5KiB"), Ok(1_536));
        for bad in ["", "MiB", "1 MiB", "-1", "1mib", "9999999TiB", "1e9"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cores() {
        assert_eq!(cpu_millis("500m"), Ok(500));
        assert_eq!(cpu_millis("2"), Ok(2_000));
        assert_eq!(cpu_millis("1.5"), Ok(1_500));
        for bad in ["", "0", "0m", "m", "2c", "-1", "100000"] {
            assert!(cpu_millis(bad).is_err(), "{bad}");
        }
    }
}
