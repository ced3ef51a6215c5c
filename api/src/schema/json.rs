//! JSON text to [`Value`], remembering duplicate keys, with the errors Go's decoder gives.

use std::fmt;

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// How deep bodies may nest. Everything recurses into values, and serde_json reads 127 levels: what managedFields, lists and
/// watch events put around an object must fit, too.
pub const MAX_DEPTH: usize = 100;

/// A parsed document.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Parsed {
    /// The value; of duplicate keys the last one counts.
    pub value: Value,
    /// Paths of duplicate keys (`data.a`, `spec.x[0].b`), in document order.
    pub duplicates: Vec<String>,
}

/// Text that is not JSON; Display follows Go's wording.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub String);

/// Parses one JSON document.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Error> {
    let mut duplicates = Vec::new();
    let mut path = String::new();
    let mut de = serde_json::Deserializer::from_slice(bytes);
    let seed = Seed::new(&mut path, &mut duplicates);
    let value = seed.deserialize(&mut de).and_then(|v| de.end().map(|()| v));
    match value {
        Ok(value) => Ok(Parsed { value, duplicates }),
        Err(_) => Err(Error(syntax_error(bytes))),
    }
}

/// What Go calls the type of a value.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// How many arrays and objects are around the innermost value.
pub fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Builds a value from any self-describing format, noting duplicate keys.
pub(crate) struct Seed<'a> {
    path: &'a mut String,
    duplicates: &'a mut Vec<String>,
    depth: usize,
}

impl<'a> Seed<'a> {
    pub(crate) fn new(path: &'a mut String, duplicates: &'a mut Vec<String>) -> Self {
        Self { path, duplicates, depth: 0 }
    }

    /// For what is inside an array or object.
    fn inside<E: serde::de::Error>(&mut self) -> Result<(), E> {
        self.depth += 1;
        if self.depth > MAX_DEPTH { Err(E::custom("exceeded max depth")) } else { Ok(()) }
    }

