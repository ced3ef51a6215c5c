//! Who may approve and sign certificate requests, and which subjects nobody gets.

use futures::future::BoxFuture;
use isopod_api::status::Status;
use serde_json::Value;

use super::{Operation, Plugin, Request};
use crate::{
    authn::UserInfo,
    authz::{Attributes, Decision, rbac::Policy},
    objects::Objects,
};

const GROUP: &str = "certificates.k8s.io";

/// Whether a user may do something with a signer: by its name, or all of its domain.
fn may(objects: &dyn Objects, user: &UserInfo, verb: &str, signer: &str) -> bool {
    if user.in_group("system:masters") {
        return true;
    }
    let policy = Policy::build(objects, &Policy::default());
    let domain = signer.split_once('/').map_or(signer, |(domain, _)| domain);
    [signer.to_owned(), format!("{domain}/*")].into_iter().any(|name| {
        let attributes = Attributes {
            user: user.clone(),
            verb: verb.to_owned(),
            resource_request: true,
            group: GROUP.to_owned(),
            version: "*".to_owned(),
            resource: "signers".to_owned(),
            name,
            ..Attributes::default()
        };
        matches!(policy.authorize(&attributes), Decision::Allow(_))
    })
}

fn signer(request: &Request<'_>) -> String {
    request.old["spec"]["signerName"].as_str().unwrap_or_default().to_owned()
}

/// `certificatesigningrequests/approval`.
pub(super) struct CertificateApproval;

impl Plugin for CertificateApproval {
    fn name(&self) -> &'static str {
        "CertificateApproval"
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let applies =
            request.operation == Operation::Update && request.is_sub(GROUP, "certificatesigningrequests", "approval");
        let signer = signer(request);
        let result = if applies && !may(request.objects, request.user, "approve", &signer) {
            Err(request.forbidden(format!("user not permitted to approve requests with signerName {signer:?}")))
        } else {
            Ok(())
        };
        Box::pin(async { result })
    }
}

/// `certificatesigningrequests/status`.
pub(super) struct CertificateSigning;

impl Plugin for CertificateSigning {
    fn name(&self) -> &'static str {
        "CertificateSigning"
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let unchanged = |field: &str| request.old["status"][field] == request.object["status"][field];
        let applies = request.operation == Operation::Update
            && request.is_sub(GROUP, "certificatesigningrequests", "status")
            && !(unchanged("certificate") && unchanged("conditions"));
        let signer = signer(request);
        let result = if applies && !may(request.objects, request.user, "sign", &signer) {
            Err(request.forbidden(format!("user not permitted to sign requests with signerName {signer:?}")))
        } else {
            Ok(())
        };
        Box::pin(async { result })
    }
}

/// Nobody asks for a client certificate of `system:masters`.
pub(super) struct CertificateSubjectRestriction;

/// The organizations of a request in PEM, itself in base64.
fn organizations(request: &Value) -> Result<Vec<String>, String> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use x509_parser::prelude::{FromDer, X509CertificationRequest};
    let text = STANDARD.decode(request.as_str().unwrap_or_default()).map_err(|error| error.to_string())?;
    let (_, pem) = x509_parser::pem::parse_x509_pem(&text).map_err(|error| error.to_string())?;
    let (_, request) = X509CertificationRequest::from_der(&pem.contents).map_err(|error| error.to_string())?;
    let subject = &request.certification_request_info.subject;
    Ok(subject.iter_organization().filter_map(|o| o.as_str().ok().map(str::to_owned)).collect())
}

impl CertificateSubjectRestriction {
    fn check(request: &Request<'_>) -> Result<(), Status> {
        let spec = &request.object["spec"];
        if spec["signerName"] != "kubernetes.io/kube-apiserver-client" {
            return Ok(());
        }
        // What does not parse is validation's to refuse.
        let Ok(organizations) = organizations(&spec["request"]) else { return Ok(()) };
        if organizations.iter().any(|organization| organization == "system:masters") {
            let message = "use of kubernetes.io/kube-apiserver-client signer with system:masters group is not allowed";
            return Err(request.forbidden(message));
        }
        Ok(())
    }
}

impl Plugin for CertificateSubjectRestriction {
    fn name(&self) -> &'static str {
        "CertificateSubjectRestriction"
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let applies = request.creates(GROUP, "certificatesigningrequests");
        let result = if applies { Self::check(request) } else { Ok(()) };
        Box::pin(async { result })
    }
}
