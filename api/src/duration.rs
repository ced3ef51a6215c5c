//! Durations as Go writes them: `1h30m`, `100ms`.

use std::time::Duration;

/// Parses Go's duration format (`1h30m`, `100ms`, `0`).
pub fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0f64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        total += number
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    Some(Duration::from_secs_f64(total))
}

/// Formats as Go does, to the millisecond (`1m30s`, `1.5s`, `250ms`).
pub fn format_duration(d: Duration) -> String {
    if d.is_zero() {
        return "0s".into();
    }
    if d < Duration::from_secs(1) {
        let ms = d.as_millis();
        return if ms == 0 { format!("{}µs", d.as_micros()) } else { format!("{ms}ms") };
    }
    let (s, ms) = (d.as_secs(), d.subsec_millis());
    let (h, m, s) = (s / 3600, s / 60 % 60, s % 60);
    let fraction = if ms == 0 { String::new() } else { format!(".{ms:03}").trim_end_matches('0').to_string() };
    match (h, m) {
        (0, 0) => format!("{s}{fraction}s"),
        (0, _) => format!("{m}m{s}{fraction}s"),
        _ => format!("{h}h{m}m{s}{fraction}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_round_trip() {
        for t in ["1h30m0s", "1.5s", "100ms", "5m0s", "0s", "2s"] {
            assert_eq!(format_duration(parse_duration(t).unwrap()), t);
        }
        for bad in ["", "5", "x", "5q"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
