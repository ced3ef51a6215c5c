//! The grammar of label selector strings.

use super::{Operator, Requirement};
use crate::{
    field::{self, Error, Path},
    names,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    End,
    Error,
    Identifier,
    CloseParen,
    Comma,
    Not,
    DoubleEquals,
    Equals,
    Greater,
    In,
    Less,
    NotEquals,
    NotIn,
    OpenParen,
}

fn symbol(s: &str) -> Option<Token> {
    Some(match s {
        ")" => Token::CloseParen,
        "," => Token::Comma,
        "!" => Token::Not,
        "==" => Token::DoubleEquals,
        "=" => Token::Equals,
        ">" => Token::Greater,
        "<" => Token::Less,
        "!=" => Token::NotEquals,
        "(" => Token::OpenParen,
        _ => return None,
    })
}

fn is_special(c: char) -> bool {
    matches!(c, '=' | '!' | '(' | ')' | ',' | '>' | '<')
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\n')
}

fn scan(text: &str) -> Vec<(Token, String)> {
    let mut out = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(is_space);
        let Some(first) = rest.chars().next() else {
            out.push((Token::End, String::new()));
            return out;
        };
        if !is_special(first) {
            let end = rest.find(|c| is_special(c) || is_space(c)).unwrap_or(rest.len());
            let word = &rest[..end];
            let token = match word {
                "in" => Token::In,
                "notin" => Token::NotIn,
                _ => Token::Identifier,
            };
            out.push((token, word.to_owned()));
            rest = &rest[end..];
            continue;
        }
        // Every single special character is a token of its own; two of them may be a longer one.
        let len = if rest.get(..2).and_then(symbol).is_some() { 2 } else { 1 };
        out.push((symbol(&rest[..len]).unwrap_or(Token::Error), rest[..len].to_owned()));
        rest = &rest[len..];
    }
}

struct Parser {
    tokens: Vec<(Token, String)>,
    position: usize,
}

pub(super) fn parse(text: &str) -> Result<Vec<Requirement>, String> {
    let mut parser = Parser { tokens: scan(text), position: 0 };
    let mut out = Vec::new();
    loop {
        let (token, literal) = parser.peek();
        match token {
            Token::Identifier | Token::Not => {
                out.push(parser.requirement().map_err(|e| format!("unable to parse requirement: {e}"))?);
                let (token, literal) = parser.next();
                match token {
                    Token::End => return Ok(out),
                    Token::Comma => {
                        let (token, literal) = parser.peek();
                        if !matches!(token, Token::Identifier | Token::Not) {
                            return Err(format!("found '{literal}', expected: identifier after ','"));
                        }
                    }
                    _ => return Err(format!("found '{literal}', expected: ',' or 'end of string'")),
                }
            }
            Token::End => return Ok(out),
            _ => return Err(format!("found '{literal}', expected: !, identifier, or 'end of string'")),
        }
    }
}

impl Parser {
    /// The next token where `in` and `notin` are plain words.
    fn peek(&self) -> (Token, String) {
        let (token, literal) = self.raw();
        (if matches!(token, Token::In | Token::NotIn) { Token::Identifier } else { token }, literal)
    }

    fn raw(&self) -> (Token, String) {
        self.tokens.get(self.position).cloned().unwrap_or((Token::End, String::new()))
    }

    fn next(&mut self) -> (Token, String) {
        let out = self.peek();
        self.position += 1;
        out
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let (mut token, mut key) = self.next();
        let negated = token == Token::Not;
        if negated {
            (token, key) = self.next();
        }
        if token != Token::Identifier {
            return Err(format!("found '{key}', expected: identifier"));
        }
        let problems = names::qualified_name(&key);
        if !problems.is_empty() {
            return Err(Error::invalid(&Path::nil(), &key, problems.join("; ")).to_string());
        }
        let operator = if negated {
            Some(Operator::DoesNotExist)
        } else if matches!(self.peek().0, Token::End | Token::Comma) {
            Some(Operator::Exists)
        } else {
            None
        };
        let (operator, values) = match operator {
            Some(operator) => (operator, Vec::new()),
            None => {
                let operator = self.operator()?;
                let values = match operator {
                    Operator::In | Operator::NotIn => self.values()?,
                    _ => vec![self.exact_value()?],
                };
                (operator, values)
            }
        };
        Requirement::new(&key, operator, values, &Path::nil()).map_err(|errors| field::aggregate(&errors))
    }

