//! Service account tokens: issued, checked, and described to others by OpenID discovery.
//!
//! A token is a JWT signed with the cluster's key. It names its service account and whatever it is bound to (a pod with its
//! node, a secret, a node); it is good as long as all of those still exist with the same UIDs. The signature of a token
//! that has been seen is not computed again; everything else is looked at every time.

use std::{collections::HashMap, fs, path::Path, sync::Arc};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use isopod_api::{gvk::Gvr, meta};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use x509_parser::{prelude::FromDer, public_key::PublicKey, x509::SubjectPublicKeyInfo};

use super::{TokenAuthenticator, TokenIdentity, UserInfo};
use crate::{Config, Error, objects::Objects};

/// Issuer of the tokens kept in secrets of type `kubernetes.io/service-account-token`.
const LEGACY_ISSUER: &str = "kubernetes/serviceaccount";
/// Tokens whose signature is remembered.
const REMEMBERED: usize = 1024;
/// How long a token outlives the deletion mark of what it is bound to.
const DELETION_LEEWAY: i64 = 60;

/// An object a token names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

/// The `kubernetes.io` claim.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kubernetes {
    /// Namespace of the service account.
    pub namespace: String,
    /// Node of the pod, or the node the token is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Reference>,
    /// Pod the token is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Reference>,
    /// Secret the token is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Reference>,
    /// The service account.
    pub serviceaccount: Reference,
    /// When the client should have fetched a new token, where the real end is later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warnafter: Option<i64>,
}

/// All claims of a token we issue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Audiences.
    pub aud: Vec<String>,
    /// End, Unix seconds.
    pub exp: i64,
    /// Issue time.
    pub iat: i64,
    /// Issuer.
    pub iss: String,
    /// Unique id.
    pub jti: String,
    /// What it is for.
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: Kubernetes,
    /// Not before.
    pub nbf: i64,
    /// `system:serviceaccount:NS:NAME`.
    pub sub: String,
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })
}

fn content(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Content { path: path.to_path_buf(), reason: reason.to_string() }
}

/// The DER of the first PEM block of a file.
fn pem(path: &Path, text: &[u8]) -> Result<Vec<u8>, Error> {
    let (_, block) = x509_parser::pem::parse_x509_pem(text).map_err(|error| content(path, error))?;
    Ok(block.contents)
}

/// The public half: checks tokens, and is published.
pub struct PublicSide {
    key: DecodingKey,
    algorithm: Algorithm,
    kid: String,
    jwk: Value,
}

impl PublicSide {
    /// Reads the public key.
    pub fn load(config: &Config) -> Result<Self, Error> {
        let path = &config.sa_pub;
        let text = read(path)?;
        let der = pem(path, &text)?;
        let (_, info) = SubjectPublicKeyInfo::from_der(&der).map_err(|error| content(path, error))?;
        let kid = BASE64.encode(Sha256::digest(&der));
        let (algorithm, key, mut jwk) = match info.parsed().map_err(|error| content(path, error))? {
            PublicKey::RSA(rsa) => {
                let strip = |number: &[u8]| BASE64.encode(number.strip_prefix(&[0]).unwrap_or(number));
                let jwk = json!({"kty": "RSA", "alg": "RS256", "n": strip(rsa.modulus), "e": strip(rsa.exponent)});
                (Algorithm::RS256, DecodingKey::from_rsa_pem(&text), jwk)
            }
            PublicKey::EC(point) => {
                let data = point.data().strip_prefix(&[4]).ok_or_else(|| content(path, "compressed EC point"))?;
                let (x, y) = data.split_at(data.len() / 2);
                let (algorithm, name, curve) = match x.len() {
                    32 => (Algorithm::ES256, "ES256", "P-256"),
                    48 => (Algorithm::ES384, "ES384", "P-384"),
                    _ => return Err(content(path, "unsupported curve")),
                };
                let jwk = json!({"kty": "EC", "alg": name, "crv": curve, "x": BASE64.encode(x), "y": BASE64.encode(y)});
                (algorithm, DecodingKey::from_ec_pem(&text), jwk)
            }
            _ => return Err(content(path, "neither an RSA nor an EC key")),
        };
        jwk["use"] = "sig".into();
        jwk["kid"] = kid.clone().into();
        Ok(Self { key: key.map_err(|error| content(path, error))?, algorithm, kid, jwk })
    }
}

/// Issues tokens.
pub struct Issuer {
    key: EncodingKey,
    header: Header,
    issuer: String,
}

