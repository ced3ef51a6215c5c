//! From the text of an expression to its tree, with the place of every node.
//!
//! The cel crate's own parser expands macros and keeps no places, so what upstream says about types ("ERROR:
//! <input>:1:5: ...") could not be said. This one leaves macros as calls and messages as structs; [`super::lower`] makes
//! them fit for evaluation. The words for a syntax error are the crate's, which has upstream's grammar.

use kube_cel::cel::{
    common::ast::{
        CallExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr, ListExpr, LiteralValue, MapEntryExpr, MapExpr, SelectExpr,
        StructExpr, StructFieldExpr, operators,
    },
    parser::Parser as Grammar,
};

use super::lex::{Token, TokenKind, tokens};

/// Longest expression.
const TEXT_MAX: usize = 64 * 1024;
/// Deepest nesting: everything after this recurses.
const DEPTH_MAX: usize = 96;

/// A parsed expression.
#[derive(Debug)]
pub(super) struct Parsed {
    /// The tree; ids index `places`.
    pub(super) root: IdedExpr,
    /// Byte offset of every node.
    pub(super) places: Vec<usize>,
}

/// Something wrong at a byte offset.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Issue {
    /// Byte offset.
    pub(super) at: usize,
    /// What.
    pub(super) message: String,
}

/// Parses an expression.
pub(super) fn parse(text: &str) -> Result<Parsed, Vec<Issue>> {
    let own = |at, message: &str| vec![Issue { at, message: message.to_owned() }];
    if text.len() > TEXT_MAX {
        return Err(own(
            0,
            &format!("expression code point size exceeds limit: size: {}, limit {TEXT_MAX}", text.len()),
        ));
    }
    let failed = match tokens(text) {
        Ok(tokens) => {
            let mut parser = Parser { tokens: &tokens, at: 0, places: vec![0], depth: 0 };
            match parser.whole() {
                Ok(root) => return Ok(Parsed { root, places: parser.places }),
                Err(error) => error,
            }
        }
        Err(at) => Failure { at, deep: false },
    };
    if failed.deep {
        return Err(own(failed.at, &format!("expression recursion limit exceeded: {DEPTH_MAX}")));
    }
    Err(grammar(text).unwrap_or_else(|| own(failed.at, "Syntax error: unexpected input")))
}

/// What the crate's grammar says about a text.
fn grammar(text: &str) -> Option<Vec<Issue>> {
    let errors = Grammar::default().enable_optional_syntax(true).parse(text).err()?;
    let place = |(line, column): (isize, isize)| {
        let line = usize::try_from(line - 1).unwrap_or_default();
        let start: usize = text.split_inclusive('\n').take(line).map(str::len).sum();
        start + usize::try_from(column - 1).unwrap_or_default()
    };
    Some(errors.errors.iter().map(|e| Issue { at: place(e.pos), message: e.msg.clone() }).collect())
}

struct Failure {
    at: usize,
    deep: bool,
}

struct Parser<'t> {
    tokens: &'t [Token],
    at: usize,
    places: Vec<usize>,
    depth: usize,
}

type Parse<T> = Result<T, Failure>;

/// Binary operators by how tightly they bind.
static LEVELS: [&[(&str, &str)]; 3] = [
    &[
        ("<", operators::LESS),
        ("<=", operators::LESS_EQUALS),
        (">=", operators::GREATER_EQUALS),
        (">", operators::GREATER),
        ("==", operators::EQUALS),
        ("!=", operators::NOT_EQUALS),
        ("in", operators::IN),
    ],
    &[("+", operators::ADD), ("-", operators::SUBSTRACT)],
    &[("*", operators::MULTIPLY), ("/", operators::DIVIDE), ("%", operators::MODULO)],
];

