//! Go's `time.Parse` of RFC 3339, for its error texts.

use jiff::Timestamp;

use crate::text::quote;

/// `metav1.Time`'s layout.
pub(super) const TIME: &str = "2006-01-02T15:04:05Z07:00";
/// `metav1.MicroTime`'s layout.
pub(super) const MICRO_TIME: &str = "2006-01-02T15:04:05.000000Z07:00";

/// Parses a time; the error names the layout element that did not match.
pub(super) fn parse(text: &str, layout: &str) -> Result<Timestamp, String> {
    let fail = |rest: &str, element: &str| {
        Err(format!(
            "parsing time {} as {}: cannot parse {} as {}",
            quote(text),
            quote(layout),
            quote(rest),
            quote(element)
        ))
    };
    let mut rest = text;
    for element in ["2006", "-", "01", "-", "02", "T", "15", ":", "04", ":", "05"] {
        let width = element.len();
        let ok = if element.as_bytes()[0].is_ascii_digit() {
            rest.len() >= width && rest.as_bytes()[..width].iter().all(u8::is_ascii_digit)
        } else {
            rest.starts_with(element)
        };
        if !ok {
            return fail(rest, element);
        }
        rest = &rest[width..];
    }
    if let Some(fraction) = rest.strip_prefix(['.', ',']) {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        if digits > 0 {
            rest = &fraction[digits..];
        }
    } else if layout == MICRO_TIME {
        return fail(rest, ".000000");
    }
    let zone = rest.as_bytes();
    let is_zone = rest == "Z"
        || zone.len() == 6
            && matches!(zone[0], b'+' | b'-')
            && zone[3] == b':'
            && [1, 2, 4, 5].iter().all(|i| zone[*i].is_ascii_digit());
    if !is_zone {
        if let Some(extra) = rest.strip_prefix('Z') {
            return Err(format!("parsing time {}: extra text: {}", quote(text), quote(extra)));
        }
        return fail(rest, "Z07:00");
    }
    text.parse().map_err(|_| {
        let element = if text[5..7].parse().is_ok_and(|m: u8| (1..=12).contains(&m)) { "day" } else { "month" };
        format!("parsing time {}: {element} out of range", quote(text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_like_go() {
        assert!(parse("2020-01-02T03:04:05Z", TIME).is_ok());
        assert!(parse("2020-01-02T03:04:05.123+01:00", TIME).is_ok());
        assert_eq!(
            parse("2020-01-02", MICRO_TIME).unwrap_err(),
            "parsing time \"2020-01-02\" as \"2006-01-02T15:04:05.000000Z07:00\": cannot parse \"\" as \"T\""
        );
        assert_eq!(
            parse("x", TIME).unwrap_err(),
            "parsing time \"x\" as \"2006-01-02T15:04:05Z07:00\": cannot parse \"x\" as \"2006\""
        );
        assert_eq!(
            parse("2020-13-02T03:04:05Z", TIME).unwrap_err(),
            "parsing time \"2020-13-02T03:04:05Z\": month out of range"
        );
    }
}
