//! Tables (`kubectl get`): the columns of every kind, and helpers for cells.

use std::{collections::HashMap, sync::LazyLock};

use isopod_api::{gvk::Gvr, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::strategy::Column;

/// `[name, type, format, priority]` of every column, by `group/version/resource`.
static COLUMNS: LazyLock<HashMap<String, Vec<Column>>> = LazyLock::new(|| {
    let data: Value = serde_json::from_str(include_str!("../../data/printer-columns.json")).unwrap_or_default();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let column = |c: &Value| Column {
        name: text(&c[0]),
        kind: text(&c[1]),
        format: text(&c[2]),
        priority: c[3].as_i64().unwrap_or_default(),
        description: String::new(),
    };
    data["columns"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(gvr, columns)| (gvr.clone(), columns.as_array().into_iter().flatten().map(column).collect()))
        .collect()
});

/// The columns of a built-in resource; name and creation time for others.
pub fn columns(gvr: &Gvr) -> Vec<Column> {
    let key = if gvr.group.is_empty() {
        format!("{}/{}", gvr.version, gvr.resource)
    } else {
        format!("{}/{}/{}", gvr.group, gvr.version, gvr.resource)
    };
    COLUMNS.get(&key).cloned().unwrap_or_else(|| {
        let column = |name: &str, kind: &str, format: &str| Column {
            name: name.to_owned(),
            kind: kind.to_owned(),
            format: format.to_owned(),
            priority: 0,
            description: String::new(),
        };
        vec![column("Name", "string", "name"), column("Created At", "date", "")]
    })
}

/// `group/version/resource` of everything with columns of its own.
#[cfg(test)]
pub(crate) fn known() -> impl Iterator<Item = &'static String> {
    COLUMNS.keys()
}

/// The cells of a kind without columns of its own: name and creation time.
pub fn default_cells(obj: &Value, _now: Timestamp) -> Vec<Value> {
    vec![json!(meta::name(obj)), obj["metadata"]["creationTimestamp"].clone()]
}

/// A duration as people read it: `95s`, `3m20s`, `47m`, `5h12m`, `3d4h`, `60d`, `3y12d`.
pub fn human_duration(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let pair = |whole: i64, unit: &str, rest: i64, rest_unit: &str| {
        if rest == 0 { format!("{whole}{unit}") } else { format!("{whole}{unit}{rest}{rest_unit}") }
    };
    match seconds {
        ..-1 => "<invalid>".to_owned(),
        -1..0 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..600 => pair(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => pair(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => pair(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => pair(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

/// Parses an RFC 3339 time.
pub fn timestamp(v: &Value) -> Option<Timestamp> {
    v.as_str()?.parse().ok()
}

/// How long ago a time was; `<unknown>` without one.
pub fn since(v: &Value, now: Timestamp) -> String {
    match timestamp(v) {
        None => "<unknown>".to_owned(),
        Some(then) => human_duration(now.duration_since(then).as_secs()),
    }
}

/// The age of an object.
pub fn age(obj: &Value, now: Timestamp) -> Value {
    json!(since(&obj["metadata"]["creationTimestamp"], now))
}

/// The name of an object.
pub fn name(obj: &Value) -> Value {
    json!(meta::name(obj))
}

/// `k=v,k=v` of a map in key order; `<none>` when empty.
pub fn labels(v: &Value) -> String {
    let mut parts: Vec<String> =
        v.as_object().into_iter().flatten().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    parts.sort();
    or_none(parts.join(","))
}

/// `<none>` instead of nothing.
pub fn or_none(s: String) -> String {
    if s.is_empty() { "<none>".to_owned() } else { s }
}

/// The string, or a replacement when it is absent or empty.
pub fn or(v: &Value, instead: &str) -> Value {
    match v.as_str() {
        Some(s) if !s.is_empty() => json!(s),
        _ => json!(instead),
    }
}

/// A label selector in kubectl's notation; `<none>` when it selects everything.
pub fn selector(v: &Value) -> String {
    if v.is_null() {
        return "<none>".to_owned();
    }
    let mut parts: Vec<(String, String)> = v["matchLabels"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| (k.clone(), format!("{k}={}", v.as_str().unwrap_or_default())))
        .collect();
    for expression in v["matchExpressions"].as_array().into_iter().flatten() {
        let key = expression["key"].as_str().unwrap_or_default();
        let mut values: Vec<&str> =
            expression["values"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let text = match expression["operator"].as_str() {
            Some("In") => format!("{key} in ({})", values.join(",")),
            Some("NotIn") => format!("{key} notin ({})", values.join(",")),
            Some("DoesNotExist") => format!("!{key}"),
            _ => key.to_owned(),
        };
        parts.push((key.to_owned(), text));
    }
    parts.sort();
    or_none(parts.into_iter().map(|p| p.1).collect::<Vec<_>>().join(","))
}

/// Names and images of a pod spec's containers.
pub fn containers(spec: &Value) -> [Value; 2] {
    let list = |field: &str| {
        let all: Vec<&str> =
            spec["containers"].as_array().into_iter().flatten().filter_map(|c| c[field].as_str()).collect();
        json!(all.join(","))
    };
    [list("name"), list("image")]
}

/// The number, or 0.
pub fn int(v: &Value) -> Value {
    json!(v.as_i64().unwrap_or_default())
}

/// Number of items or entries.
pub fn count(v: &Value) -> usize {
    v.as_array().map(Vec::len).or_else(|| v.as_object().map(serde_json::Map::len)).unwrap_or_default()
}

/// The strings of a list, joined.
pub fn join(v: &Value, separator: &str) -> String {
    v.as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join(separator)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (seconds, text) in [
            (-5, "<invalid>"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (3600, "60m"),
            (10_860, "3h1m"),
            (36_000, "10h"),
            (180_000, "2d2h"),
            (864_000, "10d"),
            (70_000_000, "2y80d"),
            (300_000_000, "9y"),
        ] {
            assert_eq!(human_duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn every_kind_has_its_columns() {
        let gvr =
            |group: &str, resource: &str| Gvr { group: group.into(), version: "v1".into(), resource: resource.into() };
        assert_eq!(columns(&gvr("", "pods")).len(), 9);
        assert_eq!(columns(&gvr("apps", "deployments"))[1].name, "Ready");
        assert_eq!(columns(&gvr("example.com", "things")).len(), 2);
    }

    #[test]
    fn selectors() {
        let v = json!({"matchLabels": {"b": "1", "a": "2"}, "matchExpressions": [{"key": "c", "operator": "In", "values": ["y", "x"]}]});
        assert_eq!(selector(&v), "a=2,b=1,c in (x,y)");
        assert_eq!(selector(&json!({})), "<none>");
    }
}
