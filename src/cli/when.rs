//! Moments and lengths of time as people write and read them.
//!
//! Times are UTC throughout: machines of one host and of another are compared by them, and a
//! time zone would only be right on one of them.

use std::time::Duration;

use super::{
    failure::{Failure, Outcome},
    state,
};
use crate::calendar::{self, DAY, days};

/// A moment as RFC 3339 has it, in UTC with milliseconds: `2026-11-21T13:32:00.250Z`.
pub fn rfc3339(millis: u64) -> String {
    format!("{}.{:03}Z", calendar::utc(millis / 1000), millis % 1000)
}

/// How long something has lasted, in words, as `docker ps` says it.
pub fn in_words(seconds: u64) -> String {
    let several = |count: u64, unit: &str| format!("{count} {unit}");
    match seconds {
        0 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        2..60 => several(seconds, "seconds"),
        60..120 => "About a minute".to_owned(),
        120..3600 => several(seconds / 60, "minutes"),
        3600..7200 => "About an hour".to_owned(),
        7200..172_800 => several(seconds / 3600, "hours"),
        172_800..1_209_600 => several(seconds / DAY, "days"),
        1_209_600..5_184_000 => several(seconds / (7 * DAY), "weeks"),
        5_184_000..63_072_000 => several(seconds / (30 * DAY), "months"),
        _ => several(seconds / (365 * DAY), "years"),
    }
}

/// How long ago a moment (seconds since 1970) was, in words.
pub fn ago(moment: u64) -> String {
    format!("{} ago", in_words(state::now().saturating_sub(moment)))
}

/// A length of time: `90s`, `1m30s`, `1.5h`, `250ms`, `2d`. A bare number is refused.
pub fn duration(word: &str) -> Option<Duration> {
    let mut rest = word;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|at| *at > 0)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, next) = tail.split_at(letters);
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => DAY as f64,
            _ => return None,
        };
        let part = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        total = total.checked_add(part)?;
        rest = next;
    }
    (!word.is_empty()).then_some(total)
}

/// A moment, in milliseconds since 1970: so long before `now` (`10m`), seconds since 1970
/// (`1763731920`), or a date with or without a time (`2026-11-21`, `2026-11-21T13:32:00+01:00`).
pub fn moment(word: &str, now: u64) -> Outcome<u64> {
    if let Some(length) = duration(word) {
        return Ok(now.saturating_sub(u64::try_from(length.as_millis()).unwrap_or(u64::MAX)));
    }
    if let Some(seconds) = word.parse::<f64>().ok().filter(|s| (0.0..1e12).contains(s)) {
        return Ok((seconds * 1000.0) as u64);
    }
    calendar(word).ok_or_else(|| {
        Failure::new(format!(
            "{word:?} is no time; it must be like 10m, 1h30m, 1763731920, 2026-11-21 or 2026-11-21T13:32:00Z"
        ))
    })
}

fn calendar(word: &str) -> Option<u64> {
    let (day, time) = word.split_once(['T', 't', ' ']).unwrap_or((word, "00:00:00"));
    let numbers = |text: &str, by: char| -> Option<Vec<u64>> {
        let number = |part: &str| part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok())?;
        text.split(by).map(number).collect()
    };
    let [year @ 1970..=9999, month @ 1..=12, day @ 1..=31] = numbers(day, '-')?[..] else { return None };
    let (clock, offset) = offset(time)?;
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let parts = numbers(clock, ':')?;
    let (hour, minute, second) = match parts[..] {
        [hour @ 0..24, minute @ 0..60] => (hour, minute, 0),
        [hour @ 0..24, minute @ 0..60, second @ 0..=60] => (hour, minute, second),
        _ => return None,
    };
    let digits = fraction.bytes().all(|b| b.is_ascii_digit()) && !fraction.is_empty();
    let thousandths =
        digits.then(|| format!("{fraction:0<3}").get(..3).and_then(|f| f.parse::<u64>().ok()))??;
    let seconds = days(year, month, day) * DAY + hour * 3600 + minute * 60 + second;
    let utc = i64::try_from(seconds).ok()?.checked_sub(offset)?;
    Some(u64::try_from(utc).ok()? * 1000 + thousandths)
}

/// A time of day without its offset from UTC, and that offset in seconds.
fn offset(time: &str) -> Option<(&str, i64)> {
    if let Some(clock) = time.strip_suffix(['Z', 'z']) {
        return Some((clock, 0));
    }
    let Some(at) = time.rfind(['+', '-']) else { return Some((time, 0)) };
    let (clock, zone) = time.split_at(at);
    let sign = if zone.starts_with('-') { -1 } else { 1 };
    let (hours, minutes) = zone.get(1..)?.split_once(':')?;
    let (hours, minutes) = (hours.parse::<u8>().ok()?, minutes.parse::<u8>().ok()?);
    (hours < 24 && minutes < 60).then(|| (clock, sign * (i64::from(hours) * 3600 + i64::from(minutes) * 60)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_in_utc() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(rfc3339(1_767_225_599_999), "2025-12-31T23:59:59.999Z");
        assert_eq!(rfc3339(4_102_444_800_001), "2100-01-01T00:00:00.001Z");
    }

    #[test]
    fn a_moment_that_is_written_is_read_again() {
        for millis in (0..4_200_000_000_000u64).step_by(86_399_000_123) {
            assert_eq!(moment(&rfc3339(millis), 0).unwrap(), millis);
        }
    }

    #[test]
    fn moments_are_read_in_every_form_that_is_offered() {
        assert_eq!(moment("10m", 1_000_000).unwrap(), 400_000);
        assert_eq!(moment("1h", 1_000).unwrap(), 0);
        assert_eq!(moment("12.5", 0).unwrap(), 12_500);
        assert_eq!(moment("1970-01-02", 0).unwrap(), DAY * 1000);
        assert_eq!(moment("1970-01-01T01:00:00+01:00", 0).unwrap(), 0);
        assert_eq!(moment("1970-01-01T00:30:00.5-00:30", 0).unwrap(), 3_600_500);
        assert_eq!(moment("1970-01-01 00:01", 0).unwrap(), 60_000);
        for bad in ["", "yesterday", "1970-13-01", "1970-01-01T25:00:00", "1970-01-01Tx", "-5", "1x"] {
            assert!(moment(bad, 0).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_need_units() {
        assert_eq!(duration("1m30s"), Some(Duration::from_secs(90)));
        assert_eq!(duration("1.5h"), Some(Duration::from_secs(5400)));
        assert_eq!(duration("250ms"), Some(Duration::from_millis(250)));
        for bad in ["", "10", "s", "1y", "1m 30s", "-1s", "1..2s", "99999999999999999999d"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn lengths_of_time_are_said_as_docker_says_them() {
        let said: Vec<String> = [0, 1, 59, 61, 121, 3601, 7201, 172_801].into_iter().map(in_words).collect();
        let wanted = [
            "Less than a second",
            "1 second",
            "59 seconds",
            "About a minute",
            "2 minutes",
            "About an hour",
            "2 hours",
            "2 days",
        ];
        assert_eq!(said, wanted);
    }
}
