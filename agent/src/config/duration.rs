//! Durations in configuration files.

use std::time::Duration;

pub use isopod_api::duration::{format_duration, parse_duration};

/// For fields that hold a duration in this format.
pub(super) mod go_duration {
    use serde::{Deserialize, Deserializer};

    use super::*;

    pub(in crate::config) fn serialize<S: serde::Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&format_duration(*d))
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(d)?;
        parse_duration(&text).ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a duration")))
    }
}
