//! Certificate requests: approves those of nodes for themselves (their identity, and the certificate they serve with),
//! signs approved ones with the cluster's CA, forgets old ones.

use crate::context::Context;
use ipnet::IpNet;
use isopod_client::objects::{DeleteOptions, HasMeta, is_not_found};
use isopod_client::{Queue, spawn_workers};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestSpec,
};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use rcgen::{
    CertificateSigningRequestParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "certificatesigningrequest-signing-controller";
const CLIENT: &str = "kubernetes.io/kube-apiserver-client";
const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
const LEGACY: &str = "kubernetes.io/legacy-unknown";
const LONGEST: i64 = 365 * 24 * 3600;
const BACKDATE: i64 = 5 * 60;

/// Why a request is not signed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the API server did not take it")]
    Api(#[from] kube::Error),
    #[error("the request cannot be read or signed")]
    Request(#[from] rcgen::Error),
    #[error("{0}")]
    Refused(String),
    #[error("the CA cannot be read")]
    Ca(#[source] std::io::Error),
    #[error("the time is out of range")]
    Time,
}

/// Subscribes the controllers and starts their worker.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<String>> = Queue::new();
    let q = queue.clone();
    ctx.caches.signing_requests.subscribe(move |change| {
        if !change.is_deleted() {
            q.add(change.object().name().to_owned());
        }
    });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 2, &ctx.stop, move |name| {
        let ctx = context.clone();
        async move { sync(&ctx, &name).await }
    });
}

fn condition<'a>(csr: &'a CertificateSigningRequest, kind: &str) -> Option<&'a CertificateSigningRequestCondition> {
    csr.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == kind && c.status == "True")
}

async fn sync(ctx: &Context, name: &str) -> Result<Option<Duration>, Error> {
    let Some(csr) = ctx.caches.signing_requests.get("", name) else { return Ok(None) };
    let now = Timestamp::now();
    let expires = expiry(&csr);
    if expires <= now {
        ctx.objects.delete::<CertificateSigningRequest>("", name, &DeleteOptions::uid(csr.uid())).await?;
        return Ok(None);
    }
    let again = Duration::from_millis(u64::try_from(expires.duration_since(now).as_millis()).unwrap_or(0) + 1);
    let issued = csr.status.as_ref().is_some_and(|s| s.certificate.is_some());
    if issued || condition(&csr, "Denied").is_some() || condition(&csr, "Failed").is_some() {
        return Ok(Some(again));
    }
    if condition(&csr, "Approved").is_some() {
        sign(ctx, &csr, now).await?;
    } else if let Some(reason) = self_request(ctx, &csr).await? {
        approve(ctx, &csr, reason, now).await?;
    } else if own_serving(&csr.spec, &ctx.caches.nodes.list(), &ctx.config.service_cidr, &servers(ctx)) {
        approve(ctx, &csr, "Auto approving kubelet serving certificate for the requesting node's own names.", now)
            .await?;
    }
    Ok(Some(again))
}

/// When a request is forgotten: an hour after its decision, a day after it was made.
fn expiry(csr: &CertificateSigningRequest) -> Timestamp {
    let decided = ["Approved", "Denied", "Failed"].into_iter().filter_map(|kind| condition(csr, kind)).next();
    let since = |t: Option<&Time>| t.map_or_else(Timestamp::now, |t| t.0);
    match decided {
        Some(c) => since(c.last_update_time.as_ref()) + SignedDuration::from_hours(1),
        None => since(csr.metadata.creation_timestamp.as_ref()) + SignedDuration::from_hours(24),
    }
}

fn usages(spec: &CertificateSigningRequestSpec) -> Vec<&str> {
    let mut all: Vec<&str> = spec.usages.iter().flatten().map(String::as_str).collect();
    all.sort_unstable();
    all
}

