//! Parts of the configuration about who may use the node API.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::duration::go_duration;

/// `authentication`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Authentication {
    /// Client certificates.
    pub x509: X509Authentication,
    /// Token reviews.
    pub webhook: Webhook,
    /// Callers without credentials.
    pub anonymous: Anonymous,
}

/// `authentication.x509`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct X509Authentication {
    /// CA bundle.
    #[serde(rename = "clientCAFile")]
    pub client_ca_file: Option<PathBuf>,
}

/// `authentication.webhook`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Webhook {
    /// Ask the API server to review bearer tokens.
    pub enabled: bool,
    /// How long an answer is kept.
    #[serde(rename = "cacheTTL", with = "go_duration")]
    pub cache_ttl: Duration,
}

impl Default for Webhook {
    fn default() -> Self {
        Self { enabled: true, cache_ttl: Duration::from_secs(120) }
    }
}

/// `authentication.anonymous`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Anonymous {
    /// Let them in as `system:anonymous`.
    pub enabled: bool,
}

/// `authorization`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Authorization {
    /// `Webhook` or `AlwaysAllow`.
    pub mode: String,
    /// Access reviews.
    pub webhook: ReviewLife,
}

impl Default for Authorization {
    fn default() -> Self {
        Self { mode: "Webhook".into(), webhook: ReviewLife::default() }
    }
}

/// `authorization.webhook`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ReviewLife {
    /// How long a permission is kept.
    #[serde(rename = "cacheAuthorizedTTL", with = "go_duration")]
    pub authorized: Duration,
    /// How long a refusal is kept.
    #[serde(rename = "cacheUnauthorizedTTL", with = "go_duration")]
    pub unauthorized: Duration,
}

impl Default for ReviewLife {
    fn default() -> Self {
        Self { authorized: Duration::from_secs(300), unauthorized: Duration::from_secs(30) }
    }
}

impl ReviewLife {
    /// No time at all means the default.
    pub(super) fn fill(&mut self) {
        let default = Self::default();
        if self.authorized.is_zero() {
            self.authorized = default.authorized;
        }
        if self.unauthorized.is_zero() {
            self.unauthorized = default.unauthorized;
        }
    }
}
