//! The cluster's certificates and keys, under kubeadm's file names.
//!
//! [`ensure`] makes what is missing and keeps what is there; a serving certificate whose names no longer cover this
//! machine is made anew. Files are written whole (rename), keys readable by root only.

use std::{
    fs,
    io::Write,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_RSA_SHA256, RsaKeySize, SanType,
};
use time::{Duration, OffsetDateTime};

/// How long leaf certificates live; the CA lives ten times as long.
const LIFETIME: Duration = Duration::days(365);

/// A certificate with its key, both PEM.
pub(crate) struct Signed {
    pub(crate) cert: String,
    pub(crate) key: String,
}

/// A certificate authority that can sign.
pub(crate) struct Authority {
    pub(crate) cert: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate is for.
pub(crate) enum Purpose {
    /// Presented by a client.
    Client,
    /// Presented by a server under these names and addresses.
    Server { names: Vec<String>, addresses: Vec<IpAddr> },
}

/// The authorities of a cluster, ready to sign.
pub(crate) struct Pki {
    pub(crate) ca: Authority,
    dir: PathBuf,
}

/// Makes everything a control plane needs in `dir`; `names` and `addresses` are what the API server is reached by.
pub(crate) fn ensure(dir: &Path, names: &[String], addresses: &[IpAddr]) -> Result<Pki> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let ca = authority(dir, "ca", "kubernetes")?;
    let front_proxy = authority(dir, "front-proxy-ca", "front-proxy-ca")?;
    let pki = Pki { ca, dir: dir.to_owned() };
    pki.leaf("apiserver", "kube-apiserver", &[], server(names, addresses))?;
    pki.leaf(
        "apiserver-kubelet-client",
        "kube-apiserver-kubelet-client",
        &["kubeadm:cluster-admins"],
        Purpose::Client,
    )?;
    let client = dir.join("front-proxy-client.crt");
    if !client.exists() || !dir.join("front-proxy-client.key").exists() {
        save(dir, "front-proxy-client", &front_proxy.sign("front-proxy-client", &[], &Purpose::Client)?)?;
    }
    service_account_keys(dir)?;
    Ok(pki)
}

/// What a node alone needs in `dir`: an authority of its own, a serving certificate, and an administrator.
pub(crate) fn alone(dir: &Path, node: &str, addresses: &[IpAddr]) -> Result<(Pki, Signed)> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let pki = Pki { ca: authority(dir, "ca", "isopod-node")?, dir: dir.to_owned() };
    let names = [node.to_owned(), "localhost".to_owned()];
    pki.leaf("kubelet", &format!("system:node:{node}"), &["system:nodes"], server(&names, addresses))?;
    let admin = pki.ca.sign("node-admin", &["system:masters"], &Purpose::Client)?;
    Ok((pki, admin))
}

fn server(names: &[String], addresses: &[IpAddr]) -> Purpose {
    Purpose::Server { names: names.to_vec(), addresses: addresses.to_vec() }
}

impl Pki {
    /// Makes `FILE.crt` and `FILE.key` unless they are there and still fit.
    pub(crate) fn leaf(&self, file: &str, user: &str, groups: &[&str], purpose: Purpose) -> Result<()> {
        let (cert, key) = (self.dir.join(format!("{file}.crt")), self.dir.join(format!("{file}.key")));
        if key.exists() && fits(&cert, &purpose) {
            return Ok(());
        }
        save(&self.dir, file, &self.ca.sign(user, groups, &purpose)?)
    }
}

impl Authority {
    /// Signs a new key for `user` in `groups`.
    pub(crate) fn sign(&self, user: &str, groups: &[&str], purpose: &Purpose) -> Result<Signed> {
        let mut params = params(user, groups, LIFETIME);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        match purpose {
            Purpose::Client => params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth],
            Purpose::Server { names, addresses } => {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
                for name in names {
                    let name = name.clone().try_into().with_context(|| format!("certificate name \"{name}\""))?;
                    params.subject_alt_names.push(SanType::DnsName(name));
                }
                params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
            }
        }
        let key = KeyPair::generate().context("generate key")?;
        let cert = params.signed_by(&key, &self.issuer).with_context(|| format!("sign certificate for {user}"))?;
        Ok(Signed { cert: cert.pem(), key: key.serialize_pem() })
    }
}

fn params(common_name: &str, organizations: &[&str], lifetime: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    for organization in organizations {
        params.distinguished_name.push(DnType::OrganizationName, *organization);
    }
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = OffsetDateTime::now_utc();
    // Clocks of joining machines may be a little behind.
    params.not_before = now - Duration::minutes(5);
    params.not_after = now + lifetime;
    params
}

