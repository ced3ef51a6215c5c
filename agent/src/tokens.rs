//! Service account tokens for pods, by TokenRequest.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        core::v1::{Pod, ServiceAccount},
    },
    jiff::Timestamp,
};

use crate::api::Api;

/// A token and when to get the next one.
#[derive(Clone)]
pub(crate) struct Token {
    pub(crate) text: String,
    pub(crate) refresh: Instant,
    pub(crate) expires: Timestamp,
}

/// What a projected volume asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Wish {
    pub(crate) audience: Option<String>,
    pub(crate) seconds: i64,
}

/// Asks for a token bound to `pod`.
pub(crate) async fn request(api: &Api, pod: &Pod, wish: &Wish) -> Result<Token, String> {
    let client = api.wait().await.ok_or("there is no API server")?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let account = pod.spec.as_ref().and_then(|s| s.service_account_name.clone()).filter(|a| !a.is_empty());
    let account = account.unwrap_or_else(|| "default".into());
    let accounts: kube::Api<ServiceAccount> = kube::Api::namespaced(client, namespace);
    let body = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: wish.audience.clone().map(|a| vec![a]),
            expiration_seconds: Some(wish.seconds),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
            }),
        }),
        ..TokenRequest::default()
    };
    let asked = Instant::now();
    let answer = accounts
        .create_token_request(&account, &kube::api::PostParams::default(), &body)
        .await
        .map_err(|e| format!("failed to fetch token: {e}"))?;
    let status = answer.status.ok_or("failed to fetch token: the answer has no status")?;
    let now = Timestamp::now();
    let expires = status.expiration_timestamp.map(|t| t.0);
    let expires = expires.or_else(|| Timestamp::from_second(now.as_second() + wish.seconds).ok()).unwrap_or(now);
    let life = (expires.as_second() - now.as_second()).max(0) as u64;
    // Upstream: at 80 % of its life, or after a day.
    let refresh = Duration::from_secs((life * 8 / 10).clamp(10, 24 * 3600));
    Ok(Token { text: status.token.unwrap_or_default(), refresh: asked + refresh, expires })
}
