//! Field selectors: `metadata.name=a,status.phase!=Running`, with backslash escapes in values.

use std::fmt;

use super::{Labels, ParseError};

/// One term.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FieldRequirement {
    /// Field path as written.
    pub field: String,
    /// `true` for `=` and `==`, `false` for `!=`.
    pub equal: bool,
    /// Unescaped value.
    pub value: String,
}

/// A conjunction of terms; empty selects everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct FieldSelector(pub Vec<FieldRequirement>);

/// Splits at commas that are not escaped.
fn split_terms(text: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (i, c) in text.char_indices() {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if c == ',' {
            out.push(&text[start..i]);
            start = i + 1;
        }
    }
    out.push(&text[start..]);
    out
}

fn split_term(term: &str) -> Option<(&str, bool, &str)> {
    for (i, _) in term.char_indices() {
        let rest = &term[i..];
        for (operator, equal) in [("!=", false), ("==", true), ("=", true)] {
            if let Some(value) = rest.strip_prefix(operator) {
                return Some((&term[..i], equal, value));
            }
        }
    }
    None
}

fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(c @ ('\\' | ',' | '=')) => out.push(c),
                Some(c) => return Err(format!("invalid field selector: invalid escape sequence: \\{c}")),
                None => return Err("invalid field selector: invalid escape sequence: \\".into()),
            },
            ',' | '=' => return Err(format!("invalid field selector: unescaped character in value: {}", c as u32)),
            c => out.push(c),
        }
    }
    Ok(out)
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace(',', "\\,").replace('=', "\\=")
}

impl FieldSelector {
    /// Reads `fieldSelector=`.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut out = Vec::new();
        for term in split_terms(text).into_iter().filter(|t| !t.is_empty()) {
            let Some((field, equal, value)) = split_term(term) else {
                return Err(ParseError(format!("invalid selector: '{text}'; can't understand '{term}'")));
            };
            let value = unescape(value).map_err(ParseError)?;
            out.push(FieldRequirement { field: field.to_owned(), equal, value });
        }
        Ok(Self(out))
    }

    /// Whether it selects everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the fields satisfy it; a missing field reads as `""`.
    pub fn matches<L: Labels + ?Sized>(&self, fields: &L) -> bool {
        self.matches_with(|field| fields.get_label(field).unwrap_or_default().to_owned())
    }

    /// Whether the fields that `get` returns satisfy it.
    pub fn matches_with(&self, get: impl Fn(&str) -> String) -> bool {
        self.0.iter().all(|r| (get(&r.field) == r.value) == r.equal)
    }

    /// The value a field must have, when an equality term says so.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.0.iter().find(|r| r.equal && r.field == field).map(|r| r.value.as_str())
    }
}

impl fmt::Display for FieldSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, r) in self.0.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma}{}{}{}", r.field, if r.equal { "=" } else { "!=" }, escape(&r.value))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_matches() {
        let s = FieldSelector::parse(r"metadata.name=a\,b,,status.phase!=Running").unwrap();
        assert!(s.matches(&vec![("metadata.name", "a,b")]));
        assert!(!s.matches(&vec![("metadata.name", "a,b"), ("status.phase", "Running")]));
        assert_eq!(s.exact("metadata.name"), Some("a,b"));
        assert_eq!(s.to_string(), r"metadata.name=a\,b,status.phase!=Running");
    }

    #[test]
    fn errors() {
        for (text, want) in [
            ("a", "invalid selector: 'a'; can't understand 'a'"),
            (r"a=\x", r"invalid field selector: invalid escape sequence: \x"),
            ("a=b=c", "invalid field selector: unescaped character in value: 61"),
        ] {
            assert_eq!(FieldSelector::parse(text).unwrap_err().to_string(), want);
        }
    }
}