impl Issuer {
    /// Reads the signing key.
    pub fn load(config: &Config) -> Result<Self, Error> {
        let public = PublicSide::load(config)?;
        let path = &config.sa_key;
        let text = read(path)?;
        let key = match public.algorithm {
            Algorithm::RS256 => EncodingKey::from_rsa_pem(&text),
            _ => EncodingKey::from_ec_pem(&text),
        };
        let mut header = Header::new(public.algorithm);
        // Tokens of this kind carry no `typ`.
        header.typ = None;
        header.kid = Some(public.kid);
        Ok(Self { key: key.map_err(|error| content(path, error))?, header, issuer: config.issuer.clone() })
    }

    /// The issuer's name, which is also the API server's audience.
    pub fn name(&self) -> &str {
        &self.issuer
    }

    /// Signs a token for `seconds` from now; what is not given here is filled in.
    pub fn issue(&self, kubernetes: Kubernetes, audiences: Vec<String>, seconds: i64) -> Result<String, String> {
        let now = jiff::Timestamp::now().as_second();
        let claims = Claims {
            aud: audiences,
            exp: now + seconds,
            iat: now,
            iss: self.issuer.clone(),
            jti: uuid::Uuid::new_v4().to_string(),
            sub: format!("system:serviceaccount:{}:{}", kubernetes.namespace, kubernetes.serviceaccount.name),
            nbf: now,
            kubernetes,
        };
        jsonwebtoken::encode(&self.header, &claims, &self.key).map_err(|error| error.to_string())
    }
}

/// Checks tokens.
struct Authenticator {
    public: PublicSide,
    issuer: String,
    objects: Arc<dyn Objects>,
    /// Claims by the digest of the token; emptied when full.
    verified: parking_lot::Mutex<HashMap<[u8; 32], Arc<Value>>>,
}

/// The issuer a token claims, without believing it.
fn claimed_issuer(token: &str) -> Option<String> {
    let payload = token.split('.').nth(1)?;
    let claims: Value = serde_json::from_slice(&BASE64.decode(payload).ok()?).ok()?;
    claims["iss"].as_str().map(str::to_owned)
}

impl Authenticator {
    fn verified(&self, token: &str) -> Result<Arc<Value>, String> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        if let Some(claims) = self.verified.lock().get(&digest) {
            return Ok(claims.clone());
        }
        let mut validation = Validation::new(self.public.algorithm);
        validation.validate_aud = false;
        validation.validate_exp = false;
        validation.required_spec_claims.clear();
        let data = jsonwebtoken::decode::<Value>(token, &self.public.key, &validation);
        let claims = Arc::new(data.map_err(|error| error.to_string())?.claims);
        let mut verified = self.verified.lock();
        if verified.len() >= REMEMBERED {
            verified.clear();
        }
        verified.insert(digest, claims.clone());
        Ok(claims)
    }

    /// An object a token is bound to has to be there, with the same UID, and not be on its way out for long.
    fn bound(&self, resource: &str, namespace: &str, reference: &Reference) -> Result<Value, String> {
        let object = self.objects.get(&Gvr::new("", "v1", resource), namespace, &reference.name);
        let value =
            object.map(|object| object.value()).ok_or_else(|| format!("{resource} {:?} not found", reference.name))?;
        if meta::uid(&value) != reference.uid {
            return Err(format!("{resource} {:?} UID does not match the claim", reference.name));
        }
        let deleted = meta::deletion_timestamp(&value).and_then(meta::parse_time);
        if deleted.is_some_and(|time| time.as_second() + DELETION_LEEWAY < jiff::Timestamp::now().as_second()) {
            return Err(format!("{resource} {:?} has been deleted", reference.name));
        }
        Ok(value)
    }

    fn check(&self, claims: &Claims, audiences: &[String]) -> Result<TokenIdentity, String> {
        let now = jiff::Timestamp::now().as_second();
        if now > claims.exp {
            return Err("service account token has expired".to_owned());
        }
        if now + 10 < claims.nbf {
            return Err("service account token is not valid yet".to_owned());
        }
        let own = [self.issuer.clone()];
        let wanted = if audiences.is_empty() { &own[..] } else { audiences };
        let common: Vec<String> = wanted.iter().filter(|aud| claims.aud.contains(aud)).cloned().collect();
        if common.is_empty() {
            return Err(format!("token audiences {:?} is invalid for the target audiences {wanted:?}", claims.aud));
        }
        let k = &claims.kubernetes;
        self.bound("serviceaccounts", &k.namespace, &k.serviceaccount)?;
        let mut extra = std::collections::BTreeMap::new();
        let mut note = |key: &str, value: String| {
            extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value]);
        };
        note("credential-id", format!("JTI={}", claims.jti));
        if let Some(secret) = &k.secret {
            self.bound("secrets", &k.namespace, secret)?;
        }
        if let Some(node) = &k.node {
            note("node-name", node.name.clone());
            note("node-uid", node.uid.clone());
        }
        if let Some(pod) = &k.pod {
            self.bound("pods", &k.namespace, pod)?;
            note("pod-name", pod.name.clone());
            note("pod-uid", pod.uid.clone());
        } else if let Some(node) = &k.node {
            self.bound("nodes", "", node)?;
        }
        let mut user = account(&k.namespace, &k.serviceaccount);
        user.extra = extra;
        Ok(TokenIdentity { user, audiences: common })
    }

    /// A token kept in a secret: flat claims, no end, good while the secret holds it.
    fn check_legacy(&self, claims: &Value, token: &str, audiences: &[String]) -> Result<TokenIdentity, String> {
        let text =
            |key: &str| claims[format!("kubernetes.io/serviceaccount/{key}")].as_str().unwrap_or_default().to_owned();
        let namespace = text("namespace");
        let reference = Reference { name: text("service-account.name"), uid: text("service-account.uid") };
        let own = [self.issuer.clone()];
        if !audiences.is_empty() && !audiences.contains(&own[0]) {
            return Err("legacy tokens are good for the API server only".to_owned());
        }
        self.bound("serviceaccounts", &namespace, &reference)?;
        let secret = self.objects.get(&Gvr::new("", "v1", "secrets"), &namespace, &text("secret.name"));
        let secret = secret.map(|secret| secret.value()).ok_or("the token's secret is gone")?;
        let stored = secret["data"]["token"].as_str().unwrap_or_default();
        let stored = base64::engine::general_purpose::STANDARD.decode(stored).unwrap_or_default();
        if stored != token.as_bytes() {
            return Err("the token's secret holds another token".to_owned());
        }
        Ok(TokenIdentity { user: account(&namespace, &reference), audiences: own.to_vec() })
    }
}

