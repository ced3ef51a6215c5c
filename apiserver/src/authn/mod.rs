//! Who is asking: client certificates, bearer tokens, anonymous, impersonation.

use std::collections::BTreeMap;

/// The identity of a request after authentication (and impersonation).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserInfo {
    /// User name, `system:anonymous` for nobody.
    pub name: String,
    /// UID, empty when the authenticator has none.
    pub uid: String,
    /// Groups, including `system:authenticated` or `system:unauthenticated`.
    pub groups: Vec<String>,
    /// Extra keys such as `authentication.kubernetes.io/pod-name`.
    pub extra: BTreeMap<String, Vec<String>>,
}

pub(crate) mod chain;
pub(crate) mod impersonate;
pub mod serviceaccount;

/// Group of everybody who proved an identity.
pub const ALL_AUTHENTICATED: &str = "system:authenticated";
/// Group of everybody else.
pub const ALL_UNAUTHENTICATED: &str = "system:unauthenticated";
/// User name of everybody else.
pub const ANONYMOUS: &str = "system:anonymous";

impl UserInfo {
    /// The API server itself.
    pub fn system() -> Self {
        Self {
            name: "system:apiserver".into(),
            groups: vec!["system:masters".into(), ALL_AUTHENTICATED.into()],
            ..Self::default()
        }
    }

    /// Nobody.
    pub fn anonymous() -> Self {
        Self { name: ANONYMOUS.into(), groups: vec![ALL_UNAUTHENTICATED.into()], ..Self::default() }
    }

    /// Whether the user is in a group.
    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}

/// An authenticated token: who, and for which of the asked audiences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenIdentity {
    /// Who, without `system:authenticated` (the chain adds it).
    pub user: UserInfo,
    /// Audiences of the token that were asked for.
    pub audiences: Vec<String>,
}

/// Checks bearer tokens; synchronous, from caches. A chain asks one after the other.
pub trait TokenAuthenticator: Send + Sync {
    /// `Ok(None)`: not a token of this kind, ask the next. `Err`: of this kind but invalid. `audiences` empty: the API
    /// server's own.
    fn authenticate(&self, token: &str, audiences: &[String]) -> Result<Option<TokenIdentity>, String>;
}
