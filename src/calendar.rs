//! Dates from seconds and back, in UTC (Gregorian). The C library would read time zone files
//! for it, which the start of a machine has no time for.

/// Seconds of a day.
pub const DAY: u64 = 24 * 60 * 60;

/// A moment as `2026-11-21T13:32:00`, from seconds since 1970.
pub fn utc(seconds: u64) -> String {
    let (year, month, day) = date(seconds / DAY);
    let of_day = seconds % DAY;
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Days of a month.
pub fn days_of_month(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Leap days from 1970 to the start of `year`.
fn leap_days(year: u64) -> u64 {
    let until = |year: u64| year / 4 - year / 100 + year / 400;
    until(year - 1) - until(1969)
}

/// Days from 1970-01-01 to a date.
pub fn days(year: u64, month: u64, day: u64) -> u64 {
    let months: u64 = (1..month).map(|m| days_of_month(year, m)).sum();
    (year - 1970) * 365 + leap_days(year) + months + day - 1
}

/// Year, month and day of so many days after 1970-01-01.
fn date(count: u64) -> (u64, u64, u64) {
    let mut year = 1970 + count / 366;
    while days(year + 1, 1, 1) <= count {
        year += 1;
    }
    let mut left = count - days(year, 1, 1);
    let mut month = 1;
    while left >= days_of_month(year, month) {
        left -= days_of_month(year, month);
        month += 1;
    }
    (year, month, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leap_days_and_ends_of_years_are_right() {
        assert_eq!(utc(0), "1970-01-01T00:00:00");
        assert_eq!(utc(1_582_934_400), "2020-02-29T00:00:00");
        assert_eq!(utc(1_609_459_199), "2020-12-31T23:59:59");
        assert_eq!(utc(4_107_542_400), "2100-03-01T00:00:00");
    }

    #[test]
    fn a_date_and_its_day_are_one() {
        for day in 0..60_000 {
            let (year, month, of_month) = date(day);
            assert_eq!(days(year, month, of_month), day);
        }
    }
}