/// The user a service account is.
fn account(namespace: &str, reference: &Reference) -> UserInfo {
    UserInfo {
        name: format!("system:serviceaccount:{namespace}:{}", reference.name),
        uid: reference.uid.clone(),
        groups: vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")],
        ..UserInfo::default()
    }
}

impl TokenAuthenticator for Authenticator {
    fn authenticate(&self, token: &str, audiences: &[String]) -> Result<Option<TokenIdentity>, String> {
        let issuer = match claimed_issuer(token) {
            Some(issuer) if issuer == self.issuer || issuer == LEGACY_ISSUER => issuer,
            _ => return Ok(None),
        };
        let claims = self.verified(token)?;
        if issuer == LEGACY_ISSUER {
            return self.check_legacy(&claims, token, audiences).map(Some);
        }
        let claims = Claims::deserialize(&*claims).map_err(|error| error.to_string())?;
        self.check(&claims, audiences).map(Some)
    }
}

/// The authenticator of service account tokens.
pub fn authenticator(config: &Config, objects: Arc<dyn Objects>) -> Result<Option<Arc<dyn TokenAuthenticator>>, Error> {
    let authenticator = Authenticator {
        public: PublicSide::load(config)?,
        issuer: config.issuer.clone(),
        objects,
        verified: parking_lot::Mutex::default(),
    };
    Ok(Some(Arc::new(authenticator)))
}

/// Body of `/.well-known/openid-configuration`.
pub fn openid_configuration(config: &Config) -> Value {
    let algorithm = PublicSide::load(config).map_or_else(|_| "RS256".into(), |public| public.jwk["alg"].clone());
    let address = SocketAddress(config);
    json!({
        "issuer": config.issuer,
        "jwks_uri": format!("https://{address}/openid/v1/jwks"),
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": [algorithm],
    })
}

/// Where the API server is found.
struct SocketAddress<'a>(&'a Config);

impl std::fmt::Display for SocketAddress<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::net::SocketAddr::new(self.0.advertise, self.0.bind.port()).fmt(f)
    }
}

