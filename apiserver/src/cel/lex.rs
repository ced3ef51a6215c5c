//! Tokens of expressions.

/// Words that cannot be names.
pub(super) const RESERVED: [&str; 17] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
    "while",
];
const SYMBOLS: [&str; 27] = [
    "&&", "||", "==", "!=", "<=", ">=", "<", ">", "+", "-", "*", "/", "%", "!", "?", ":", ".", ",", "(", ")", "[", "]",
    "{", "}", "=", "&", "|",
];
/// Words that are tokens of their own.
pub(super) const WORDS: [&str; 4] = ["true", "false", "null", "in"];

/// One token.
#[derive(Debug)]
pub(super) struct Token {
    /// Byte offset.
    pub(super) at: usize,
    /// What it is.
    pub(super) kind: TokenKind,
}

/// The kinds of tokens.
#[derive(Debug)]
pub(super) enum TokenKind {
    /// Operator, bracket or a word of the grammar.
    Symbol(String),
    /// A name.
    Name(String),
    /// A field's name in backticks.
    Quoted(String),
    /// A number as written, without its sign.
    Int(String),
    /// `1u`.
    Uint(u64),
    /// `1.5`.
    Double(f64),
    /// A string.
    Text(String),
    /// `b'...'`.
    Bytes(Vec<u8>),
    /// The end.
    End,
}

/// The tokens of a text, or the offset of what is none.
pub(super) fn tokens(text: &str) -> Result<Vec<Token>, usize> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let first = rest.chars().next().unwrap_or(' ');
        if first.is_ascii_whitespace() {
            at += 1;
            continue;
        }
        if rest.starts_with("//") {
            at += rest.find('\n').unwrap_or(rest.len());
            continue;
        }
        let (kind, length) = token(rest, first).ok_or(at)?;
        out.push(Token { at, kind });
        at += length;
    }
    out.push(Token { at: text.len(), kind: TokenKind::End });
    Ok(out)
}

fn token(rest: &str, first: char) -> Option<(TokenKind, usize)> {
    if let Some(found) = quoted(rest) {
        return found;
    }
    let digit_behind_dot = rest.starts_with('.') && rest[1..].starts_with(|c: char| c.is_ascii_digit());
    if first.is_ascii_digit() || digit_behind_dot {
        return number(rest);
    }
    if first.is_ascii_alphabetic() || first == '_' {
        let length = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let word = rest[..length].to_owned();
        let kind = if WORDS.contains(&word.as_str()) { TokenKind::Symbol(word) } else { TokenKind::Name(word) };
        return Some((kind, length));
    }
    if let Some(inner) = rest.strip_prefix('`') {
        let end = inner.find('`')?;
        return Some((TokenKind::Quoted(inner[..end].to_owned()), end + 2));
    }
    let symbol = SYMBOLS.iter().find(|s| rest.starts_with(**s))?;
    Some((TokenKind::Symbol((*symbol).to_owned()), symbol.len()))
}

fn number(rest: &str) -> Option<(TokenKind, usize)> {
    let digits = |text: &str, hex: bool| {
        text.find(|c: char| if hex { !c.is_ascii_hexdigit() } else { !c.is_ascii_digit() }).unwrap_or(text.len())
    };
    let suffix = |length: usize| rest[length..].starts_with(['u', 'U']);
    if rest.starts_with("0x") || rest.starts_with("0X") {
        let length = 2 + digits(&rest[2..], true);
        if suffix(length) {
            return Some((TokenKind::Uint(u64::from_str_radix(&rest[2..length], 16).ok()?), length + 1));
        }
        return Some((TokenKind::Int(rest[..length].to_owned()), length));
    }
    let whole = digits(rest, false);
    let mut length = whole;
    if rest[length..].starts_with('.') && rest[length + 1..].starts_with(|c: char| c.is_ascii_digit()) {
        length += 1;
        length += digits(&rest[length..], false);
    }
    if rest[length..].starts_with(['e', 'E']) {
        let sign = usize::from(rest[length + 1..].starts_with(['+', '-']));
        let power = digits(&rest[length + 1 + sign..], false);
        if power > 0 {
            length += 1 + sign + power;
        }
    }
    if length > whole {
        return Some((TokenKind::Double(rest[..length].parse().ok()?), length));
    }
    if suffix(length) {
        return Some((TokenKind::Uint(rest[..length].parse().ok()?), length + 1));
    }
    Some((TokenKind::Int(rest[..length].to_owned()), length))
}