impl Parser<'_> {
    fn place(&self) -> usize {
        self.tokens[self.at].at
    }

    fn fail<T>(&self) -> Parse<T> {
        Err(Failure { at: self.place(), deep: false })
    }

    fn symbol(&self) -> Option<&str> {
        match &self.tokens[self.at].kind {
            TokenKind::Symbol(text) => Some(text),
            _ => None,
        }
    }

    fn peek(&self, symbol: &str) -> bool {
        self.symbol() == Some(symbol)
    }

    fn take(&mut self, symbol: &str) -> bool {
        let found = self.peek(symbol);
        self.at += usize::from(found);
        found
    }

    fn need(&mut self, symbol: &str) -> Parse<()> {
        if self.take(symbol) { Ok(()) } else { self.fail() }
    }

    fn node(&mut self, at: usize, expr: Expr) -> IdedExpr {
        self.places.push(at);
        IdedExpr { id: (self.places.len() - 1) as u64, expr }
    }

    fn call(&mut self, at: usize, name: &str, target: Option<IdedExpr>, args: Vec<IdedExpr>) -> IdedExpr {
        self.node(at, Expr::Call(CallExpr { func_name: name.to_owned(), target: target.map(Box::new), args }))
    }

    fn whole(&mut self) -> Parse<IdedExpr> {
        let root = self.expr()?;
        if matches!(self.tokens[self.at].kind, TokenKind::End) { Ok(root) } else { self.fail() }
    }

    fn expr(&mut self) -> Parse<IdedExpr> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(Failure { at: self.place(), deep: true });
        }
        let first = self.either()?;
        let at = self.place();
        let expr = if self.take("?") {
            let yes = self.either()?;
            self.need(":")?;
            let no = self.expr()?;
            self.call(at, operators::CONDITIONAL, None, vec![first, yes, no])
        } else {
            first
        };
        self.depth -= 1;
        Ok(expr)
    }

    fn either(&mut self) -> Parse<IdedExpr> {
        let mut left = self.both()?;
        while self.peek("||") {
            let at = self.place();
            self.at += 1;
            let right = self.both()?;
            left = self.call(at, operators::LOGICAL_OR, None, vec![left, right]);
        }
        Ok(left)
    }

    fn both(&mut self) -> Parse<IdedExpr> {
        let mut left = self.binary(0)?;
        while self.peek("&&") {
            let at = self.place();
            self.at += 1;
            let right = self.binary(0)?;
            left = self.call(at, operators::LOGICAL_AND, None, vec![left, right]);
        }
        Ok(left)
    }

    fn binary(&mut self, level: usize) -> Parse<IdedExpr> {
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let mut left = self.binary(level + 1)?;
        while let Some((_, name)) = operators.iter().find(|(symbol, _)| self.peek(symbol)) {
            let at = self.place();
            self.at += 1;
            let right = self.binary(level + 1)?;
            left = self.call(at, name, None, vec![left, right]);
        }
        Ok(left)
    }

    fn unary(&mut self) -> Parse<IdedExpr> {
        for (symbol, name) in [("!", operators::LOGICAL_NOT), ("-", operators::NEGATE)] {
            if !self.peek(symbol) {
                continue;
            }
            let at = self.place();
            let from = self.at;
            while self.take(symbol) {}
            let times = self.at - from;
            if symbol == "-"
                && times % 2 == 1
                && let Some(literal) = self.negative()
            {
                let literal = self.node(at, Expr::Literal(literal));
                return self.selectors(literal);
            }
            let inner = self.member()?;
            return Ok(if times % 2 == 1 { self.call(at, name, None, vec![inner]) } else { inner });
        }
        self.member()
    }

    /// A number right behind a minus.
    fn negative(&mut self) -> Option<LiteralValue> {
        let literal = match &self.tokens[self.at].kind {
            TokenKind::Int(digits) => LiteralValue::Int(super::lex::integer(digits, true)?.into()),
            TokenKind::Double(number) => LiteralValue::Double((-*number).into()),
            _ => return None,
        };
        self.at += 1;
        Some(literal)
    }

    fn member(&mut self) -> Parse<IdedExpr> {
        let first = self.primary()?;
        self.selectors(first)
    }

    fn selectors(&mut self, mut expr: IdedExpr) -> Parse<IdedExpr> {
        let mut links = 0;
        loop {
            links += 1;
            if links > 2 * DEPTH_MAX {
                return Err(Failure { at: self.place(), deep: true });
            }
            let at = self.place();
            if self.take(".") {
                let optional = self.take("?");
                let name = self.name()?;
                let opening = self.place();
                expr = if optional {
                    let field = self.node(at, Expr::Literal(LiteralValue::String(name.as_str().into())));
                    self.call(at, operators::OPT_SELECT, None, vec![expr, field])
                } else if self.take("(") {
                    let args = self.list(")")?;
                    self.call(opening, &name, Some(expr), args)
                } else if self.peek("{") && is_path(&expr) {
                    let type_name = format!("{}.{name}", path(&expr));
                    self.message(opening, type_name)?
                } else {
                    self.node(at, Expr::Select(SelectExpr { operand: Box::new(expr), field: name, test: false }))
                };
            } else if self.take("[") {
                let name = if self.take("?") { operators::OPT_INDEX } else { operators::INDEX };
                let index = self.expr()?;
                self.need("]")?;
                expr = self.call(at, name, None, vec![expr, index]);
            } else {
                return Ok(expr);
            }
        }
    }

    fn name(&mut self) -> Parse<String> {
        match &self.tokens[self.at].kind {
            TokenKind::Name(name) | TokenKind::Quoted(name) => {
                let name = name.clone();
                self.at += 1;
                Ok(name)
            }
            _ => self.fail(),
        }
    }

    fn primary(&mut self) -> Parse<IdedExpr> {
        let at = self.place();
        if self.take("(") {
            let inner = self.expr()?;
            self.need(")")?;
            return Ok(inner);
        }
        if self.take("[") {
            return self.list_literal(at);
        }
        if self.take("{") {
            return self.map_literal(at);
        }
        self.take(".");
        if let Some(literal) = self.literal()? {
            return Ok(self.node(at, Expr::Literal(literal)));
        }
        let name = match &self.tokens[self.at].kind {
            TokenKind::Name(name) if !super::lex::RESERVED.contains(&name.as_str()) => name.clone(),
            _ => return self.fail(),
        };
        self.at += 1;
        let opening = self.place();
        if self.take("(") {
            let args = self.list(")")?;
            return Ok(self.call(opening, &name, None, args));
        }
        if self.peek("{") {
            return self.message(opening, name);
        }
        Ok(self.node(at, Expr::Ident(name)))
    }

    fn literal(&mut self) -> Parse<Option<LiteralValue>> {
        let literal = match &self.tokens[self.at].kind {
            TokenKind::Int(digits) => match super::lex::integer(digits, false) {
                Some(number) => LiteralValue::Int(number.into()),
                None => return self.fail(),
            },
            TokenKind::Uint(number) => LiteralValue::UInt((*number).into()),
            TokenKind::Double(number) => LiteralValue::Double((*number).into()),
            TokenKind::Text(text) => LiteralValue::String(text.as_str().into()),
            TokenKind::Bytes(bytes) => LiteralValue::Bytes(bytes.clone().into()),
            TokenKind::Symbol(word) => match word.as_str() {
                "true" => LiteralValue::Boolean(true.into()),
                "false" => LiteralValue::Boolean(false.into()),
                "null" => LiteralValue::Null,
                _ => return Ok(None),
            },
            _ => return Ok(None),
        };
        self.at += 1;
        Ok(Some(literal))
    }

    fn list(&mut self, close: &str) -> Parse<Vec<IdedExpr>> {
        let mut items = Vec::new();
        if self.take(close) {
            return Ok(items);
        }
        loop {
            items.push(self.expr()?);
            if !self.take(",") {
                self.need(close)?;
                return Ok(items);
            }
        }
    }

    fn list_literal(&mut self, at: usize) -> Parse<IdedExpr> {
        let (mut elements, mut optional_indices) = (Vec::new(), Vec::new());
        while !self.take("]") {
            if self.take("?") {
                optional_indices.push(elements.len());
            }
            elements.push(self.expr()?);
            if !self.take(",") {
                self.need("]")?;
                break;
            }
        }
        Ok(self.node(at, Expr::List(ListExpr { elements, optional_indices })))
    }

    fn map_literal(&mut self, at: usize) -> Parse<IdedExpr> {
        let mut entries = Vec::new();
        while !self.take("}") {
            let optional = self.take("?");
            let key = self.expr()?;
            let colon = self.place();
            self.need(":")?;
            let value = self.expr()?;
            self.places.push(colon);
            let id = (self.places.len() - 1) as u64;
            entries.push(IdedEntryExpr { id, expr: EntryExpr::MapEntry(MapEntryExpr { key, value, optional }) });
            if !self.take(",") {
                self.need("}")?;
                break;
            }
        }
        Ok(self.node(at, Expr::Map(MapExpr { entries })))
    }

    fn message(&mut self, at: usize, type_name: String) -> Parse<IdedExpr> {
        self.need("{")?;
        let mut entries = Vec::new();
        while !self.take("}") {
            let optional = self.take("?");
            let field = self.name()?;
            let colon = self.place();
            self.need(":")?;
            let value = self.expr()?;
            self.places.push(colon);
            let id = (self.places.len() - 1) as u64;
            let entry = StructFieldExpr { field, value, optional };
            entries.push(IdedEntryExpr { id, expr: EntryExpr::StructField(entry) });
            if !self.take(",") {
                self.need("}")?;
                break;
            }
        }
        Ok(self.node(at, Expr::Struct(StructExpr { type_name, entries })))
    }
}

fn is_path(expr: &IdedExpr) -> bool {
    match &expr.expr {
        Expr::Ident(_) => true,
        Expr::Select(select) => !select.test && is_path(&select.operand),
        _ => false,
    }
}

/// `a.b.c` of selections on an identifier; empty for anything else.
pub(super) fn path(expr: &IdedExpr) -> String {
    match &expr.expr {
        Expr::Ident(name) => name.clone(),
        Expr::Select(select) if !select.test => match path(&select.operand) {
            prefix if prefix.is_empty() => prefix,
            prefix => format!("{prefix}.{}", select.field),
        },
        _ => String::new(),
    }
}
