//! Cron schedules: five fields, names, steps, ranges, `@daily` and friends, in a time zone. Pure.
//!
//! As in every cron: when both day of month and day of week are restricted, either suffices.

use jiff::civil::{Date, DateTime, Weekday};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ToSpan};

/// Why a schedule cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Error {
    #[error("expected exactly 5 fields, found {0}: [{1}]")]
    Fields(usize, String),
    #[error("unrecognized descriptor: {0}")]
    Descriptor(String),
    #[error("failed to parse {0}: {1}")]
    Field(&'static str, String),
}

/// A schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Schedule {
    /// Fields as bit sets.
    Fields(Fields),
    /// `@every`.
    Every(i64),
}

/// Minutes, hours, days of month, months, days of week (0 is Sunday).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fields {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    any_day: bool,
    any_weekday: bool,
}

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

fn number(text: &str, names: &[&str], first: u32) -> Option<u32> {
    let lower = text.to_ascii_lowercase();
    if let Some(at) = names.iter().position(|n| *n == lower) {
        return Some(u32::try_from(at).ok()? + first);
    }
    text.parse().ok()
}

fn field(what: &'static str, text: &str, min: u32, max: u32, names: &[&str]) -> Result<u64, Error> {
    let bad = || Error::Field(what, text.to_owned());
    let mut bits = 0;
    for part in text.split(',') {
        let (range, step) = part.split_once('/').map_or((part, None), |(r, s)| (r, Some(s)));
        let step: u32 = step.map_or(Ok(1), str::parse).map_err(|_| bad())?;
        let (from, to) = if range == "*" || range == "?" {
            (min, max)
        } else if let Some((a, b)) = range.split_once('-') {
            (number(a, names, min).ok_or_else(bad)?, number(b, names, min).ok_or_else(bad)?)
        } else {
            let n = number(range, names, min).ok_or_else(bad)?;
            (n, if part.contains('/') { max } else { n })
        };
        let sunday_as_seven = what == "day of week" && to == 7;
        if step == 0 || from < min || from > to || (to > max && !sunday_as_seven) {
            return Err(bad());
        }
        for n in (from..=to).step_by(step as usize) {
            bits |= 1u64 << (if sunday_as_seven { n % 7 } else { n });
        }
    }
    Ok(bits)
}

impl Schedule {
    /// Reads a schedule.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        if let Some(descriptor) = text.strip_prefix('@') {
            return Self::descriptor(text, descriptor);
        }
        let parts: Vec<&str> = text.split_whitespace().collect();
        let [minutes, hours, days, months, weekdays] = parts.as_slice() else {
            return Err(Error::Fields(parts.len(), parts.join(" ")));
        };
        let open = |t: &str| t.starts_with('*') || t.starts_with('?');
        Ok(Self::Fields(Fields {
            minutes: field("minute", minutes, 0, 59, &[])?,
            hours: field("hour", hours, 0, 23, &[])?,
            days: field("day of month", days, 1, 31, &[])?,
            months: field("month", months, 1, 12, &MONTHS)?,
            weekdays: field("day of week", weekdays, 0, 6, &DAYS)?,
            any_day: open(days),
            any_weekday: open(weekdays),
        }))
    }

    fn descriptor(text: &str, descriptor: &str) -> Result<Self, Error> {
        let fields = match descriptor {
            "yearly" | "annually" => "0 0 1 1 *",
            "monthly" => "0 0 1 * *",
            "weekly" => "0 0 * * 0",
            "daily" | "midnight" => "0 0 * * *",
            "hourly" => "0 * * * *",
            other => {
                let span = other.strip_prefix("every ").and_then(|d| d.trim().parse::<Span>().ok());
                let seconds =
                    span.and_then(|s| s.total((jiff::Unit::Second, jiff::SpanRelativeTo::days_are_24_hours())).ok());
                return match seconds {
                    Some(seconds) if seconds >= 1.0 => Ok(Self::Every(seconds as i64)),
                    _ => Err(Error::Descriptor(text.to_owned())),
                };
            }
        };
        Self::parse(fields)
    }

    /// The first time after `after`.
    pub(crate) fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        match self {
            Self::Every(seconds) => after.checked_add(jiff::SignedDuration::from_secs(*seconds)).ok(),
            Self::Fields(fields) => fields.next(after, zone),
        }
    }
}