/// A whole number as written.
pub(super) fn integer(digits: &str, negative: bool) -> Option<i64> {
    let hex = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let size = match hex {
        Some(hex) => i128::from_str_radix(hex, 16).ok()?,
        None => digits.parse::<i128>().ok()?,
    };
    i64::try_from(if negative { -size } else { size }).ok()
}

/// A string or bytes literal; `Some(None)` when it starts like one but is none.
#[allow(clippy::option_option)]
fn quoted(rest: &str) -> Option<Option<(TokenKind, usize)>> {
    let prefix = rest.find(['\'', '"'])?;
    let marks = &rest[..prefix];
    if prefix > 2 || !marks.chars().all(|c| matches!(c, 'r' | 'R' | 'b' | 'B')) {
        return None;
    }
    let raw = marks.contains(['r', 'R']);
    let bytes = marks.contains(['b', 'B']);
    let body = &rest[prefix..];
    let single = &body[..1];
    let triple = single.repeat(3);
    let quote = if body.starts_with(&triple) { triple.as_str() } else { single };
    let inner = &body[quote.len()..];
    Some(literal(inner, quote, raw, bytes).map(|(kind, length)| (kind, prefix + 2 * quote.len() + length)))
}

fn literal(inner: &str, quote: &str, raw: bool, bytes: bool) -> Option<(TokenKind, usize)> {
    let mut out = Vec::new();
    let mut at = 0;
    loop {
        let rest = inner.get(at..)?;
        if rest.starts_with(quote) {
            break;
        }
        let c = rest.chars().next()?;
        if quote.len() == 1 && matches!(c, '\n' | '\r') {
            return None;
        }
        if c == '\\' && !raw {
            at += 1 + escape(&rest[1..], bytes, &mut out)?;
            continue;
        }
        let mut buffer = [0; 4];
        out.extend_from_slice(c.encode_utf8(&mut buffer).as_bytes());
        at += c.len_utf8();
    }
    let kind = if bytes { TokenKind::Bytes(out) } else { TokenKind::Text(String::from_utf8(out).ok()?) };
    Some((kind, at))
}

/// What follows a backslash; its length.
fn escape(rest: &str, bytes: bool, out: &mut Vec<u8>) -> Option<usize> {
    let c = rest.chars().next()?;
    let simple = match c {
        'a' => 7,
        'b' => 8,
        'f' => 12,
        'n' => b'\n',
        'r' => b'\r',
        't' => b'\t',
        'v' => 11,
        '\\' | '\'' | '"' | '`' | '?' => c as u8,
        _ => {
            let (skip, length, radix) = match c {
                'x' | 'X' => (1, 2, 16),
                'u' => (1, 4, 16),
                'U' => (1, 8, 16),
                '0'..='3' => (0, 3, 8),
                _ => return None,
            };
            let code = u32::from_str_radix(rest.get(skip..skip + length)?, radix).ok()?;
            match (bytes && !matches!(c, 'u' | 'U'), u8::try_from(code)) {
                (true, Ok(byte)) => out.push(byte),
                _ => {
                    let mut buffer = [0; 4];
                    out.extend_from_slice(char::from_u32(code)?.encode_utf8(&mut buffer).as_bytes());
                }
            }
            return Some(skip + length);
        }
    };
    out.push(simple);
    Some(1)
}
