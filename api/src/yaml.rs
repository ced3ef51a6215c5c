//! YAML to [`Value`], as upstream converts it on the way in: keys become strings, the result is what the same document in
//! JSON would give.

use serde_json::{Map, Number, Value};
use serde_yaml_ng::Value as Yaml;

/// Text that is not YAML, or YAML that is not JSON.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub String);

/// Parses one document. Duplicate keys are an error.
pub fn parse(text: &str) -> Result<Value, Error> {
    let yaml: Yaml =
        serde_yaml_ng::from_str(text).map_err(|e| Error(format!("error converting YAML to JSON: yaml: {e}")))?;
    convert(yaml)
}

/// Parses all documents of a stream, skipping empty ones.
pub fn parse_all(text: &str) -> Result<Vec<Value>, Error> {
    let mut out = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let yaml: Yaml = serde::Deserialize::deserialize(document)
            .map_err(|e| Error(format!("error converting YAML to JSON: yaml: {e}")))?;
        let value = convert(yaml)?;
        if !value.is_null() {
            out.push(value);
        }
    }
    Ok(out)
}

fn convert(yaml: Yaml) -> Result<Value, Error> {
    Ok(match yaml {
        Yaml::Null => Value::Null,
        Yaml::Bool(b) => b.into(),
        Yaml::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(n), ..) => n.into(),
            (_, Some(n), _) => n.into(),
            (.., Some(f)) if f.fract() == 0.0 && f.abs() < 1e15 => (f as i64).into(),
            (.., Some(f)) => Number::from_f64(f).map(Value::Number).ok_or_else(|| Error(format!("{f} is not JSON")))?,
            _ => return Err(Error("a number that is not JSON".into())),
        },
        Yaml::String(s) => s.into(),
        Yaml::Sequence(items) => Value::Array(items.into_iter().map(convert).collect::<Result<_, _>>()?),
        Yaml::Mapping(map) => {
            let mut out = Map::new();
            for (key, value) in map {
                let key = match key {
                    Yaml::String(s) => s,
                    Yaml::Bool(b) => b.to_string(),
                    Yaml::Number(n) => n.to_string(),
                    _ => return Err(Error("a mapping key must be a scalar".into())),
                };
                out.insert(key, convert(value)?);
            }
            Value::Object(out)
        }
        Yaml::Tagged(tagged) => convert(tagged.value)?,
    })
}

/// Writes a value as YAML with sorted keys, as upstream answers `Accept: application/yaml`.
pub fn to_string(value: &Value) -> String {
    serde_yaml_ng::to_string(&sorted(value)).unwrap_or_default()
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().map(|(k, v)| (k.clone(), sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => items.iter().map(sorted).collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn converts() {
        assert_eq!(
            parse("a: 1\nb: [x, true, null]\n1: 0.5").unwrap(),
            json!({"a": 1, "b": ["x", true, null], "1": 0.5})
        );
        assert_eq!(parse_all("---\na: 1\n---\n---\nb: 2\n").unwrap(), [json!({"a": 1}), json!({"b": 2})]);
        assert_eq!(to_string(&json!({"b": 1, "a": "x"})), "a: x\nb: 1\n");
        assert!(parse("a: [").is_err());
    }
}
