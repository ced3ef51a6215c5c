//! YAML to [`Value`], as upstream converts it on the way in: keys become strings, the result is what the same document in
//! JSON would give.

use serde::de::DeserializeSeed;
use serde_json::Value;

use crate::schema::json::{MAX_DEPTH, Seed};

/// Brackets that may be open at once: the scanner looks at all of them for every token. Text in a document may have brackets
/// of its own that nobody closes, hence more than may nest.
const OPEN_MAX: usize = 5 * MAX_DEPTH;

/// Text that is not YAML, or YAML that is not JSON.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub String);

/// Parses one document; of duplicate keys the last one counts.
pub fn parse(text: &str) -> Result<Value, Error> {
    parse_strict(text).map(|(value, _)| value)
}

/// Parses the first document, as Go does (nothing at all is null), and reports duplicate keys the way strict field validation does:
/// `line 7: key "a" already set in map`.
pub fn parse_strict(text: &str) -> Result<(Value, Vec<String>), Error> {
    check_open(text)?;
    let (mut path, mut duplicates) = (String::new(), Vec::new());
    let seed = Seed::new(&mut path, &mut duplicates);
    let first = serde_yaml_ng::Deserializer::from_str(text).next();
    let value = first.map_or(Ok(Value::Null), |document| seed.deserialize(document)).map_err(|e| failure(&e))?;
    Ok((whole_numbers(value), duplicates.iter().map(|path| duplicate(text, path)).collect()))
}

fn check_open(text: &str) -> Result<(), Error> {
    let mut open = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > OPEN_MAX {
            return Err(Error("error converting YAML to JSON: yaml: exceeded max depth".into()));
        }
    }
    Ok(())
}

fn failure(error: &serde_yaml_ng::Error) -> Error {
    Error(format!("error converting YAML to JSON: yaml: {}", go_message(&error.to_string())))
}

/// The message as Go's parser words it: `line 3: did not find expected node content`. Ours names the place of the problem
/// and often that of its context (`PROBLEM at line 3 column 1, while parsing X at line 2 column 4`); Go names the line of
/// the context, or of the problem where the context begins in the first line.
fn go_message(text: &str) -> String {
    let line_of = |part: &str| -> Option<(usize, usize)> {
        let at = part.rfind(" at line ")?;
        let number = part[at + 9..].split(' ').next()?.parse().ok()?;
        Some((at, number))
    };
    let (problem, context) = text.split_once(", while ").unwrap_or((text, ""));
    let Some((end, line)) = line_of(problem) else { return text.to_owned() };
    let problem = &problem[..end];
    let context = line_of(context).map_or(0, |(_, line)| line - 1);
    // The scanner, unlike the parser, counts from one.
    let scanner = ["mapping values", "found ", "could not find expected"].iter().any(|s| problem.starts_with(s));
    let line = if context > 0 { context } else { line.saturating_sub(1) } + usize::from(scanner);
    if line == 0 { problem.to_owned() } else { format!("line {line}: {problem}") }
}

/// The line of the second occurrence of a key. The parser does not say where it was, so the text is searched.
fn duplicate(text: &str, path: &str) -> String {
    let key = path.rsplit('.').next().unwrap_or(path);
    let names_key = |line: &str| {
        let line = line.trim_start().trim_start_matches("- ");
        let line = line.trim_start_matches(['"', '\'']);
        line.strip_prefix(key).is_some_and(|rest| rest.trim_start_matches(['"', '\'']).trim_start().starts_with(':'))
    };
    let line = text.lines().enumerate().filter(|(_, line)| names_key(line)).nth(1).map_or(0, |(i, _)| i + 1);
    format!("line {line}: key {} already set in map", crate::text::quote(key))
}

/// `1.0` is 1 in the JSON that upstream makes of YAML.
fn whole_numbers(value: Value) -> Value {
    match value {
        Value::Number(n) => match n.as_f64() {
            Some(f) if n.is_f64() && f.fract() == 0.0 && f.abs() < 1e15 => (f as i64).into(),
            _ => Value::Number(n),
        },
        Value::Array(items) => items.into_iter().map(whole_numbers).collect(),
        Value::Object(map) => Value::Object(map.into_iter().map(|(k, v)| (k, whole_numbers(v))).collect()),
        other => other,
    }
}

/// Parses all documents of a stream, skipping empty ones.
pub fn parse_all(text: &str) -> Result<Vec<Value>, Error> {
    check_open(text)?;
    let mut out = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let value = Seed::new(&mut String::new(), &mut Vec::new()).deserialize(document).map_err(|e| failure(&e))?;
        if !value.is_null() {
            out.push(whole_numbers(value));
        }
    }
    Ok(out)
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
    fn the_first_document_counts() {
        for (text, want) in [
            ("a: 1\n---\nb: 2\n", json!({"a": 1})),
            ("", json!(null)),
            ("# none\n", json!(null)),
            ("---\na: ~\n...\n}", json!({"a": null})),
        ] {
            assert_eq!(parse(text), Ok(want), "{text:?}");
        }
    }

    #[test]
    fn errors_read_as_they_do_in_go() {
        for (text, want) in [
            (
                "did not find expected node content at line 2 column 1, while parsing a flow node",
                "line 1: did not find expected node content",
            ),
            (
                "mapping values are not allowed in this context at line 1 column 5",
                "line 1: mapping values are not allowed in this context",
            ),
            (
                "did not find expected key at line 4 column 2, while parsing a block mapping at line 3 column 1",
                "line 2: did not find expected key",
            ),
            ("something else", "something else"),
        ] {
            assert_eq!(go_message(text), want);
        }
    }

    #[test]
    fn converts() {
        assert_eq!(
            parse("a: 1\nb: [x, true, null]\n1: 0.5").unwrap(),
            json!({"a": 1, "b": ["x", true, null], "1": 0.5})
        );
        assert_eq!(parse_all("---\na: 1\n---\n---\nb: 2\n").unwrap(), [json!({"a": 1}), json!({"b": 2})]);
        assert_eq!(to_string(&json!({"b": 1, "a": "x"})), "a: x\nb: 1\n");
        assert!(parse("a: [").is_err());
        assert_eq!(parse("a: 2.0").unwrap(), json!({"a": 2}));
    }

    #[test]
    fn reports_duplicates() {
        let (value, duplicates) = parse_strict("kind: X\ndata:\n  a: \"1\"\n  a: \"2\"\n").unwrap();
        assert_eq!(value, json!({"kind": "X", "data": {"a": "2"}}));
        assert_eq!(duplicates, ["line 4: key \"a\" already set in map"]);
    }
}
