//! Events, of both API groups.

use isopod_api::{field::ErrorList, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, same},
};

/// `events` of the core group.
pub(crate) struct CoreEvent;
/// `events` of events.k8s.io.
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

/// A cluster-scoped object's events live in `default` (or where they like, in the core group).
fn namespace_matches(obj: &Value, names: &Names) -> bool {
    let (own, involved) = (meta::namespace(obj), text(&obj[names.object], "namespace"));
    if involved.is_empty() { matches!(own, "default" | "kube-system") } else { own == involved }
}

fn legacy(e: &mut Errs, obj: &Value) {
    let at = At::field(obj, CORE.object).get("namespace");
    if !namespace_matches(obj, &CORE) {
        e.invalid_str(&at, "does not match event.namespace");
    }
}

fn new_style(e: &mut Errs, obj: &Value, names: &Names) {
    let controller = At::field(obj, names.controller);
    if names.object == "involvedObject" {
        legacy(e, obj);
        if controller.s().is_empty() {
            e.required(&controller, "");
        }
    } else if !namespace_matches(obj, names) {
        e.invalid_str(&At::field(obj, names.object).get("namespace"), "does not match event.namespace");
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
    let message = At::field(obj, names.message);
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

fn fields(obj: &Value, names: &Names) -> Vec<(&'static str, String)> {
    let involved = &obj[names.object];
    let owned = |v: &Value, field: &str| text(v, field).to_owned();
    let component = text(&obj[names.source], "component");
    let source = if component.is_empty() { text(obj, names.controller) } else { component };
    if names.object == "regarding" {
        return vec![
            ("type", owned(obj, "type")),
            ("regarding.kind", owned(involved, "kind")),
            ("regarding.namespace", owned(involved, "namespace")),
            ("regarding.name", owned(involved, "name")),
            ("regarding.uid", owned(involved, "uid")),
            ("reason", owned(obj, "reason")),
            ("reportingController", owned(obj, "reportingController")),
        ];
    }
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

impl Strategy for CoreEvent {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        if obj["eventTime"].is_null() {
            legacy(&mut e, obj);
        } else {
            new_style(&mut e, obj, &CORE);
        }
        e.0
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        fields(obj, &CORE)
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
        cells(obj, now, &CORE)
    }
}

impl Strategy for Event {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        if obj["eventTime"].is_null() {
            e.required(&At::field(obj, "eventTime"), "");
            event_type(&mut e, obj);
        } else {
            new_style(&mut e, obj, &NEW);
            event_type(&mut e, obj);
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs(self.validate(cx, new));
        for field in
            ["reportingController", "reportingInstance", "action", "reason", "regarding", "related", "note", "type"]
        {
            if !same(&new[field], &old[field]) {
                e.immutable(&At::field(new, field), &old[field]);
            }
        }
        e.0
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        fields(obj, &NEW)
    }

    fn field_names(&self) -> &'static [&'static str] {
        &[
            "type",
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "reason",
            "reportingController",
        ]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        cells(obj, now, &NEW)
    }
}