/// Whether a request is a node's for its own client certificate and its maker may have it; how that is said.
async fn self_request(ctx: &Context, csr: &CertificateSigningRequest) -> Result<Option<&'static str>, Error> {
    let spec = &csr.spec;
    if spec.signer_name != KUBELET_CLIENT {
        return Ok(None);
    }
    let Ok(params) = request(spec) else { return Ok(None) };
    if check(spec, &params).is_err() {
        return Ok(None);
    }
    let own = common_name(&params) == spec.username.clone().unwrap_or_default();
    for (sub, reason) in [
        ("selfnodeclient", "Auto approving self kubelet client certificate after SubjectAccessReview."),
        ("nodeclient", "Auto approving kubelet client certificate after SubjectAccessReview."),
    ] {
        if (sub != "selfnodeclient" || own) && allowed(ctx, spec, sub).await? {
            return Ok(Some(reason));
        }
    }
    Ok(None)
}

/// Whether a request is a node's own for a certificate that names nothing but this node.
///
/// The certificate comes from the CA that clients of the API server trust, so a node must not get another's name: neither
/// a service's, nor an API server's, nor another node's. A node that has told its addresses gets those and loopback, one
/// that is only joining any address that is nobody else's.
fn own_serving(
    spec: &CertificateSigningRequestSpec,
    nodes: &[Arc<Node>],
    services: &IpNet,
    servers: &[String],
) -> bool {
    let user = spec.username.as_deref().unwrap_or_default();
    let Some(own) = user.strip_prefix("system:node:").filter(|_| spec.signer_name == KUBELET_SERVING) else {
        return false;
    };
    let is_node = spec.groups.iter().flatten().any(|group| group == "system:nodes");
    let Ok(params) = request(spec) else { return false };
    if !is_node || check(spec, &params).is_err() {
        return false;
    }
    let addresses = |node: &Node| -> Vec<String> {
        let status = node.status.as_ref().and_then(|s| s.addresses.as_ref());
        status.into_iter().flatten().map(|a| a.address.clone()).collect()
    };
    let known: Vec<String> = nodes.iter().filter(|n| n.name() == own).flat_map(|n| addresses(n)).collect();
    let others: Vec<String> = nodes.iter().filter(|n| n.name() != own).flat_map(|n| addresses(n)).collect();
    params.params.subject_alt_names.iter().all(|name| match name {
        SanType::DnsName(name) => name.as_str() == own,
        SanType::IpAddress(address) if address.is_loopback() => true,
        SanType::IpAddress(address) => {
            let text = address.to_string();
            let taken = services.contains(address) || others.contains(&text) || servers.contains(&text);
            let free = !address.is_unspecified() && !taken;
            free && (known.is_empty() || known.contains(&text))
        }
        _ => false,
    })
}

/// Addresses of the API servers.
fn servers(ctx: &Context) -> Vec<String> {
    let slice = ctx.caches.slices.get("default", "kubernetes");
    slice.iter().flat_map(|s| s.endpoints.iter().flatten()).flat_map(|e| e.addresses.clone()).collect()
}

