//! Container logs: the query of /containerLogs and its answer as a stream of bytes.

pub(crate) mod cri;
pub(crate) mod reader;

use isopod_api::pod_log::PodLogOptions;
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

/// Why a query is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadOptions {
    /// A parameter does not parse.
    #[error("{0}")]
    Unreadable(String),
    /// What they say makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl Options {
    /// Reads the query's parameters, decoded.
    pub(crate) fn parse(query: &[(String, String)], now: Timestamp) -> Result<Self, BadOptions> {
        let get = |name: &str| query.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let said = PodLogOptions::parse(|name| match name {
            // An old name, with a word of its own for no limit.
            "tailLines" => get("tail").filter(|n| !n.is_empty()).map_or(get(name), |n| Some(n).filter(|n| *n != "all")),
            _ => get(name),
        })
        .map_err(BadOptions::Unreadable)?;
        let errors = said.validate();
        if !errors.is_empty() {
            let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
            return Err(BadOptions::Invalid(told.join(", ")));
        }
        let flag = |name: &str| get(name).is_some_and(truth);
        let age = said.since_seconds.map(SignedDuration::from_secs);
        let amount = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok());
        Ok(Self {
            follow: flag("follow"),
            previous: flag("previous"),
            timestamps: flag("timestamps"),
            since: said.since_time.or_else(|| now.checked_sub(age?).ok()),
            tail: amount(said.tail_lines),
            limit: amount(said.limit_bytes),
            stream: match said.stream.as_deref() {
                Some("Stdout") => Some(StreamKind::Stdout),
                Some("Stderr") => Some(StreamKind::Stderr),
                _ => None,
            },
        })
    }
}

/// Booleans as the API server writes them in queries.
pub(crate) fn truth(value: &str) -> bool {
    matches!(value, "true" | "1" | "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Options, BadOptions> {
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
            ("stream", "All"),
        ]);
        let expected = Options {
            follow: true,
            previous: false,
            timestamps: true,
            since: Some("2026-01-01T00:00:00Z".parse().unwrap()),
            tail: Some(5),
            limit: Some(9),
            stream: None,
        };
        assert_eq!(options, Ok(expected));
        assert_eq!(parse(&[("stream", "Stderr")]).unwrap().stream, Some(StreamKind::Stderr));
        assert_eq!(parse(&[("tail", "3")]).unwrap().tail, Some(3));
        assert_eq!(parse(&[("tail", "all"), ("tailLines", "3")]).unwrap().tail, None);
    }

    #[test]
    fn nonsense_is_refused() {
        for (name, value) in [("tailLines", "-1"), ("limitBytes", "0"), ("stream", "Both")] {
            assert!(matches!(parse(&[(name, value)]), Err(BadOptions::Invalid(_))), "{name}={value}");
        }
        assert!(matches!(parse(&[("sinceTime", "x")]), Err(BadOptions::Unreadable(_))));
    }
}
