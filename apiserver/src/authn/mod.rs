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