async fn allowed(ctx: &Context, spec: &CertificateSigningRequestSpec, sub: &str) -> Result<bool, Error> {
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: spec.username.clone(),
            groups: spec.groups.clone(),
            uid: spec.uid.clone(),
            extra: spec.extra.clone(),
            resource_attributes: Some(ResourceAttributes {
                group: Some("certificates.k8s.io".into()),
                resource: Some("certificatesigningrequests".into()),
                verb: Some("create".into()),
                subresource: Some(sub.to_owned()),
                version: Some("*".into()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let answer = ctx.objects.create(&review).await?;
    Ok(answer.status.is_some_and(|s| s.allowed))
}

async fn approve(ctx: &Context, csr: &CertificateSigningRequest, text: &str, now: Timestamp) -> Result<(), Error> {
    let mut new = csr.clone();
    new.status.get_or_insert_default().conditions.get_or_insert_default().push(CertificateSigningRequestCondition {
        type_: "Approved".into(),
        status: "True".into(),
        reason: Some("AutoApproved".into()),
        message: Some(text.to_owned()),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    });
    update(ctx, csr, &new, "approval").await
}

async fn update(
    ctx: &Context,
    old: &CertificateSigningRequest,
    new: &CertificateSigningRequest,
    sub: &str,
) -> Result<(), Error> {
    match ctx.objects.update(old, new, sub).await {
        Err(error) if !is_not_found(&error) => Err(error.into()),
        _ => Ok(()),
    }
}

async fn sign(ctx: &Context, csr: &CertificateSigningRequest, now: Timestamp) -> Result<(), Error> {
    if ![CLIENT, KUBELET_CLIENT, KUBELET_SERVING, LEGACY].contains(&csr.spec.signer_name.as_str()) {
        return Ok(());
    }
    let mut new = csr.clone();
    let status = new.status.get_or_insert_default();
    match issue(ctx, &csr.spec, now) {
        Ok(pem) => status.certificate = Some(ByteString(pem.into_bytes())),
        Err(Error::Refused(text)) => {
            status.conditions.get_or_insert_default().push(CertificateSigningRequestCondition {
                type_: "Failed".into(),
                status: "True".into(),
                reason: Some("SignerValidationFailure".into()),
                message: Some(text),
                last_update_time: Some(Time(now)),
                last_transition_time: Some(Time(now)),
            });
        }
        Err(error) => return Err(error),
    }
    update(ctx, csr, &new, "status").await
}

fn request(spec: &CertificateSigningRequestSpec) -> Result<CertificateSigningRequestParams, Error> {
    let pem = String::from_utf8_lossy(&spec.request.0);
    Ok(CertificateSigningRequestParams::from_pem(&pem)?)
}

fn text(value: &DnValue) -> String {
    match value {
        DnValue::Utf8String(text) => text.clone(),
        DnValue::PrintableString(text) => text.as_str().to_owned(),
        DnValue::Ia5String(text) => text.as_str().to_owned(),
        _ => String::new(),
    }
}

fn common_name(params: &CertificateSigningRequestParams) -> String {
    params.params.distinguished_name.get(&DnType::CommonName).map(text).unwrap_or_default()
}

/// What upstream's signers demand of a request.
fn check(spec: &CertificateSigningRequestSpec, params: &CertificateSigningRequestParams) -> Result<(), Error> {
    let refuse = |text: &str| Err(Error::Refused(text.to_owned()));
    let wanted = usages(spec);
    let allowed = |list: &[&str]| wanted.iter().all(|u| list.contains(u));
    let names = &params.params.subject_alt_names;
    let node_subject = || {
        let organization = params.params.distinguished_name.get(&DnType::OrganizationName).map(text);
        organization.as_deref() == Some("system:nodes") && common_name(params).starts_with("system:node:")
    };
    match spec.signer_name.as_str() {
        CLIENT => {
            let fine =
                wanted.contains(&"client auth") && allowed(&["client auth", "digital signature", "key encipherment"]);
            if fine { Ok(()) } else { refuse("invalid usages for client certificate") }
        }
        KUBELET_CLIENT => {
            if !node_subject() {
                return refuse("subject is not that of a node");
            }
            if !names.is_empty() {
                return refuse("subject alternative names are not allowed for kubelet client certificates");
            }
            let fine =
                wanted.contains(&"client auth") && allowed(&["client auth", "digital signature", "key encipherment"]);
            if fine { Ok(()) } else { refuse("invalid usages for kubelet client certificate") }
        }
        KUBELET_SERVING => {
            if !node_subject() || Some(common_name(params)) != spec.username {
                return refuse("subject is not that of the requesting node");
            }
            let only_hosts = names.iter().all(|n| matches!(n, SanType::DnsName(_) | SanType::IpAddress(_)));
            if names.is_empty() || !only_hosts {
                return refuse("DNS or IP subjectAltName is required");
            }
            let fine =
                wanted.contains(&"server auth") && allowed(&["server auth", "digital signature", "key encipherment"]);
            if fine { Ok(()) } else { refuse("invalid usages for kubelet serving certificate") }
        }
        _ => Ok(()),
    }
}

fn issue(ctx: &Context, spec: &CertificateSigningRequestSpec, now: Timestamp) -> Result<String, Error> {
    let mut params = request(spec)?;
    check(spec, &params)?;
    let seconds = spec.expiration_seconds.map_or(LONGEST, |s| i64::from(s).clamp(600, LONGEST));
    let at = |second: i64| time::OffsetDateTime::from_unix_timestamp(second).map_err(|_| Error::Time);
    let certificate = &mut params.params;
    certificate.not_before = at(now.as_second() - BACKDATE)?;
    certificate.not_after = at(now.as_second() + seconds)?;
    certificate.is_ca = IsCa::ExplicitNoCa;
    certificate.key_usages.clear();
    certificate.extended_key_usages.clear();
    for usage in usages(spec) {
        match usage {
            "client auth" => certificate.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth),
            "server auth" => certificate.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth),
            "digital signature" => certificate.key_usages.push(KeyUsagePurpose::DigitalSignature),
            "key encipherment" => certificate.key_usages.push(KeyUsagePurpose::KeyEncipherment),
            _ => {}
        }
    }
    let read = |path: &std::path::Path| std::fs::read_to_string(path).map_err(Error::Ca);
    let key = KeyPair::from_pem(&read(&ctx.config.ca_key)?)?;
    let issuer = Issuer::from_ca_cert_pem(&read(&ctx.config.ca_cert)?, key)?;
    Ok(params.signed_by(&issuer)?.pem())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{NodeAddress, NodeStatus};
    use rcgen::{CertificateParams, DistinguishedName};

    fn node(name: &str, address: &str) -> Arc<Node> {
        let address = NodeAddress { type_: "InternalIP".into(), address: address.into() };
        let mut node = Node { status: Some(NodeStatus::default()), ..Node::default() };
        node.metadata.name = Some(name.into());
        node.status.get_or_insert_default().addresses = Some(vec![address]);
        Arc::new(node)
    }

    fn wish(user: &str, subject: &str, names: &[&str]) -> CertificateSigningRequestSpec {
        let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        params.distinguished_name.push(DnType::CommonName, subject);
        let pem = params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: KUBELET_SERVING.into(),
            username: Some(user.into()),
            groups: Some(vec!["system:nodes".into(), "system:authenticated".into()]),
            usages: Some(vec!["digital signature".into(), "server auth".into()]),
            ..CertificateSigningRequestSpec::default()
        }
    }

    #[test]
    fn nodes_get_serving_certificates_for_their_own_names_only() {
        let (two, services) = ("system:node:two", "10.96.0.0/16".parse().unwrap());
        let servers = vec!["10.88.0.9".to_owned()];
        let joining = vec![node("one", "10.88.0.1")];
        let joined = vec![node("one", "10.88.0.1"), node("two", "10.88.0.2")];
        let cases: [(&str, &[&str], bool, bool); 8] = [
            ("its own", &["two", "10.88.0.2", "127.0.0.1"], true, true),
            ("an address it does not have", &["two", "10.88.0.3"], true, false),
            ("another node's name", &["one", "10.88.0.2"], false, false),
            ("another node's address", &["two", "10.88.0.1"], false, false),
            ("a service's address", &["two", "10.96.0.1"], false, false),
            ("a service's name", &["kubernetes.default.svc"], false, false),
            ("an API server's address", &["two", "10.88.0.9"], false, false),
            ("every address", &["two", "0.0.0.0"], false, false),
        ];
        for (what, names, before, after) in cases {
            let spec = wish(two, two, names);
            assert_eq!(own_serving(&spec, &joining, &services, &servers), before, "{what}, joining");
            assert_eq!(own_serving(&spec, &joined, &services, &servers), after, "{what}, joined");
        }
        let stranger = wish("system:node:three", two, &["two"]);
        assert!(!own_serving(&stranger, &joined, &services, &servers), "for another node");
        let mut no_node = wish(two, two, &["two"]);
        no_node.groups = Some(vec!["system:authenticated".into()]);
        assert!(!own_serving(&no_node, &joined, &services, &servers), "not in the nodes' group");
        let mut client = wish(two, two, &["two"]);
        client.signer_name = KUBELET_CLIENT.into();
        assert!(!own_serving(&client, &joined, &services, &servers), "another signer");
    }
}