/// Body of `/openid/v1/jwks`.
pub fn jwks(config: &Config) -> Value {
    match PublicSide::load(config) {
        Ok(public) => json!({ "keys": [public.jwk] }),
        Err(error) => {
            tracing::warn!(%error, "service account public key");
            json!({ "keys": [] })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::admission::testing::FakeObjects;

    /// A key pair made for these tests.
    const KEY: &str = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgPfVPYrR+DqZvUCbq\n69gEa3g69OAM4j1czmzxeZJgw6qhRANCAAQs0OXgSmPf27x/w7DlJehKh/nF9fWW\nvdm29axAWH9P+OCmEkNVkAzz3a+eKWEdIlGBFw5Of03Bv1USErDZj1xj\n-----END PRIVATE KEY-----\n";
    const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAELNDl4Epj39u8f8Ow5SXoSof5xfX1\nlr3ZtvWsQFh/T/jgphJDVZAM892vnilhHSJRgRcOTn9Nwb9VEhKw2Y9cYw==\n-----END PUBLIC KEY-----\n";

    fn config(dir: &std::path::Path) -> Config {
        let file = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let none = PathBuf::new();
        Config {
            bind: "127.0.0.1:6443".parse().unwrap(),
            advertise: "127.0.0.1".parse().unwrap(),
            tls_cert: none.clone(),
            tls_key: none.clone(),
            client_ca: none.clone(),
            sa_key: file("sa.key", KEY),
            sa_pub: file("sa.pub", PUBLIC),
            issuer: "https://issuer".into(),
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            node_ports: (30000, 32767),
            store: crate::Store::Embedded(none.clone()),
            kubelet_ca: none.clone(),
            kubelet_client_cert: none.clone(),
            kubelet_client_key: none,
            requestheader_ca: None,
            proxy_client: None,
            token_file: None,
        }
    }

    fn object(kind: &str, name: &str, uid: &str) -> Value {
        json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "ns", "uid": uid}})
    }

    struct Fixture {
        _dir: tempfile::TempDir,
        objects: Arc<FakeObjects>,
        issuer: Issuer,
        authenticator: Arc<dyn TokenAuthenticator>,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let objects = Arc::new(FakeObjects::new([object("ServiceAccount", "sa", "u1"), object("Pod", "p", "u2")]));
        let issuer = Issuer::load(&config).unwrap();
        let authenticator = authenticator(&config, objects.clone()).unwrap().unwrap();
        Fixture { _dir: dir, objects, issuer, authenticator }
    }

    fn claim(pod: Option<&str>) -> Kubernetes {
        Kubernetes {
            namespace: "ns".into(),
            serviceaccount: Reference { name: "sa".into(), uid: "u1".into() },
            pod: pod.map(|uid| Reference { name: "p".into(), uid: uid.into() }),
            ..Kubernetes::default()
        }
    }

    fn own() -> Vec<String> {
        vec!["https://issuer".into()]
    }

    #[test]
    fn issued_tokens_are_accepted_as_their_account() {
        let f = fixture();
        let token = f.issuer.issue(claim(Some("u2")), own(), 600).unwrap();
        let identity = f.authenticator.authenticate(&token, &[]).unwrap().unwrap();
        assert_eq!(identity.user.name, "system:serviceaccount:ns:sa");
        assert_eq!(identity.user.uid, "u1");
        assert_eq!(identity.user.groups, ["system:serviceaccounts", "system:serviceaccounts:ns"]);
        assert_eq!(identity.user.extra["authentication.kubernetes.io/pod-name"], ["p"]);
        assert_eq!(identity.audiences, own());
    }

    #[test]
    fn bad_tokens_are_refused_for_their_reason() {
        let f = fixture();
        let refused = |token: &str, audiences: &[String]| f.authenticator.authenticate(token, audiences).unwrap_err();
        let expired = f.issuer.issue(claim(None), own(), -1).unwrap();
        assert!(refused(&expired, &[]).contains("expired"));
        let other = f.issuer.issue(claim(None), vec!["vault".into()], 600).unwrap();
        assert!(refused(&other, &[]).contains("audiences"));
        assert!(f.authenticator.authenticate(&other, &["vault".into()]).unwrap().is_some());
        let stale = f.issuer.issue(claim(Some("before")), own(), 600).unwrap();
        assert!(refused(&stale, &[]).contains("UID"));
        let good = f.issuer.issue(claim(None), own(), 600).unwrap();
        let mut forged = good.clone();
        forged.truncate(good.len() - 6);
        forged.push_str("AAAAAA");
        assert!(f.authenticator.authenticate(&forged, &[]).is_err());
        assert_eq!(f.authenticator.authenticate("bogus", &[]), Ok(None), "not ours: the next one is asked");
        assert!(f.authenticator.authenticate(&good, &[]).unwrap().is_some());
        f.objects.put(&Gvr::new("", "v1", "serviceaccounts"), object("ServiceAccount", "sa", "new"));
        assert!(refused(&good, &[]).contains("UID"), "also for a token that was good before");
    }

    #[test]
    fn discovery_names_the_key_tokens_are_signed_with() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let token = Issuer::load(&config).unwrap().issue(claim(None), own(), 600).unwrap();
        let header = jsonwebtoken::decode_header(&token).unwrap();
        let jwks = jwks(&config);
        assert_eq!(jwks["keys"][0]["kid"], header.kid.unwrap());
        assert_eq!(openid_configuration(&config)["issuer"], "https://issuer");
        let jwk = serde_json::from_value(jwks["keys"][0].clone()).unwrap();
        let key = DecodingKey::from_jwk(&jwk).unwrap();
        let mut validation = Validation::new(header.alg);
        validation.set_audience(&["https://issuer"]);
        assert!(jsonwebtoken::decode::<Claims>(&token, &key, &validation).is_ok());
    }
}