fn authority(dir: &Path, file: &str, common_name: &str) -> Result<Authority> {
    let (cert_path, key_path) = (dir.join(format!("{file}.crt")), dir.join(format!("{file}.key")));
    if !cert_path.exists() && !key_path.exists() {
        let mut params = params(common_name, &[], LIFETIME * 10);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().context("generate key")?;
        let cert = params.self_signed(&key).with_context(|| format!("sign {}", cert_path.display()))?;
        save(dir, file, &Signed { cert: cert.pem(), key: key.serialize_pem() })?;
    }
    load_authority(&cert_path, &key_path)
}

/// Reads an authority from its files.
pub(crate) fn load_authority(cert_path: &Path, key_path: &Path) -> Result<Authority> {
    let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
    let (cert, key) = (read(cert_path)?, read(key_path)?);
    let key = KeyPair::from_pem(&key).with_context(|| format!("{}: not a private key", key_path.display()))?;
    let issuer = Issuer::from_ca_cert_pem(&cert, key)
        .with_context(|| format!("{}: not a CA certificate", cert_path.display()))?;
    Ok(Authority { cert, issuer })
}

/// `sa.key` and `sa.pub`, which sign and verify service account tokens. An RSA key: clients of the issuer's discovery
/// documents (cloud identity federation, Vault) can count on RS256 only.
fn service_account_keys(dir: &Path) -> Result<()> {
    let (key, public) = (dir.join("sa.key"), dir.join("sa.pub"));
    if key.exists() && public.exists() {
        return Ok(());
    }
    let pair = if key.exists() {
        let text = fs::read_to_string(&key).with_context(|| format!("read {}", key.display()))?;
        KeyPair::from_pem(&text).with_context(|| format!("{}: not a private key", key.display()))?
    } else {
        let pair = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).context("generate RSA key")?;
        write_private(&key, pair.serialize_pem().as_bytes())?;
        pair
    };
    write_private(&public, pair.public_key_pem().as_bytes())
}

fn save(dir: &Path, file: &str, signed: &Signed) -> Result<()> {
    write_private(&dir.join(format!("{file}.key")), signed.key.as_bytes())?;
    write_private(&dir.join(format!("{file}.crt")), signed.cert.as_bytes())
}

/// Replaces a file whole, readable by root only.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let scratch = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&scratch)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&scratch, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Whether a certificate is there, has a month left, and covers what it must.
fn fits(path: &Path, purpose: &Purpose) -> bool {
    let Ok(pem) = fs::read(path) else { return false };
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(&pem) else { return false };
    let Ok(cert) = pem.parse_x509() else { return false };
    let month_ahead = OffsetDateTime::now_utc() + Duration::days(30);
    if cert.validity().not_after.timestamp() < month_ahead.unix_timestamp() {
        return false;
    }
    let Purpose::Server { names, addresses } = purpose else { return true };
    let Ok(Some(extension)) = cert.subject_alternative_name() else { return false };
    let has = |wanted: &dyn Fn(&x509_parser::extensions::GeneralName<'_>) -> bool| {
        extension.value.general_names.iter().any(wanted)
    };
    use x509_parser::extensions::GeneralName;
    names.iter().all(|name| has(&|general| matches!(general, GeneralName::DNSName(dns) if dns == name)))
        && addresses.iter().all(|address| {
            let bytes = match address {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            has(&|general| matches!(general, GeneralName::IPAddress(ip) if *ip == bytes))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_kept_and_renewed_when_addresses_change() {
        let dir = tempfile::tempdir().unwrap();
        let one: IpAddr = "10.0.0.1".parse().unwrap();
        let two: IpAddr = "10.0.0.2".parse().unwrap();
        let names = vec!["kubernetes".to_owned()];
        ensure(dir.path(), &names, &[one]).unwrap();
        let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
        let (ca, api, sa) = (read("ca.crt"), read("apiserver.crt"), read("sa.key"));
        ensure(dir.path(), &names, &[one]).unwrap();
        assert_eq!(read("apiserver.crt"), api);
        ensure(dir.path(), &names, &[one, two]).unwrap();
        assert_ne!(read("apiserver.crt"), api);
        assert_eq!((read("ca.crt"), read("sa.key")), (ca, sa));
    }

    #[test]
    fn a_damaged_ca_is_one_error_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        ensure(dir.path(), &[], &[]).unwrap();
        fs::write(dir.path().join("ca.crt"), "half").unwrap();
        let error = ensure(dir.path(), &[], &[]).err().unwrap().to_string();
        assert!(error.contains("ca.crt: not a CA certificate"), "{error}");
    }
}
