//! The JSONPath of columns, selectable fields and scale: `.a.b['c.d'].e[0]`, `[*]`, `[?(@.type=="Ready")]`, `..` excepted.

use serde_json::Value;

/// One step.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    Field(String),
    Index(i64),
    All,
    /// `[?(@.path==value)]`; `None` asks for existence.
    Filter(Vec<Step>, Option<(bool, Value)>),
}

/// A compiled path.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct JsonPath(Vec<Step>);

impl JsonPath {
    /// Parses; a leading dot is optional.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        steps(text.trim().trim_start_matches('{').trim_end_matches('}').trim_start_matches('$')).map(Self)
    }

    /// Everything the path finds.
    pub(crate) fn find<'v>(&self, value: &'v Value) -> Vec<&'v Value> {
        let mut found = vec![value];
        for step in &self.0 {
            found = found.into_iter().flat_map(|v| apply(step, v)).collect();
        }
        found
    }

    /// The first thing the path finds.
    pub(crate) fn first<'v>(&self, value: &'v Value) -> Option<&'v Value> {
        self.find(value).into_iter().next()
    }

    /// Sets a value at a path of plain fields, creating objects on the way.
    pub(crate) fn set(&self, value: &mut Value, new: Value) {
        let mut at = value;
        for step in &self.0 {
            let Step::Field(name) = step else { return };
            if !at.is_object() {
                *at = Value::Object(serde_json::Map::new());
            }
            at = &mut at[name.as_str()];
        }
        *at = new;
    }
}

fn apply<'v>(step: &Step, value: &'v Value) -> Vec<&'v Value> {
    match step {
        Step::Field(name) => value.get(name).into_iter().collect(),
        Step::Index(index) => {
            let Some(items) = value.as_array() else { return Vec::new() };
            let at = if *index < 0 { items.len() as i64 + index } else { *index };
            usize::try_from(at).ok().and_then(|at| items.get(at)).into_iter().collect()
        }
        Step::All => match value {
            Value::Array(items) => items.iter().collect(),
            Value::Object(map) => map.values().collect(),
            _ => Vec::new(),
        },
        Step::Filter(path, wanted) => {
            let matches = |item: &&Value| {
                let mut found = vec![*item];
                for step in path {
                    found = found.into_iter().flat_map(|v| apply(step, v)).collect();
                }
                match wanted {
                    None => !found.is_empty(),
                    Some((equal, value)) => found.first().is_some_and(|f| (*f == value) == *equal),
                }
            };
            value.as_array().into_iter().flatten().filter(matches).collect()
        }
    }
}

fn steps(mut text: &str) -> Option<Vec<Step>> {
    let mut out = Vec::new();
    while !text.is_empty() {
        if let Some(rest) = text.strip_prefix('[') {
            let end = closing(rest)?;
            out.push(bracket(rest[..end].trim())?);
            text = &rest[end + 1..];
            continue;
        }
        let rest = text.strip_prefix('.').unwrap_or(text);
        let mut name = String::new();
        let mut chars = rest.char_indices().peekable();
        let mut end = rest.len();
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' => name.extend(chars.next().map(|(_, c)| c)),
                '.' | '[' => {
                    end = at;
                    break;
                }
                c => name.push(c),
            }
        }
        match name.as_str() {
            "" if end == 0 && rest.starts_with('[') => {}
            "" => return None,
            "*" => out.push(Step::All),
            _ => out.push(Step::Field(name)),
        }
        text = &rest[end..];
    }
    Some(out)
}

/// Where the bracket ends that was opened before `text`.
fn closing(text: &str) -> Option<usize> {
    let (mut depth, mut quote) = (0, None);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, '[') => depth += 1,
            (None, ']') if depth == 0 => return Some(at),
            (None, ']') => depth -= 1,
            _ => {}
        }
    }
    None
}

fn bracket(text: &str) -> Option<Step> {
    if text == "*" || text == ":" {
        return Some(Step::All);
    }
    if let Some(quoted) = unquote(text) {
        return Some(Step::Field(quoted));
    }
    if let Some(filter) = text.strip_prefix("?(").and_then(|t| t.strip_suffix(')')) {
        let filter = filter.trim();
        for (operator, equal) in [("==", true), ("!=", false)] {
            if let Some((path, value)) = filter.split_once(operator) {
                let value = value.trim();
                let value = match unquote(value) {
                    Some(text) => Value::String(text),
                    None => serde_json::from_str(value).ok()?,
                };
                return Some(Step::Filter(steps(path.trim().strip_prefix('@')?)?, Some((equal, value))));
            }
        }
        return Some(Step::Filter(steps(filter.strip_prefix('@')?)?, None));
    }
    text.parse().ok().map(Step::Index)
}

fn unquote(text: &str) -> Option<String> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
    Some(inner.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn finds() {
        let v = json!({"a": {"b": [{"t": "x", "v": 1}, {"t": "y", "v": 2}]}, "m": {"x.y/z": "k"}});
        for (path, want) in [
            (".a.b[0].v", json!([1])),
            (".a.b[-1].v", json!([2])),
            (".a.b[*].v", json!([1, 2])),
            (".a.b[?(@.t==\"y\")].v", json!([2])),
            (".a.b[?(@.t!='y')].v", json!([1])),
            (".m['x.y/z']", json!(["k"])),
            (".m.x\\.y/z", json!(["k"])),
            (".nope.x", json!([])),
        ] {
            let found: Vec<Value> = JsonPath::parse(path).unwrap().find(&v).into_iter().cloned().collect();
            assert_eq!(Value::from(found), want, "{path}");
        }
        assert_eq!(JsonPath::parse(".a..b"), None);
    }

    #[test]
    fn sets() {
        let mut v = json!({});
        JsonPath::parse(".spec.replicas").unwrap().set(&mut v, 3.into());
        assert_eq!(v, json!({"spec": {"replicas": 3}}));
    }
}
