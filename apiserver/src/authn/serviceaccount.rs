//! Service account tokens.

use std::sync::Arc;

use serde_json::{Value, json};

use super::TokenAuthenticator;
use crate::{Config, Error, objects::Objects};

/// The authenticator of service account tokens.
pub fn authenticator(
    _config: &Config,
    _objects: Arc<dyn Objects>,
) -> Result<Option<Arc<dyn TokenAuthenticator>>, Error> {
    Ok(None)
}

/// Body of `/.well-known/openid-configuration`.
pub fn openid_configuration(_config: &Config) -> Value {
    json!({})
}

/// Body of `/openid/v1/jwks`.
pub fn jwks(_config: &Config) -> Value {
    json!({"keys": []})
}