    fn operator(&mut self) -> Result<Operator, String> {
        let (token, literal) = self.raw();
        self.position += 1;
        Ok(match token {
            Token::In => Operator::In,
            Token::Equals => Operator::Equals,
            Token::DoubleEquals => Operator::DoubleEquals,
            Token::Greater => Operator::Gt,
            Token::Less => Operator::Lt,
            Token::NotIn => Operator::NotIn,
            Token::NotEquals => Operator::NotEquals,
            _ => return Err(format!("found '{literal}', expected: in, notin, =, ==, !=, gt, lt")),
        })
    }

    fn values(&mut self) -> Result<Vec<String>, String> {
        let (token, literal) = self.next();
        if token != Token::OpenParen {
            return Err(format!("found '{literal}' expected: '('"));
        }
        let (token, literal) = self.peek();
        match token {
            Token::Identifier | Token::Comma => {
                let out = self.list()?;
                let (token, literal) = self.next();
                if token != Token::CloseParen {
                    return Err(format!("found '{literal}', expected: ')'"));
                }
                Ok(out)
            }
            Token::CloseParen => {
                self.next();
                Ok(vec![String::new()])
            }
            _ => Err(format!("found '{literal}', expected: ',', ')' or identifier")),
        }
    }

    fn list(&mut self) -> Result<Vec<String>, String> {
        let mut out = Vec::new();
        loop {
            let (token, literal) = self.next();
            match token {
                Token::Identifier => {
                    out.push(literal);
                    let (token, literal) = self.peek();
                    match token {
                        Token::Comma => {}
                        Token::CloseParen => return Ok(out),
                        _ => return Err(format!("found '{literal}', expected: ',' or ')'")),
                    }
                }
                Token::Comma => {
                    if out.is_empty() {
                        out.push(String::new());
                    }
                    let (token, _) = self.peek();
                    if token == Token::CloseParen {
                        out.push(String::new());
                        return Ok(out);
                    }
                    if token == Token::Comma {
                        self.next();
                        out.push(String::new());
                    }
                }
                _ => return Err(format!("found '{literal}', expected: ',', or identifier")),
            }
        }
    }

    fn exact_value(&mut self) -> Result<String, String> {
        if matches!(self.peek().0, Token::End | Token::Comma) {
            return Ok(String::new());
        }
        let (token, literal) = self.next();
        if token == Token::Identifier { Ok(literal) } else { Err(format!("found '{literal}', expected: identifier")) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Requirements;
    use serde_json::json;

    #[test]
    fn matches() {
        for (selector, labels, want) in [
            ("a=x", json!({"a": "x"}), true),
            ("a==x,b!=y", json!({"a": "x"}), true),
            ("a in (x, y)", json!({"a": "y"}), true),
            ("a notin (x)", json!({}), true),
            ("a in ()", json!({"a": ""}), true),
            ("!a", json!({"a": ""}), false),
            ("a", json!({"a": ""}), true),
            ("n>4", json!({"n": "5"}), true),
            ("n<4", json!({"n": "x"}), false),
            ("a=", json!({"a": ""}), true),
            ("in=in", json!({"in": "in"}), true),
            ("", json!({}), true),
        ] {
            assert_eq!(Requirements::parse(selector).unwrap().matches(&labels), want, "{selector}");
        }
    }

    #[test]
    fn errors() {
        for (selector, want) in [
            ("a b", "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt"),
            ("a in", "unable to parse requirement: found '' expected: '('"),
            ("a in (x", "unable to parse requirement: found '', expected: ',' or ')'"),
            ("=x", "found '=', expected: !, identifier, or 'end of string'"),
            ("a=b=c", "found '=', expected: ',' or 'end of string'"),
            ("!", "unable to parse requirement: found '', expected: identifier"),
            ("a,,b", "found ',', expected: identifier after ','"),
            ("a=bad value!", "found 'value', expected: ',' or 'end of string'"),
            (
                "a>x",
                "unable to parse requirement: values[0]: Invalid value: \"x\": for 'Gt', 'Lt' operators, the value must be an integer",
            ),
        ] {
            assert_eq!(Requirements::parse(selector).unwrap_err().to_string(), want, "{selector}");
        }
    }
}
