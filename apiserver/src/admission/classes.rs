//! DefaultIngressClass: ingresses without a class get the default one.

use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, meta, status::Status};
use serde_json::Value;

use super::{Plugin, Request};

const DEFAULT_CLASS: &str = "ingressclass.kubernetes.io/is-default-class";
const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";

/// The plugin.
pub(super) struct DefaultIngressClass;

impl Plugin for DefaultIngressClass {
    fn name(&self) -> &'static str {
        "DefaultIngressClass"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        if request.creates("networking.k8s.io", "ingresses")
            && request.object["spec"]["ingressClassName"].is_null()
            && meta::annotation(request.object, CLASS_ANNOTATION).is_none()
        {
            let classes = request.objects.list(&Gvr::new("networking.k8s.io", "v1", "ingressclasses"), "");
            let is_default = |class: &Value| meta::annotation(class, DEFAULT_CLASS) == Some("true");
            let defaults = classes.iter().map(|class| class.value()).filter(is_default).collect();
            if let Some(class) = super::storage::newest(defaults) {
                request.object["spec"]["ingressClassName"] = meta::name(&class).into();
            }
        }
        Box::pin(async { Ok(()) })
    }
}
