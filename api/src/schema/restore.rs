//! Why an object put together from maps is not one of its type: the words of upstream's converter, which strategic merge
//! patches meet instead of the JSON decoder's.

use serde_json::Value;

use super::{Definition, Type};

/// The first member of the wrong type; `None` when there is none, or when only the JSON decoder has words for it.
pub fn restore_error(definition: &Definition, value: &Value) -> Option<String> {
    let Value::Object(map) = value else { return Some(format!("cannot restore struct from: {}", kind(value))) };
    definition.fields.iter().find_map(|field| of_type(&field.ty, map.get(&*field.name)?))
}

fn of_type(ty: &Type, value: &Value) -> Option<String> {
    let unrecognized = |name: &str| Some(format!("unrecognized type: {name}"));
    match (ty, value) {
        (_, Value::Null) => None,
        (Type::Object(definition), value) if definition.get().scalar.is_none() => {
            restore_error(definition.get(), value)
        }
        (Type::Map(map), Value::Object(members)) => members.values().find_map(|member| of_type(&map.value, member)),
        (Type::Map(_), other) => Some(format!("cannot restore map from {}", kind(other))),
        (Type::List(list), Value::Array(items)) => items.iter().find_map(|item| of_type(&list.item, item)),
        (Type::List(_), other) => Some(format!("cannot restore slice from {}", kind(other))),
        (Type::String, Value::Number(n)) if n.is_i64() => Some("cannot convert int64 to string".into()),
        (Type::String, Value::String(_)) | (Type::Bool, Value::Bool(_)) => None,
        (Type::String, _) => unrecognized("string"),
        (Type::Bool, _) => unrecognized("bool"),
        (Type::Int32 | Type::Int64, Value::Number(n)) if n.as_f64().is_some_and(|n| n.fract() == 0.0) => None,
        (Type::Int32, Value::Number(_)) => Some("cannot convert float64 to int32".into()),
        (Type::Int64, Value::Number(_)) => Some("cannot convert float64 to int64".into()),
        (Type::Int32, _) => unrecognized("int32"),
        (Type::Int64, _) => unrecognized("int64"),
        _ => None,
    }
}

/// The kind of a value in Go.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "invalid",
        Value::Bool(_) => "bool",
        Value::Number(n) if n.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "slice",
        Value::Object(_) => "map",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{gvk::Gvk, schema::lookup};
    use serde_json::json;

    #[test]
    fn words() {
        let pod = lookup(&Gvk::new("", "v1", "Pod")).unwrap();
        for (spec, want) in [
            (json!("x"), Some("cannot restore struct from: string")),
            (json!({"containers": {}}), Some("cannot restore slice from map")),
            (json!({"nodeSelector": []}), Some("cannot restore map from slice")),
            (json!({"nodeSelector": {"a": 1}}), Some("cannot convert int64 to string")),
            (json!({"nodeName": true}), Some("unrecognized type: string")),
            (json!({"priority": "x"}), Some("unrecognized type: int32")),
            (json!({"priority": 1.5}), Some("cannot convert float64 to int32")),
            (json!({"hostNetwork": 1}), Some("unrecognized type: bool")),
            (json!({"hostNetwork": true, "containers": [{"resources": {"limits": {"cpu": "x"}}}]}), None),
        ] {
            assert_eq!(restore_error(pod, &json!({"spec": spec})).as_deref(), want, "{spec}");
        }
    }
}
