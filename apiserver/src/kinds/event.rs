//! Events, of both API groups.

use isopod_api::{
    field::{ErrorList, Path},
    meta,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs},
};

/// `events` of both groups: stored in the core group's form, shown in either.
pub(crate) struct Event;

/// The names the two groups give to the same fields.
struct Names {
    object: &'static str,
    controller: &'static str,
    source: &'static str,
    message: &'static str,
    first: &'static str,
    last: &'static str,
    count: &'static str,
}

const CORE: Names = Names {
    object: "involvedObject",
    controller: "reportingComponent",
    source: "source",
    message: "message",
    first: "firstTimestamp",
    last: "lastTimestamp",
    count: "count",
};
const NEW: Names = Names {
    object: "regarding",
    controller: "reportingController",
    source: "deprecatedSource",
    message: "note",
    first: "deprecatedFirstTimestamp",
    last: "deprecatedLastTimestamp",
    count: "deprecatedCount",
};

fn text<'a>(v: &'a Value, field: &str) -> &'a str {
    v[field].as_str().unwrap_or_default()
}

/// A cluster-scoped object's events live in `default` or `kube-system`.
fn involved_namespace(e: &mut Errs, obj: &Value) {
    let at = At::field(obj, CORE.object).get("namespace");
    let own = meta::namespace(obj);
    let fits = if at.s().is_empty() { matches!(own, "default" | "kube-system") } else { own == at.s() };
    if !fits {
        e.invalid_str(&at, "does not match event.namespace");
    }
}

/// What an event with a time must have; fields are named as the client's group names them.
fn complete(e: &mut Errs, obj: &Value, names: &Names) {
    involved_namespace(e, obj);
    let controller = At::new(Path::new(names.controller), &obj[CORE.controller]);
    if controller.s().is_empty() {
        e.required(&controller, "");
    }
    e.qualified_name(&controller);
    for field in ["reportingInstance", "action", "reason"] {
        let at = At::field(obj, field);
        if at.s().is_empty() {
            e.required(&at, "");
        } else if at.s().len() > 128 {
            e.invalid(&at, "can have at most 128 characters");
        }
    }
    let message = At::new(Path::new(names.message), &obj[CORE.message]);
    if message.s().len() > 1024 {
        e.invalid(&message, "can have at most 1024 characters");
    }
}

fn event_type(e: &mut Errs, obj: &Value) {
    let kind = text(obj, "type");
    if !["Normal", "Warning"].contains(&kind) {
        e.invalid_as(&At::field(obj, "type"), "", &format!("has invalid value: {kind}"));
    }
}

fn cells(obj: &Value, now: Timestamp, names: &Names) -> Vec<Value> {
    let involved = &obj[names.object];
    let since = |v: &Value, instead: &Value| {
        if v.is_null() { table::since(instead, now) } else { table::since(v, now) }
    };
    let first = since(&obj[names.first], &obj["eventTime"]);
    let mut last = first.clone();
    if !obj[names.last].is_null() {
        last = table::since(&obj[names.last], now);
    }
    let mut count = obj[names.count].as_i64().unwrap_or_default();
    if !obj["series"].is_null() {
        last = table::since(&obj["series"]["lastObservedTime"], now);
        count = obj["series"]["count"].as_i64().unwrap_or_default();
    } else if count == 0 {
        count = 1;
    }
    let seen = if !obj["series"].is_null() || (count > 1 && !obj[names.last].is_null()) {
        format!("{last} (x{count} over {first})")
    } else {
        last
    };
    vec![
        json!(seen),
        table::or(&obj["type"], ""),
        table::or(&obj["reason"], ""),
        json!(format!("{}/{}", text(involved, "kind").to_lowercase(), text(involved, "name"))),
        table::or(&involved["fieldPath"], ""),
        json!(source(obj, names)),
        json!(text(obj, names.message).trim()),
        json!(first),
        json!(count),
        table::name(obj),
    ]
}

fn source(obj: &Value, names: &Names) -> String {
    let source = &obj[names.source];
    let (component, host) = (text(source, "component"), text(source, "host"));
    let component = if component.is_empty() { text(obj, names.controller) } else { component };
    let instance = if component == text(obj, names.controller)
        && host.is_empty()
        && !text(obj, "reportingInstance").is_empty()
        && text(source, "component").is_empty()
    {
        text(obj, "reportingInstance")
    } else {
        host
    };
    if instance.is_empty() { component.to_owned() } else { format!("{component}, {instance}") }
}

impl Strategy for Event {
    fn validate(&self, cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let strict = cx.gvr.group == "events.k8s.io";
        match (strict, obj["eventTime"].is_null()) {
            (false, true) => involved_namespace(&mut e, obj),
            (false, false) => complete(&mut e, obj, &CORE),
            (true, true) => e.required(&At::field(obj, "eventTime"), ""),
            (true, false) => complete(&mut e, obj, &NEW),
        }
        if strict {
            event_type(&mut e, obj);
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs(self.validate(cx, new));
        if cx.gvr.group == "events.k8s.io" {
            for (field, shown) in [
                ("reportingComponent", "reportingController"),
                ("reportingInstance", "reportingInstance"),
                ("action", "action"),
                ("reason", "reason"),
                ("involvedObject", "regarding"),
                ("related", "related"),
                ("message", "note"),
                ("type", "type"),
            ] {
                e.immutable(&At::new(Path::new(shown), &new[field]), &old[field]);
            }
        }
        e.0
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        let involved = &obj[CORE.object];
        let owned = |v: &Value, field: &str| text(v, field).to_owned();
        let component = text(&obj["source"], "component");
        let source = if component.is_empty() { text(obj, CORE.controller) } else { component };
        vec![
            ("type", owned(obj, "type")),
            ("involvedObject.kind", owned(involved, "kind")),
            ("involvedObject.namespace", owned(involved, "namespace")),
            ("involvedObject.name", owned(involved, "name")),
            ("involvedObject.uid", owned(involved, "uid")),
            ("involvedObject.apiVersion", owned(involved, "apiVersion")),
            ("involvedObject.resourceVersion", owned(involved, "resourceVersion")),
            ("involvedObject.fieldPath", owned(involved, "fieldPath")),
            ("reason", owned(obj, "reason")),
            ("reportingComponent", owned(obj, "reportingComponent")),
            ("source", source.to_owned()),
        ]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &[
            "type",
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
        ]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        cells(obj, now, if obj.get(NEW.object).is_some() { &NEW } else { &CORE })
    }
}
