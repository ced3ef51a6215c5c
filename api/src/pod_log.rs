//! `PodLogOptions` as they stand in a query: the API server and the nodes read and judge them alike.

use jiff::Timestamp;

use crate::{
    field::{Error, ErrorList, Path},
    schema,
    text::parse_int,
};

/// Streams that can be asked for.
const STREAMS: [&str; 3] = ["All", "Stderr", "Stdout"];

/// Which part of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodLogOptions {
    /// Only what is at most so old.
    pub since_seconds: Option<i64>,
    /// Only what was written since.
    pub since_time: Option<Timestamp>,
    /// Only the last lines.
    pub tail_lines: Option<i64>,
    /// At most so many bytes.
    pub limit_bytes: Option<i64>,
    /// `All`, `Stderr` or `Stdout`.
    pub stream: Option<String>,
}

impl PodLogOptions {
    /// Reads them through `get`, which gives the first value of a parameter; the error is Go's, of what does not parse.
    pub fn parse<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Result<Self, String> {
        let number = |name: &str| get(name).map(parse_int).transpose();
        let since_time = get("sinceTime").map(|text| match text {
            // What older clients write for no time: the beginning of all times.
            "" | "null" => Ok(Timestamp::MIN),
            _ => schema::time(text),
        });
        Ok(Self {
            since_seconds: number("sinceSeconds")?,
            since_time: since_time.transpose()?,
            tail_lines: number("tailLines")?,
            limit_bytes: number("limitBytes")?,
            stream: get("stream").map(str::to_owned),
        })
    }

    /// What is wrong with them.
    pub fn validate(&self) -> ErrorList {
        let mut errors = ErrorList::new();
        let path = Path::new;
        let mut least = |name: &str, value: Option<i64>, least: i64, detail: &str| {
            if let Some(value) = value.filter(|value| *value < least) {
                errors.push(Error::invalid(&path(name), value, detail));
            }
        };
        least("tailLines", self.tail_lines, 0, "must be greater than or equal to 0");
        least("limitBytes", self.limit_bytes, 1, "must be greater than 0");
        if self.since_time.is_none() {
            least("sinceSeconds", self.since_seconds, 1, "must be greater than 0");
        } else if self.since_seconds.is_some() {
            let detail = "at most one of `sinceTime` or `sinceSeconds` may be specified";
            errors.push(Error::forbidden(&path("[]"), detail));
        }
        let stream = self.stream.as_deref().unwrap_or("All");
        if !STREAMS.contains(&stream) {
            errors.push(Error::not_supported(&path("stream"), stream, &STREAMS));
        }
        if stream != "All" && self.tail_lines.is_some() {
            let detail = "`tailLines` and specific `stream` are mutually exclusive for now";
            errors.push(Error::forbidden(&path("[]"), detail));
        }
        errors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(query: &[(&str, &'static str)]) -> Result<PodLogOptions, String> {
        PodLogOptions::parse(|name| query.iter().find(|(n, _)| *n == name).map(|(_, value)| *value))
    }

    #[test]
    fn what_does_not_parse_is_told_as_go_does() {
        for (name, value, want) in [
            (
                "sinceTime",
                "abc",
                "parsing time \"abc\" as \"2006-01-02T15:04:05Z07:00\": cannot parse \"abc\" as \"2006\"",
            ),
            ("tailLines", "x", "strconv.ParseInt: parsing \"x\": invalid syntax"),
            ("limitBytes", "", "strconv.ParseInt: parsing \"\": invalid syntax"),
            (
                "sinceSeconds",
                "9223372036854775808",
                "strconv.ParseInt: parsing \"9223372036854775808\": value out of range",
            ),
        ] {
            assert_eq!(read(&[(name, value)]).unwrap_err(), want, "{name}={value}");
        }
        assert_eq!(read(&[("sinceTime", "null")]).unwrap().since_time, Some(Timestamp::MIN));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let both = "[]: Forbidden: at most one of `sinceTime` or `sinceSeconds` may be specified";
        let mixed = "[]: Forbidden: `tailLines` and specific `stream` are mutually exclusive for now";
        for (query, want) in [
            (&[("tailLines", "-1")][..], "tailLines: Invalid value: -1: must be greater than or equal to 0"),
            (&[("limitBytes", "0")], "limitBytes: Invalid value: 0: must be greater than 0"),
            (&[("sinceSeconds", "0")], "sinceSeconds: Invalid value: 0: must be greater than 0"),
            (&[("sinceSeconds", "0"), ("sinceTime", "2020-01-01T00:00:00Z")], both),
            (
                &[("stream", "Both")],
                "stream: Unsupported value: \"Both\": supported values: \"All\", \"Stderr\", \"Stdout\"",
            ),
            (&[("stream", "Stderr"), ("tailLines", "5")], mixed),
            (&[("stream", "All"), ("tailLines", "0"), ("limitBytes", "1"), ("sinceSeconds", "1")], ""),
        ] {
            let errors = read(query).unwrap().validate();
            let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
            assert_eq!(told.join("; "), want, "{query:?}");
        }
    }
}
