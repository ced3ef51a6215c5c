//! The syntax of cron schedules, with the messages of the parser upstream uses.

/// `(first, last)` of the five fields.
const BOUNDS: [(u32, u32); 5] = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 6)];
const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// Whether a schedule parses; a leading `TZ=` or `CRON_TZ=` is skipped.
pub(crate) fn check(schedule: &str) -> Result<(), String> {
    let mut text = schedule;
    if text.starts_with("TZ=") || text.starts_with("CRON_TZ=") {
        let (zone, rest) = text.split_once(' ').unwrap_or((text, ""));
        let zone = zone.split_once('=').map_or("", |z| z.1);
        if jiff::tz::TimeZone::get(zone).is_err() {
            return Err(format!("provided bad location {zone}: unknown time zone {zone}"));
        }
        text = rest.trim();
    }
    if text.starts_with('@') {
        return descriptor(text);
    }
    let fields: Vec<&str> = text.split_whitespace().collect();
    if fields.len() != 5 {
        return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
    }
    fields.iter().zip(BOUNDS).enumerate().try_for_each(|(i, (field, bounds))| {
        field.split(',').filter(|p| !p.is_empty()).try_for_each(|part| range(part, bounds, i))
    })
}

fn descriptor(text: &str) -> Result<(), String> {
    match text {
        "@yearly" | "@annually" | "@monthly" | "@weekly" | "@daily" | "@midnight" | "@hourly" => Ok(()),
        _ => match text.strip_prefix("@every ") {
            Some(duration) if is_go_duration(duration) => Ok(()),
            Some(duration) => Err(format!("failed to parse duration {text}: time: invalid duration \"{duration}\"")),
            None => Err(format!("unrecognized descriptor: {text}")),
        },
    }
}

/// `1h30m`, `90s`, `1.5h`.
fn is_go_duration(text: &str) -> bool {
    let mut rest = text.trim_start_matches(['-', '+']);
    if rest == "0" {
        return true;
    }
    if rest.is_empty() {
        return false;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        if digits == 0 {
            return false;
        }
        rest = &rest[digits..];
        let Some(unit) =
            ["ns", "us", "µs", "ms", "s", "m", "h"].iter().filter(|u| rest.starts_with(**u)).max_by_key(|u| u.len())
        else {
            return false;
        };
        rest = &rest[unit.len()..];
    }
    true
}

fn range(expression: &str, (min, max): (u32, u32), field: usize) -> Result<(), String> {
    let mut step_parts = expression.split('/');
    let body = step_parts.next().unwrap_or_default();
    let step = step_parts.next();
    if step_parts.next().is_some() {
        return Err(format!("too many slashes: {expression}"));
    }
    let mut bounds = body.split('-');
    let low = bounds.next().unwrap_or_default();
    let high = bounds.next();
    if bounds.next().is_some() {
        return Err(format!("too many hyphens: {expression}"));
    }
    let (start, mut end) = if low == "*" || low == "?" {
        (min, max)
    } else {
        let start = number(low, field)?;
        let end = match high {
            Some(high) => number(high, field)?,
            None => start,
        };
        (start, end)
    };
    if let Some(step) = step {
        let step: u32 = step.parse().map_err(|_| bad_number(step))?;
        if low != "*" && low != "?" && high.is_none() {
            end = max;
        }
        if step == 0 {
            return Err(format!("step of range should be a positive number: {expression}"));
        }
    }
    if start < min {
        return Err(format!("beginning of range ({start}) below minimum ({min}): {expression}"));
    }
    if end > max {
        return Err(format!("end of range ({end}) above maximum ({max}): {expression}"));
    }
    if start > end {
        return Err(format!("beginning of range ({start}) beyond end of range ({end}): {expression}"));
    }
    Ok(())
}

fn number(text: &str, field: usize) -> Result<u32, String> {
    let lower = text.to_ascii_lowercase();
    let named = match field {
        3 => MONTHS.iter().position(|m| *m == lower).map(|i| i as u32 + 1),
        4 => DAYS.iter().position(|d| *d == lower).map(|i| i as u32),
        _ => None,
    };
    named.map_or_else(|| text.parse().map_err(|_| bad_number(text)), Ok)
}

fn bad_number(text: &str) -> String {
    format!("failed to parse int from {text}: strconv.Atoi: parsing \"{text}\": invalid syntax")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules() {
        for (schedule, want) in [
            ("* * * * *", ""),
            ("*/5 0-12 1,15 jan-mar mon", ""),
            ("@hourly", ""),
            ("@every 1h30m", ""),
            ("@every x", "failed to parse duration @every x: time: invalid duration \"x\""),
            ("* * *", "expected exactly 5 fields, found 3: [* * *]"),
            ("61 * * * *", "end of range (61) above maximum (59): 61"),
            ("5-1 * * * *", "beginning of range (5) beyond end of range (1): 5-1"),
            ("*/0 * * * *", "step of range should be a positive number: */0"),
            ("x * * * *", "failed to parse int from x: strconv.Atoi: parsing \"x\": invalid syntax"),
            ("@bogus", "unrecognized descriptor: @bogus"),
            ("TZ=UTC * * * * *", ""),
        ] {
            assert_eq!(check(schedule).err().unwrap_or_default(), want, "{schedule}");
        }
    }
}
