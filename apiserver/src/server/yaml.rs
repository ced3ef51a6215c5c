//! Values as YAML the way upstream's serializer writes them: sorted keys, two-space indentation, double quotes only where
//! a plain scalar would be read as something else.

use std::fmt::Write;

use serde_json::Value;

/// Encodes a value as a YAML document.
pub(crate) fn encode(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => object(&mut out, map, 0),
        Value::Array(items) if !items.is_empty() => array(&mut out, items, 0),
        scalar => {
            inline(&mut out, scalar, 0);
            out.push('\n');
        }
    }
    out
}

fn object(out: &mut String, map: &serde_json::Map<String, Value>, indent: usize) {
    let mut keys: Vec<_> = map.keys().collect();
    keys.sort();
    for (at, key) in keys.into_iter().enumerate() {
        // The first member of a list item stands behind its dash.
        if at > 0 || !out.ends_with("- ") {
            out.extend(std::iter::repeat_n(' ', indent));
        }
        string(out, key, indent);
        out.push(':');
        member(out, &map[key], indent);
    }
}

fn member(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            object(out, map, indent + 2);
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('\n');
            array(out, items, indent);
        }
        scalar => {
            out.push(' ');
            inline(out, scalar, indent);
            out.push('\n');
        }
    }
}

fn array(out: &mut String, items: &[Value], indent: usize) {
    for item in items {
        if !out.ends_with("- ") {
            out.extend(std::iter::repeat_n(' ', indent));
        }
        out.push_str("- ");
        match item {
            Value::Object(map) if !map.is_empty() => object(out, map, indent + 2),
            Value::Array(items) if !items.is_empty() => array(out, items, indent + 2),
            scalar => {
                inline(out, scalar, indent);
                out.push('\n');
            }
        }
    }
}

fn inline(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => out.push_str(&n.to_string()),
        Value::String(s) => string(out, s, indent),
        Value::Array(_) => out.push_str("[]"),
        Value::Object(_) => out.push_str("{}"),
    }
}

fn string(out: &mut String, text: &str, indent: usize) {
    if text.contains('\n')
        && text.chars().all(|c| c == '\n' || c == '\t' || !c.is_control())
        && !text.starts_with([' ', '\n'])
    {
        literal(out, text, indent);
    } else if looks_typed(text) || text.chars().any(|c| c.is_control()) {
        double(out, text);
    } else if needs_quotes(text) {
        let _ = write!(out, "'{}'", text.replace('\'', "''"));
    } else {
        out.push_str(text);
    }
}

fn literal(out: &mut String, text: &str, indent: usize) {
    let body = text.trim_end_matches('\n');
    out.push_str(match text.len() - body.len() {
        0 => "|-",
        1 => "|",
        _ => "|+",
    });
    for line in text.strip_suffix('\n').unwrap_or(text).split('\n') {
        out.push('\n');
        if !line.is_empty() {
            out.extend(std::iter::repeat_n(' ', indent + 2));
            out.push_str(line);
        }
    }
}

fn double(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() => drop(write!(out, "\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Whether a plain scalar would be read as null, bool, number or time.
fn looks_typed(text: &str) -> bool {
    const WORDS: [&str; 11] = ["", "~", "null", "true", "false", "yes", "no", "on", "off", "y", "n"];
    let lower = text.to_ascii_lowercase();
    let digits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit() || b == b'_');
    let radix = ["0x", "0o", "0b"]
        .iter()
        .any(|p| lower.strip_prefix(p).is_some_and(|r| r.bytes().all(|b| b.is_ascii_hexdigit())));
    let number = lower.trim_start_matches(['-', '+']);
    let date = text.len() >= 10 && text.as_bytes()[4] == b'-' && text.as_bytes()[7] == b'-' && digits(&text[..4]);
    let sexagesimal = number.contains(':') && number.split(':').all(digits);
    WORDS.contains(&lower.as_str())
        || (number.starts_with(|c: char| c.is_ascii_digit() || c == '.') && number.parse::<f64>().is_ok())
        || digits(number)
        || matches!(number, ".inf" | ".nan")
        || text == "<<"
        || text == "="
        || radix
        || date
        || sexagesimal
}

fn needs_quotes(text: &str) -> bool {
    let first = text.chars().next().unwrap_or(' ');
    let second = text.chars().nth(1);
    (",[]{}#&*!|>'\"%@`".contains(first))
        || ("-?:".contains(first) && second.is_none_or(|c| c == ' '))
        || text.starts_with("---")
        || text.starts_with("...")
        || text.starts_with(' ')
        || text.ends_with([' ', ':'])
        || text.contains(": ")
        || text.contains(" #")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn documents() {
        let value = json!({"b": {"c": [{"x": 1, "a": "2"}, ["k"], {}], "e": []}, "a": "2024-01-01T00:00:00Z", "s": "- x",
            "t": "a\nb\n", "n": null, "w": "yes", ".": {}, "k:{\"a\":1}": {}, "v": "a: b", "f": "1.5"});
        let expected = ".: {}\na: \"2024-01-01T00:00:00Z\"\nb:\n  c:\n  - a: \"2\"\n    x: 1\n  - - k\n  - {}\n  e: []\nf: \"1.5\"\nk:{\"a\":1}: {}\n\"n\": null\ns: '- x'\nt: |\n  a\n  b\nv: 'a: b'\nw: \"yes\"\n";
        assert_eq!(encode(&value), expected);
    }

    #[test]
    fn reads_back() {
        for text in [
            "",
            "a",
            "0x1f",
            "1e3",
            "12:30:45",
            "null",
            "#x",
            "a #b",
            "x:",
            "'q'",
            "tab\there",
            "é",
            "-",
            "?",
            "a\n\n",
            " lead",
        ] {
            let value = json!({"k": text});
            let back: Value = serde_yaml_ng::from_str(&encode(&value)).unwrap();
            assert_eq!(back, value, "{text:?}");
        }
    }
}
