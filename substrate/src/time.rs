// SPDX-License-Identifier: Apache-2.0
//! Times as people and programs read them: RFC 3339 in UTC, and ages.
use std::time::{SystemTime, UNIX_EPOCH};

/// Now, unix ms.
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// `2026-11-22T06:10:00.123Z`. Civil date from a day count as in Howard Hinnant's chrono-compatible algorithms.
pub fn rfc3339(unix_ms: i64) -> String {
    let (days, ms) = (unix_ms.div_euclid(86_400_000), unix_ms.rem_euclid(86_400_000));
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// [`rfc3339`], or nothing for a time that is not set.
pub fn when(unix_ms: i64) -> Option<String> {
    (unix_ms > 0).then(|| rfc3339(unix_ms))
}

/// `850ms`, `12s`, `5m30s`, `3h12m`, `4d`: two units at most.
pub fn duration(ms: i64) -> String {
    let ms = ms.max(0);
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms}ms"),
        1..60 => format!("{seconds}s"),
        60..600 if seconds % 60 != 0 => format!("{}m{}s", seconds / 60, seconds % 60),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 if seconds / 60 % 60 != 0 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Age of a time, `-` when it is not set.
pub fn age(then_ms: i64, now_ms: i64) -> String {
    if then_ms <= 0 {
        return "-".to_owned();
    }
    // Less than a second is noise in an age.
    match now_ms - then_ms {
        ..1000 => "0s".to_owned(),
        ms => duration(ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_agree_with_the_calendar() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(rfc3339(1_767_225_599_999), "2025-12-31T23:59:59.999Z");
        assert_eq!(rfc3339(1_795_327_805_007), "2026-11-22T06:10:05.007Z");
    }

    #[test]
    fn durations_have_two_units_at_most() {
        let cases = [
            (0, "0ms"),
            (850, "850ms"),
            (12_999, "12s"),
            (60_000, "1m"),
            (330_000, "5m30s"),
            (1_830_000, "30m"),
            (11_520_000, "3h12m"),
            (7_200_000, "2h"),
            (400_000_000, "4d"),
        ];
        for (ms, text) in cases {
            assert_eq!(duration(ms), text);
        }
        assert_eq!(age(0, 5), "-");
        assert_eq!(age(1_000, 900), "0s");
    }
}
