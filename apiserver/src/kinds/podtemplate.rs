//! PodTemplates and ControllerRevisions.

use isopod_api::{field::ErrorList, gvk::GroupKind, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, pod_warnings, template::pod_template},
};

/// `podtemplates`.
pub(crate) struct PodTemplate;
/// `controllerrevisions`.
pub(crate) struct ControllerRevision;

impl Strategy for PodTemplate {
    fn default(&self, obj: &mut Value) {
        super::template_defaults(obj, "/template/spec");
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        pod_template(&mut e, &At::field(obj, "template"));
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        pod_warnings::workload(cx, obj, old, &At::field(obj, "template"), false)
    }

    fn cells(&self, obj: &Value, _now: Timestamp) -> Vec<Value> {
        let [names, images] = table::containers(&obj["template"]["spec"]);
        vec![table::name(obj), names, images, json!(table::labels(&obj["template"]["metadata"]["labels"]))]
    }
}

impl Strategy for ControllerRevision {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let data = At::field(obj, "data");
        e.non_negative(&At::field(obj, "revision"));
        if !data.is_set() {
            e.required(&data, "data is mandatory");
        } else if !data.v.is_object() {
            e.required(&data, "data must be a valid JSON object");
        }
        e.0
    }

    fn validate_update(&self, _cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        e.non_negative(&At::field(new, "revision"));
        e.immutable(&At::field(new, "data"), &old["data"]);
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let controller = meta::controller(obj).map(|owner| {
            let group = owner["apiVersion"].as_str().and_then(|v| v.rsplit_once('/')).map(|g| g.0).unwrap_or_default();
            let kind = owner["kind"].as_str().unwrap_or_default().to_lowercase();
            let kind = GroupKind { group: group.to_owned(), kind };
            let shown = if kind.group.is_empty() { kind.kind } else { format!("{}.{}", kind.kind, kind.group) };
            format!("{shown}/{}", owner["name"].as_str().unwrap_or_default())
        });
        vec![
            table::name(obj),
            json!(controller.unwrap_or_else(|| "<none>".to_owned())),
            table::int(&obj["revision"]),
            table::age(obj, now),
        ]
    }
}
