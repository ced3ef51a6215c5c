//! Container logs: the query of /containerLogs and its answer as a stream of bytes.

pub(crate) mod cri;
pub(crate) mod reader;

use jiff::{SignedDuration, Timestamp};

use cri::StreamKind;

/// Which part of a log, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Go on until the container ends.
    pub(crate) follow: bool,
    /// The instance before the current one.
    pub(crate) previous: bool,
    /// Begin each line with its time.
    pub(crate) timestamps: bool,
    /// Only lines written since.
    pub(crate) since: Option<Timestamp>,
    /// Only the last lines.
    pub(crate) tail: Option<u64>,
    /// At most this many bytes.
    pub(crate) limit: Option<u64>,
    /// Only one of the streams.
    pub(crate) stream: Option<StreamKind>,
}

/// A parameter that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {name} {value:?}")]
pub(crate) struct BadOption {
    name: &'static str,
    value: String,
}

impl Options {
    /// Reads the query's parameters, decoded.
    pub(crate) fn parse(query: &[(String, String)], now: Timestamp) -> Result<Self, BadOption> {
        let mut options = Options::default();
        for (name, value) in query {
            let bad = |name| BadOption { name, value: value.clone() };
            match name.as_str() {
                "follow" => options.follow = truth(value),
                "previous" => options.previous = truth(value),
                "timestamps" => options.timestamps = truth(value),
                "tailLines" | "tail" if value != "all" => {
                    options.tail = Some(value.parse().map_err(|_| bad("tailLines"))?);
                }
                "limitBytes" => {
                    options.limit = Some(value.parse().ok().filter(|n| *n > 0).ok_or_else(|| bad("limitBytes"))?);
                }
                "sinceSeconds" => {
                    let seconds: i64 = value.parse().ok().filter(|n| *n > 0).ok_or_else(|| bad("sinceSeconds"))?;
                    options.since = now.checked_sub(SignedDuration::from_secs(seconds)).ok();
                }
                "sinceTime" => options.since = Some(value.parse().map_err(|_| bad("sinceTime"))?),
                "stream" => {
                    options.stream = match value.as_str() {
                        "All" | "" => None,
                        "Stdout" => Some(StreamKind::Stdout),
                        "Stderr" => Some(StreamKind::Stderr),
                        _ => return Err(bad("stream")),
                    }
                }
                _ => {}
            }
        }
        Ok(options)
    }
}

/// Booleans as the API server writes them in queries.
pub(crate) fn truth(value: &str) -> bool {
    matches!(value, "true" | "1" | "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Options, BadOption> {
        let query: Vec<_> = pairs.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        Options::parse(&query, "2026-01-01T00:01:00Z".parse().unwrap())
    }

    #[test]
    fn every_parameter_is_read() {
        let options = parse(&[
            ("follow", "true"),
            ("previous", "false"),
            ("timestamps", "true"),
            ("tailLines", "5"),
            ("limitBytes", "9"),
            ("sinceSeconds", "60"),
            ("stream", "Stderr"),
        ]);
        let expected = Options {
            follow: true,
            previous: false,
            timestamps: true,
            since: Some("2026-01-01T00:00:00Z".parse().unwrap()),
            tail: Some(5),
            limit: Some(9),
            stream: Some(StreamKind::Stderr),
        };
        assert_eq!(options, Ok(expected));
    }

    #[test]
    fn nonsense_is_refused() {
        for (name, value) in [("tailLines", "-1"), ("limitBytes", "0"), ("sinceTime", "x"), ("stream", "Both")] {
            assert!(parse(&[(name, value)]).is_err(), "{name}={value}");
        }
    }
}
