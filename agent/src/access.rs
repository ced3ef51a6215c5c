//! Who may use the node's API: tokens and permissions, as the API server judges them.
//!
//! In: a bearer token, or an identity with what it wants. Out: TokenReviews and SubjectAccessReviews, their answers kept
//! for as long as the configuration says. Nothing that was granted outlives that, and no token is kept, only its digest.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::api::PostParams;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::{
    api::Api,
    config::{KubeletConfiguration, ReviewLife},
    server::Identity,
};

/// How long a token that is nobody's is remembered.
const REFUSED: Duration = Duration::from_secs(30);
/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Answers remembered at most.
const REMEMBERED: usize = 1024;

/// Answers by question, each good until its time.
struct Cache<K, V>(Mutex<HashMap<K, (Instant, V)>>);

impl<K: Hash + Eq, V: Clone> Cache<K, V> {
    fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    fn get(&self, key: &K) -> Option<V> {
        let known = self.0.lock();
        known.get(key).filter(|(until, _)| *until > Instant::now()).map(|(_, v)| v.clone())
    }

    fn put(&self, key: K, value: V, life: Duration) {
        let (mut known, now) = (self.0.lock(), Instant::now());
        if known.len() >= REMEMBERED {
            known.retain(|_, (until, _)| *until > now);
        }
        if known.len() < REMEMBERED {
            known.insert(key, (now + life, value));
        }
    }
}

/// A question about a permission.
type Wish = (Identity, String, String);

/// The API server's judgement.
pub(crate) struct Access {
    api: Api,
    node: String,
    tokens: Cache<[u8; 32], Option<Identity>>,
    permissions: Cache<Wish, bool>,
    token_life: Duration,
    review_life: ReviewLife,
    reviews_tokens: bool,
    everything: bool,
}

impl Access {
    /// As the configuration wants it.
    pub(crate) fn new(api: Api, node: &str, k: &KubeletConfiguration) -> Self {
        Self {
            api,
            node: node.into(),
            tokens: Cache::new(),
            permissions: Cache::new(),
            token_life: k.authentication.webhook.cache_ttl,
            review_life: k.authorization.webhook.clone(),
            reviews_tokens: k.authentication.webhook.enabled,
            everything: k.authorization.mode == "AlwaysAllow",
        }
    }

    /// Whose token this is; `None` when it is nobody's.
    pub(crate) async fn authenticate(&self, token: &str) -> Result<Option<Identity>, String> {
        if !self.reviews_tokens {
            return Ok(None);
        }
        let key: [u8; 32] = Sha256::digest(token).into();
        if let Some(known) = self.tokens.get(&key) {
            return Ok(known);
        }
        let client = self.api.get().ok_or("there is no API server to review the token")?;
        let reviews: kube::Api<TokenReview> = kube::Api::all(client);
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.into(), ..TokenReviewSpec::default() },
            ..TokenReview::default()
        };
        let parameters = PostParams::default();
        let answer = tokio::time::timeout(PATIENCE, reviews.create(&parameters, &review)).await;
        let answer =
            answer.map_err(|_| "the API server takes too long to review the token")?.map_err(|e| e.to_string())?;
        let status = answer.status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true));
        let identity =
            user.map(|u| Identity { user: u.username.unwrap_or_default(), groups: u.groups.unwrap_or_default() });
        let life = if identity.is_some() { self.token_life } else { REFUSED.min(self.token_life) };
        self.tokens.put(key, identity.clone(), life);
        Ok(identity)
    }

    /// Whether `who` may do `verb` on a subresource of this node.
    pub(crate) async fn allowed(&self, who: &Identity, verb: &str, subresource: &str) -> Result<bool, String> {
        // The node itself: whoever has its key is at home here.
        if self.everything || who.user == format!("system:node:{}", self.node) {
            return Ok(true);
        }
        let wish = (who.clone(), verb.to_string(), subresource.to_string());
        if let Some(known) = self.permissions.get(&wish) {
            return Ok(known);
        }
        let client = self.api.get().ok_or("there is no API server to ask for permission")?;
        let reviews: kube::Api<SubjectAccessReview> = kube::Api::all(client);
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(who.user.clone()),
                groups: Some(who.groups.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.into()),
                    version: Some("v1".into()),
                    resource: Some("nodes".into()),
                    subresource: Some(subresource.into()),
                    name: Some(self.node.clone()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let parameters = PostParams::default();
        let answer = tokio::time::timeout(PATIENCE, reviews.create(&parameters, &review)).await;
        let answer = answer.map_err(|_| "the API server takes too long to answer")?.map_err(|e| e.to_string())?;
        let allowed = answer.status.is_some_and(|s| s.allowed);
        let life = if allowed { self.review_life.authorized } else { self.review_life.unauthorized };
        self.permissions.put(wish, allowed, life);
        Ok(allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_forgotten_in_time() {
        let c: Cache<u8, bool> = Cache::new();
        c.put(1, true, Duration::from_secs(60));
        c.put(2, true, Duration::ZERO);
        assert_eq!((c.get(&1), c.get(&2), c.get(&3)), (Some(true), None, None));
    }
}
