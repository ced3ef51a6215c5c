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
    validation::{At, Errs, IMMUTABLE, internal, same},
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

/// What all events must have. Those with a time are of the new kind, and have more.
fn legacy(e: &mut Errs, obj: &Value, names: &Names) {
    let involved = At::field(obj, CORE.object).get("namespace");
    let (own, dated) = (meta::namespace(obj), !obj["eventTime"].is_null());
    // Events of cluster-scoped objects live in `default`, or in `kube-system`.
    let fits = match involved.s() {
        "" => own == "default" || dated && own == "kube-system",
        namespace => dated || own == namespace,
    };
    if !fits {
        e.invalid_str(&involved, "does not match event.namespace");
    }
    if !dated {
        return;
    }
    let controller = At::new(Path::new(names.controller), &obj[CORE.controller]);
    if controller.s().is_empty() {
        e.required(&controller, "");
    }
    e.qualified_name(&controller);
    for (field, most) in [("reportingInstance", 128), ("action", 128), ("reason", 128), ("message", 1024)] {
        let at = At::field(obj, field);
        if at.s().is_empty() && field != "message" {
            e.required(&at, "");
        }
        if at.s().len() > most {
            e.invalid_as(&at, "", &format!("can have at most {most} characters"));
        }
    }
}

fn series(e: &mut Errs, obj: &Value) {
    if obj["series"].is_null() {
        return;
    }
    let at = At::field(obj, "series");
    if at.get("count").int0() < 2 {
        e.invalid_as(&at.get("count"), "", "should be at least 2");
    }
    if !at.get("lastObservedTime").is_set() {
        e.required(&at.get("lastObservedTime"), "");
    }
}

/// What the newer group asks for besides, and what it has no use for.
fn strict(e: &mut Errs, obj: &Value) {
    series(e, obj);
    let time = At::field(obj, "eventTime");
    if !time.is_set() {
        e.required(&time, "");
    }
    let kind = At::field(obj, "type");
    if !["Normal", "Warning"].contains(&kind.s()) {
        e.invalid_as(&kind, "", &format!("has invalid value: {}", kind.s()));
    }
    let source = &obj[CORE.source];
    for (field, is_set) in [
        (CORE.first, !obj[CORE.first].is_null()),
        (CORE.last, !obj[CORE.last].is_null()),
        (CORE.count, obj[CORE.count].as_i64().unwrap_or_default() != 0),
        (CORE.source, !text(source, "component").is_empty() || !text(source, "host").is_empty()),
    ] {
        if is_set {
            e.invalid_as(&At::field(obj, field), "", "needs to be unset");
        }
    }
}

/// In the newer group only the series of an event changes.
fn immutable(e: &mut Errs, new: &Value, old: &Value) {
    let shown = |field: &str, v: &Value| match field {
        _ if v.is_null() && field == "related" => Value::Null,
        "involvedObject" | "related" => internal::named("ObjectRef", v),
        "source" => internal::named("EventSource", v),
        "count" => json!(v.as_i64().unwrap_or_default()),
        "firstTimestamp" | "lastTimestamp" | "eventTime" => v.clone(),
        _ => json!(v.as_str().unwrap_or_default()),
    };
    for (field, name) in [
        ("involvedObject", "involvedObject"),
        ("reason", "reason"),
        ("message", "message"),
        ("source", "source"),
        ("firstTimestamp", "firstTimestamp"),
        ("lastTimestamp", "lastTimestamp"),
        ("count", "count"),
        // Upstream compares it twice.
        ("reason", "reason"),
        ("type", "type"),
        ("eventTime", "eventTime"),
        ("action", "action"),
        ("related", "related"),
        ("reportingComponent", "reportingController"),
        ("reportingInstance", "reportingInstance"),
    ] {
        if !same(&new[field], &old[field]) {
            e.invalid_as(&At::new(Path::new(name), &new[field]), shown(field, &new[field]), IMMUTABLE);
        }
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
        if cx.gvr.group == "events.k8s.io" {
            legacy(&mut e, obj, &NEW);
            strict(&mut e, obj);
        } else {
            legacy(&mut e, obj, &CORE);
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.gvr.group == "events.k8s.io" {
            legacy(&mut e, new, &NEW);
            if !same(&new["series"], &old["series"]) {
                series(&mut e, new);
            }
            immutable(&mut e, new, old);
        } else {
            legacy(&mut e, new, &CORE);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_events_must_have() {
        let dated = |mut rest: Value| {
            for (field, value) in [
                ("eventTime", json!("2026-01-01T00:00:00.000000Z")),
                ("reportingComponent", json!("a.b/c")),
                ("reportingInstance", json!("i")),
                ("action", json!("a")),
                ("reason", json!("r")),
                ("type", json!("Normal")),
                ("involvedObject", json!({"namespace": "n"})),
            ] {
                if rest[field].is_null() {
                    rest[field] = value;
                }
            }
            rest
        };
        for (obj, core, new) in [
            (json!({"involvedObject": {"namespace": "n"}}), "", "eventTime type"),
            (
                json!({"involvedObject": {"namespace": "x"}}),
                "involvedObject.namespace",
                "involvedObject.namespace eventTime type",
            ),
            (json!({}), "involvedObject.namespace", "involvedObject.namespace eventTime type"),
            (dated(json!({})), "", ""),
            (dated(json!({"involvedObject": {"namespace": "x"}})), "", ""),
            (dated(json!({"action": "", "message": "x".repeat(1025)})), "action message", "action message"),
            (dated(json!({"series": {"count": 1}})), "", "series.count series.lastObservedTime"),
            (dated(json!({"count": 1, "source": {"host": "h"}})), "", "count source"),
        ] {
            let mut obj = obj;
            obj["metadata"] = json!({"namespace": "n"});
            let fields = |e: Errs| e.0.iter().map(|e| e.field.clone()).collect::<Vec<_>>().join(" ");
            let mut e = Errs::new();
            legacy(&mut e, &obj, &CORE);
            assert_eq!(fields(e), core, "{obj}");
            let mut e = Errs::new();
            legacy(&mut e, &obj, &NEW);
            strict(&mut e, &obj);
            assert_eq!(fields(e), new, "{obj}");
        }
        let (old, mut new) = (dated(json!({})), dated(json!({"reason": "other", "count": 2})));
        new["involvedObject"]["name"] = json!("p");
        let mut e = Errs::new();
        immutable(&mut e, &new, &old);
        let texts: Vec<String> = e.0.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                r#"involvedObject: Invalid value: {"Kind":"","Namespace":"n","Name":"p","UID":"","APIVersion":"","ResourceVersion":"","FieldPath":""}: field is immutable"#,
                r#"reason: Invalid value: "other": field is immutable"#,
                "count: Invalid value: 2: field is immutable",
                r#"reason: Invalid value: "other": field is immutable"#,
            ]
        );
    }
}