fn has(bits: u64, n: i8) -> bool {
    u32::try_from(n).is_ok_and(|n| bits & (1 << n) != 0)
}

impl Fields {
    fn day(&self, date: Date) -> bool {
        let weekday = match date.weekday() {
            Weekday::Sunday => 0,
            other => other.to_monday_one_offset(),
        };
        let (day, week) = (has(self.days, date.day()), has(self.weekdays, weekday));
        if self.any_day || self.any_weekday { day && week } else { day || week }
    }

    fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let start = after.to_zoned(zone.clone()).datetime();
        let mut date = start.date();
        // Five years hold every schedule that can happen at all.
        for _ in 0..=5 * 366 {
            if has(self.months, date.month())
                && self.day(date)
                && let Some(found) = self.on(date, after, start, zone)
            {
                return Some(found);
            }
            date = date.checked_add(1.day()).ok()?;
        }
        None
    }

    fn on(&self, date: Date, after: Timestamp, start: DateTime, zone: &TimeZone) -> Option<Timestamp> {
        let from_hour = if date == start.date() { start.hour() } else { 0 };
        for hour in (from_hour..24).filter(|h| has(self.hours, *h)) {
            for minute in (0..60).filter(|m| has(self.minutes, *m)) {
                let local = date.at(hour, minute, 0, 0);
                let Ok(zoned) = zone.to_ambiguous_zoned(local).compatible() else { continue };
                // A time that the clock skips does not happen.
                if zoned.datetime() == local && zoned.timestamp() > after {
                    return Some(zoned.timestamp());
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(schedule: &str, after: &str) -> String {
        let zone = TimeZone::UTC;
        let schedule = Schedule::parse(schedule).unwrap();
        schedule.next(after.parse().unwrap(), &zone).map(|t| t.to_string()).unwrap_or_default()
    }

    #[test]
    fn times() {
        for (schedule, after, want) in [
            ("* * * * *", "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z"),
            ("* * * * *", "2026-01-01T00:00:30Z", "2026-01-01T00:01:00Z"),
            ("*/15 * * * *", "2026-01-01T00:50:00Z", "2026-01-01T01:00:00Z"),
            ("30 4 1,15 * 5", "2026-01-01T05:00:00Z", "2026-01-02T04:30:00Z"),
            ("0 0 29 2 *", "2026-01-01T00:00:00Z", "2028-02-29T00:00:00Z"),
            ("0 0 31 2 *", "2026-01-01T00:00:00Z", ""),
            ("0 9 * * mon-fri", "2026-01-02T10:00:00Z", "2026-01-05T09:00:00Z"),
            ("0 0 * * 7", "2026-01-01T00:00:00Z", "2026-01-04T00:00:00Z"),
            ("0 0 1 jan *", "2026-06-01T00:00:00Z", "2027-01-01T00:00:00Z"),
            ("@hourly", "2026-01-01T00:10:00Z", "2026-01-01T01:00:00Z"),
            ("@every 1h30m", "2026-01-01T00:10:00Z", "2026-01-01T01:40:00Z"),
        ] {
            assert_eq!(next(schedule, after), want, "{schedule}");
        }
    }

    #[test]
    fn what_cannot_be_read() {
        for schedule in ["* * * *", "60 * * * *", "* * 0 * *", "a * * * *", "*/0 * * * *", "5-1 * * * *", "@often"] {
            assert!(Schedule::parse(schedule).is_err(), "{schedule}");
        }
    }
}
