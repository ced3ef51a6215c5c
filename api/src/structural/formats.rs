//! The string formats upstream checks; unknown formats accept everything.

use std::net::{Ipv4Addr, Ipv6Addr};

use base64::Engine;

/// Whether `text` has the format.
pub(super) fn matches(format: &str, text: &str) -> bool {
    match format {
        "ipv4" => text.parse::<Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<Ipv6Addr>().is_ok(),
        "cidr" => text.contains('/') && text.parse::<ipnet::IpNet>().is_ok(),
        "email" => email(text),
        "uuid" | "uuid3" | "uuid4" | "uuid5" => uuid(format, text),
        "byte" => base64::engine::general_purpose::STANDARD.decode(text).is_ok(),
        "date" => text.len() == 10 && text.parse::<jiff::civil::Date>().is_ok(),
        "date-time" | "datetime" => text.parse::<jiff::Timestamp>().is_ok(),
        "duration" => duration(text),
        "uri" => uri(text),
        "hostname" => hostname(text),
        "mac" => mac(text),
        "password" => true,
        _ => true,
    }
}

fn email(text: &str) -> bool {
    let Some((user, host)) = text.rsplit_once('@') else { return false };
    !user.is_empty() && !host.is_empty() && !text.contains(char::is_whitespace) && !user.contains('@')
}

fn uuid(format: &str, text: &str) -> bool {
    let plain: String = text.chars().filter(|c| *c != '-').collect();
    let dashes = text.len() == 36 && [8, 13, 18, 23].iter().all(|i| text.as_bytes()[*i] == b'-');
    let shape = plain.len() == 32 && plain.bytes().all(|b| b.is_ascii_hexdigit()) && (dashes || text.len() == 32);
    let version = format.strip_prefix("uuid").filter(|v| !v.is_empty());
    shape && version.is_none_or(|v| plain[12..13] == *v)
}

/// A Go duration, or a number and a unit in words.
fn duration(text: &str) -> bool {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if unsigned == "0" {
        return true;
    }
    let mut rest = unsigned.trim();
    if rest.is_empty() {
        return false;
    }
    while !rest.is_empty() {
        let digits = rest.bytes().position(|b| !b.is_ascii_digit() && b != b'.').unwrap_or(rest.len());
        if digits == 0 || rest[..digits].parse::<f64>().is_err() {
            return false;
        }
        rest = rest[digits..].trim_start();
        let letters = rest.find(|c: char| !c.is_alphabetic()).unwrap_or(rest.len());
        let known = matches!(
            &rest[..letters],
            "ns" | "us"
                | "µs"
                | "μs"
                | "ms"
                | "s"
                | "m"
                | "h"
                | "d"
                | "w"
                | "nano"
                | "micro"
                | "milli"
                | "sec"
                | "secs"
                | "second"
                | "seconds"
                | "min"
                | "mins"
                | "minute"
                | "minutes"
                | "hr"
                | "hrs"
                | "hour"
                | "hours"
                | "day"
                | "days"
                | "wk"
                | "wks"
                | "week"
                | "weeks"
        );
        if !known {
            return false;
        }
        rest = rest[letters..].trim_start();
    }
    true
}

/// An absolute URI or a rooted path, as Go's `ParseRequestURI` takes it.
fn uri(text: &str) -> bool {
    if text.starts_with('/') {
        return true;
    }
    let Some((scheme, rest)) = text.split_once(':') else { return false };
    let mut bytes = scheme.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'))
        && !rest.is_empty()
        && !text.contains([' ', '\t', '\n'])
}

fn hostname(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    let label = |s: &str| {
        !s.is_empty()
            && s.len() <= 63
            && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !s.starts_with('-')
            && !s.ends_with('-')
    };
    text.len() <= 255 && text.split('.').all(label)
}

fn mac(text: &str) -> bool {
    let pairs: Vec<&str> = text.split([':', '-']).collect();
    matches!(pairs.len(), 6 | 8 | 20) && pairs.iter().all(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn accepts_and_refuses() {
        for (format, good, bad) in [
            ("duration", "1h30m", "x"),
            ("ipv4", "1.2.3.4", "1.2.3"),
            ("email", "a@b.c", "x"),
            ("uuid", "11111111-1111-1111-1111-111111111111", "x"),
            ("cidr", "10.0.0.0/8", "10.0.0.0"),
            ("byte", "eA==", "*"),
            ("date", "2020-01-01", "x"),
            ("date-time", "2020-01-01T00:00:00Z", "2020-01-01"),
            ("uri", "http://x/", "::"),
            ("hostname", "a.b", "a b"),
            ("mac", "00:11:22:33:44:55", "00:11"),
        ] {
            assert!(matches(format, good), "{format} {good}");
            assert!(!matches(format, bad), "{format} {bad}");
        }
        assert!(matches("made-up", "anything"));
    }
}
