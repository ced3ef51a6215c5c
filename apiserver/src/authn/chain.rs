//! The authenticators of the server in upstream's order: client certificate, bearer token, anonymous.

use std::{collections::HashMap, path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, header};
use isopod_api::status::Status;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{ALL_AUTHENTICATED, TokenAuthenticator, TokenIdentity, UserInfo};
use crate::Error;

/// Subprotocol browsers and some clients put their token into.
const BEARER_PROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";

/// Tokens from a CSV file: `token,user,uid,"group1,group2"`.
/// They are for this server alone, so for its own audience.
pub(crate) struct StaticTokens {
    users: HashMap<String, UserInfo>,
    audience: String,
}

impl StaticTokens {
    /// Reads the file; `audience` is the server's own.
    pub(crate) fn read(path: &Path, audience: &str) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let mut tokens = HashMap::new();
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let columns = split_csv(line);
            if columns.len() < 3 || columns[0].is_empty() {
                let reason = format!("line {}: expected token,user,uid[,\"group1,group2\"]", number + 1);
                return Err(Error::Content { path: path.to_owned(), reason });
            }
            let groups = columns.get(3).map(String::as_str).unwrap_or_default();
            let groups = groups.split(',').map(str::trim).filter(|g| !g.is_empty()).map(str::to_owned).collect();
            let user = UserInfo { name: columns[1].clone(), uid: columns[2].clone(), groups, ..UserInfo::default() };
            tokens.insert(columns[0].clone(), user);
        }
        Ok(Self { users: tokens, audience: audience.to_owned() })
    }
}

fn split_csv(line: &str) -> Vec<String> {
    let mut columns = vec![String::new()];
    let mut quoted = false;
    for c in line.trim().chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => columns.push(String::new()),
            c => {
                if let Some(last) = columns.last_mut() {
                    last.push(c);
                }
            }
        }
    }
    columns.iter().map(|c| c.trim().to_owned()).collect()
}

impl TokenAuthenticator for StaticTokens {
    fn authenticate(&self, token: &str, audiences: &[String]) -> Result<Option<TokenIdentity>, String> {
        let own: Vec<String> = audiences.iter().filter(|audience| **audience == self.audience).cloned().collect();
        if own.is_empty() && !audiences.is_empty() {
            return Ok(None);
        }
        Ok(self.users.get(token).map(|user| TokenIdentity { user: user.clone(), audiences: own }))
    }
}

/// Several token authenticators as one.
#[derive(Default)]
pub(crate) struct TokenChain(pub(crate) Vec<Arc<dyn TokenAuthenticator>>);

impl TokenAuthenticator for TokenChain {
    fn authenticate(&self, token: &str, audiences: &[String]) -> Result<Option<TokenIdentity>, String> {
        let mut errors = Vec::new();
        for authenticator in &self.0 {
            match authenticator.authenticate(token, audiences) {
                Ok(None) => {}
                Ok(Some(identity)) => return Ok(Some(identity)),
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() { Ok(None) } else { Err(errors.join(", ")) }
    }
}

/// The user a verified client certificate stands for.
pub(crate) fn certificate_user(der: &[u8]) -> Option<UserInfo> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|o| o.as_str().ok()).map(str::to_owned).collect();
    let hash: String = Sha256::digest(der).iter().map(|b| format!("{b:02x}")).collect();
    let credential = ("authentication.kubernetes.io/credential-id".to_owned(), vec![format!("X509SHA256={hash}")]);
    Some(UserInfo { name, groups, extra: [credential].into(), ..UserInfo::default() })
}

/// Who sends a request.
pub(crate) fn authenticate(
    tokens: &dyn TokenAuthenticator,
    certificate: Option<&UserInfo>,
    headers: &HeaderMap,
) -> Result<UserInfo, Status> {
    if let Some(user) = certificate {
        return Ok(authenticated(user.clone()));
    }
    let Some(token) = bearer(headers) else { return Ok(UserInfo::anonymous()) };
    match tokens.authenticate(&token, &[]) {
        Ok(Some(identity)) => Ok(authenticated(identity.user)),
        Ok(None) => Err(Status::unauthorized("")),
        Err(error) => {
            tracing::debug!(%error, "token refused");
            Err(Status::unauthorized(""))
        }
    }
}

fn authenticated(mut user: UserInfo) -> UserInfo {
    if !user.in_group(ALL_AUTHENTICATED) {
        user.groups.push(ALL_AUTHENTICATED.into());
    }
    user
}

fn bearer(headers: &HeaderMap) -> Option<String> {
    if let Some(value) = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()) {
        let (scheme, token) = value.trim().split_once(' ')?;
        return scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned()).filter(|t| !t.is_empty());
    }
    let protocols = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL);
    let encoded = protocols
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .find_map(|p| p.trim().strip_prefix(BEARER_PROTOCOL))?;
    String::from_utf8(URL_SAFE_NO_PAD.decode(encoded.trim_end_matches('=')).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        std::fs::write(&path, "t1,admin,1,\"system:masters,dev\"\n\nt2,bob,2\n").unwrap();
        let tokens = StaticTokens::read(&path, "https://issuer").unwrap();
        let user = tokens.authenticate("t1", &[]).unwrap().unwrap().user;
        assert_eq!((user.name.as_str(), user.groups), ("admin", vec!["system:masters".into(), "dev".into()]));
        assert!(tokens.authenticate("t3", &[]).unwrap().is_none());
        let audiences = ["other".to_owned(), "https://issuer".to_owned()];
        assert!(tokens.authenticate("t1", &audiences[..1]).unwrap().is_none(), "for somebody else");
        assert_eq!(tokens.authenticate("t1", &audiences).unwrap().unwrap().audiences, audiences[1..]);
        std::fs::write(&path, "oops\n").unwrap();
        assert!(StaticTokens::read(&path, "https://issuer").is_err());
    }

    #[test]
    fn requests() {
        let mut headers = HeaderMap::new();
        let nobody = TokenChain::default();
        assert_eq!(authenticate(&nobody, None, &headers).unwrap(), UserInfo::anonymous());
        headers.insert(header::AUTHORIZATION, "Bearer nope".parse().unwrap());
        assert_eq!(authenticate(&nobody, None, &headers).unwrap_err().code, 401);
        let certificate = UserInfo { name: "n".into(), ..UserInfo::default() };
        let user = authenticate(&nobody, Some(&certificate), &headers).unwrap();
        assert_eq!(user.groups, [ALL_AUTHENTICATED]);
    }
}