    fn next(&mut self) -> Seed<'_> {
        Seed { path: self.path, duplicates: self.duplicates, depth: self.depth }
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    /// An empty document of YAML.
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Value, A::Error> {
        self.inside()?;
        let mut out = Vec::new();
        let len = self.path.len();
        loop {
            self.path.push_str(&format!("[{}]", out.len()));
            let item = seq.next_element_seed(self.next())?;
            self.path.truncate(len);
            match item {
                Some(item) => out.push(item),
                None => return Ok(Value::Array(out)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Value, A::Error> {
        self.inside()?;
        let mut out = Map::new();
        let len = self.path.len();
        while let Some(key) = map.next_key::<String>()? {
            if len > 0 {
                self.path.push('.');
            }
            self.path.push_str(&key);
            if out.contains_key(&key) {
                self.duplicates.push(self.path.clone());
            }
            let value = map.next_value_seed(self.next())?;
            self.path.truncate(len);
            out.insert(key, value);
        }
        Ok(Value::Object(out))
    }
}

/// Go's text for what is wrong: a scanner that only knows where the grammar breaks.
fn syntax_error(bytes: &[u8]) -> String {
    let mut scanner = Scanner { bytes, at: 0 };
    let result = scanner.value(0).and_then(|()| {
        scanner.space();
        match scanner.peek() {
            None => Ok(()),
            Some(c) => Err(unexpected(c, "after top-level value")),
        }
    });
    result.err().unwrap_or_else(|| "invalid JSON".into())
}

fn unexpected(c: u8, context: &str) -> String {
    let shown = match c {
        b'\'' => "'\\''".to_owned(),
        b'"' => "'\"'".to_owned(),
        c => {
            let quoted = crate::text::quote(&char::from(c).to_string());
            format!("'{}'", &quoted[1..quoted.len() - 1])
        }
    };
    format!("invalid character {shown} {context}")
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

const END: &str = "unexpected end of JSON input";

impl Scanner<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn next(&mut self) -> Result<u8, String> {
        self.space();
        let c = self.peek().ok_or(END)?;
        self.at += 1;
        Ok(c)
    }

    fn value(&mut self, depth: usize) -> Result<(), String> {
        let c = self.next()?;
        if matches!(c, b'{' | b'[') && depth == MAX_DEPTH {
            return Err(unexpected(c, "exceeded max depth"));
        }
        match c {
            b'{' => {
                self.space();
                if self.peek() == Some(b'}') {
                    self.at += 1;
                    return Ok(());
                }
                loop {
                    match self.next()? {
                        b'"' => self.string()?,
                        c => return Err(unexpected(c, "looking for beginning of object key string")),
                    }
                    match self.next()? {
                        b':' => self.value(depth + 1)?,
                        c => return Err(unexpected(c, "after object key")),
                    }
                    match self.next()? {
                        b',' => {}
                        b'}' => return Ok(()),
                        c => return Err(unexpected(c, "after object key:value pair")),
                    }
                }
            }
            b'[' => {
                self.space();
                if self.peek() == Some(b']') {
                    self.at += 1;
                    return Ok(());
                }
                loop {
                    self.value(depth + 1)?;
                    match self.next()? {
                        b',' => {}
                        b']' => return Ok(()),
                        c => return Err(unexpected(c, "after array element")),
                    }
                }
            }
            b'"' => self.string(),
            b't' => self.literal("true"),
            b'f' => self.literal("false"),
            b'n' => self.literal("null"),
            b'-' | b'0'..=b'9' => self.number(c),
            c => Err(unexpected(c, "looking for beginning of value")),
        }
    }

    fn literal(&mut self, word: &str) -> Result<(), String> {
        for want in word.bytes().skip(1) {
            let c = self.peek().ok_or(END)?;
            if c != want {
                return Err(unexpected(c, &format!("in literal {word} (expecting '{}')", char::from(want))));
            }
            self.at += 1;
        }
        Ok(())
    }

    fn string(&mut self) -> Result<(), String> {
        loop {
            let c = self.peek().ok_or(END)?;
            self.at += 1;
            match c {
                b'"' => return Ok(()),
                b'\\' => {
                    let c = self.peek().ok_or(END)?;
                    self.at += 1;
                    match c {
                        b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                        b'u' => {
                            for _ in 0..4 {
                                let c = self.peek().ok_or(END)?;
                                if !c.is_ascii_hexdigit() {
                                    return Err(unexpected(c, "in \\u hexadecimal character escape"));
                                }
                                self.at += 1;
                            }
                        }
                        c => return Err(unexpected(c, "in string escape code")),
                    }
                }
                c if c < 0x20 => return Err(unexpected(c, "in string literal")),
                _ => {}
            }
        }
    }

    fn number(&mut self, first: u8) -> Result<(), String> {
        let mut first = first;
        if first == b'-' {
            first = self.peek().ok_or(END)?;
            if !first.is_ascii_digit() {
                return Err(unexpected(first, "in numeric literal"));
            }
            self.at += 1;
        }
        let digits = |s: &mut Self| {
            while s.peek().is_some_and(|c| c.is_ascii_digit()) {
                s.at += 1;
            }
        };
        if first != b'0' {
            digits(self);
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            match self.peek().ok_or(END)? {
                c if c.is_ascii_digit() => digits(self),
                c => return Err(unexpected(c, "after decimal point in numeric literal")),
            }
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            match self.peek().ok_or(END)? {
                c if c.is_ascii_digit() => digits(self),
                c => return Err(unexpected(c, "in exponent of numeric literal")),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_duplicates() {
        let parsed = parse(br#"{"a":[{"b":1,"b":2}],"a.":1,"c":{"d":1,"d":1},"c":3}"#).unwrap();
        assert_eq!(parsed.duplicates, ["a[0].b", "c.d", "c"]);
        assert_eq!(parsed.value["a"][0]["b"], 2);
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |open: &str, close: &str, levels: usize| open.repeat(levels) + "1" + &close.repeat(levels);
        for (open, close, shown) in [("[", "]", '['), ("{\"a\":", "}", '{')] {
            let parsed = parse(nested(open, close, MAX_DEPTH).as_bytes()).unwrap();
            assert_eq!(depth(&parsed.value), MAX_DEPTH);
            for levels in [MAX_DEPTH + 1, 128, 10_000, 1_000_000] {
                let error = parse(nested(open, close, levels).as_bytes()).unwrap_err();
                assert_eq!(error.to_string(), format!("invalid character '{shown}' exceeded max depth"), "{levels}");
            }
            for levels in [MAX_DEPTH + 1, 1_000_000] {
                let error = crate::yaml::parse(&nested(open, close, levels)).unwrap_err();
                assert!(error.to_string().contains("exceeded max depth"), "{error}");
            }
        }
    }

    #[test]
    fn errors_like_go() {
        for (text, want) in [
            ("{", END),
            ("nope", "invalid character 'o' in literal null (expecting 'u')"),
            ("x", "invalid character 'x' looking for beginning of value"),
            ("{a:1}", "invalid character 'a' looking for beginning of object key string"),
            ("[1 2]", "invalid character '2' after array element"),
            ("1 1", "invalid character '1' after top-level value"),
            (r#"{"a" 1}"#, "invalid character '1' after object key"),
        ] {
            assert_eq!(parse(text.as_bytes()).unwrap_err().to_string(), want, "{text}");
        }
    }
}
