//! The type of an expression, or everything that is wrong with it, in upstream's words.

use std::collections::HashMap;

use kube_cel::cel::common::ast::{
    CallExpr, EntryExpr, Expr, IdedExpr, LiteralValue, SelectExpr, StructExpr, operators,
};

use super::{
    Environment,
    parse::{Issue, Parsed, path},
    signatures::{self, Signature},
    types::Type,
};

/// What is known of an expression without evaluating it.
pub(super) struct Checked {
    /// Its type.
    pub(super) output: Type,
    /// The types of its nodes by their ids.
    pub(super) types: HashMap<u64, Type>,
    /// What its calls may call; macros are not among them.
    pub(super) calls: HashMap<u64, Call>,
}

/// A call.
pub(super) struct Call {
    /// With the dots of its name.
    pub(super) function: String,
    /// Called on a value.
    pub(super) method: bool,
    /// The overloads that fit the arguments.
    pub(super) overloads: Vec<&'static Signature>,
}

/// Checks a parsed expression.
pub(super) fn check(environment: &Environment, parsed: &Parsed) -> Result<Checked, Vec<Issue>> {
    let mut checker = Checker {
        environment,
        places: &parsed.places,
        locals: Vec::new(),
        issues: Vec::new(),
        mixed: 0,
        types: HashMap::new(),
        calls: HashMap::new(),
    };
    let output = checker.expr(&parsed.root);
    if checker.issues.is_empty() {
        return Ok(Checked { output, types: checker.types, calls: checker.calls });
    }
    let mut issues = checker.issues;
    issues.sort();
    issues.dedup();
    Err(issues)
}

struct Checker<'e> {
    environment: &'e Environment,
    places: &'e [usize],
    locals: Vec<(String, Type)>,
    issues: Vec<Issue>,
    /// Inside arguments of `format`, where literals may mix types.
    mixed: usize,
    types: HashMap<u64, Type>,
    calls: HashMap<u64, Call>,
}

/// What type parameters stand for.
type Bindings = HashMap<char, Type>;

/// Whether a value of type `given` can be where `wanted` is.
fn fits(wanted: &Type, given: &Type, bindings: &mut Bindings) -> bool {
    match (wanted, given) {
        (Type::Param(name), given) => match bindings.get(name).cloned() {
            Some(bound) if given.is_dyn() || bound.is_dyn() => {
                bindings.insert(*name, Type::Dyn);
                true
            }
            Some(bound) => joined(&bound, given).map(|joint| bindings.insert(*name, joint)).is_some(),
            None => {
                bindings.insert(*name, given.clone());
                true
            }
        },
        (wanted, Type::Dyn | Type::Error) => {
            // What is inside is unknown too.
            open(wanted, bindings);
            true
        }
        (Type::Dyn | Type::Error, _) | (_, Type::Param(_)) => true,
        (Type::List(a), Type::List(b)) | (Type::Optional(a), Type::Optional(b)) | (Type::Meta(a), Type::Meta(b)) => {
            fits(a, b, bindings)
        }
        (Type::Map(a, x), Type::Map(b, y)) => fits(a, b, bindings) && fits(x, y, bindings),
        (Type::Object(a), Type::Object(b)) => a.name == b.name,
        (a, b) => a == b,
    }
}

/// Binds every parameter below to dyn.
fn open(wanted: &Type, bindings: &mut Bindings) {
    match wanted {
        Type::Param(name) => drop(bindings.entry(*name).or_insert(Type::Dyn)),
        Type::List(a) | Type::Optional(a) | Type::Meta(a) => open(a, bindings),
        Type::Map(a, b) => {
            open(a, bindings);
            open(b, bindings);
        }
        _ => {}
    }
}

/// The type two values can both have.
fn joined(a: &Type, b: &Type) -> Option<Type> {
    match (a, b) {
        (a, b) if a == b => Some(a.clone()),
        (a, b) if a.is_dyn() || b.is_dyn() => Some(Type::Dyn),
        (Type::Param(_), other) | (other, Type::Param(_)) => Some(other.clone()),
        // Objects, messages and containers may be null.
        (Type::Null, other @ (Type::Object(_) | Type::Optional(_) | Type::Timestamp | Type::Duration))
        | (other @ (Type::Object(_) | Type::Optional(_) | Type::Timestamp | Type::Duration), Type::Null) => {
            Some(other.clone())
        }
        (Type::List(a), Type::List(b)) => Some(Type::list(joined(a, b)?)),
        (Type::Optional(a), Type::Optional(b)) => Some(Type::Optional(Box::new(joined(a, b)?))),
        (Type::Meta(_), Type::Meta(_)) => Some(Type::Meta(Box::new(Type::Dyn))),
        (Type::Map(a, x), Type::Map(b, y)) => Some(Type::Map(Box::new(joined(a, b)?), Box::new(joined(x, y)?))),
        (Type::Object(a), Type::Object(b)) if a.name == b.name => Some(Type::Object(a.clone())),
        _ => None,
    }
}

fn resolved(result: &Type, bindings: &Bindings) -> Type {
    let inner = |t: &Type| Box::new(resolved(t, bindings));
    match result {
        Type::Param(name) => bindings.get(name).cloned().unwrap_or(Type::Dyn),
        Type::List(a) => Type::List(inner(a)),
        Type::Optional(a) => Type::Optional(inner(a)),
        Type::Meta(a) => Type::Meta(inner(a)),
        Type::Map(a, b) => Type::Map(inner(a), inner(b)),
        other => other.clone(),
    }
}

/// The type a name stands for.
fn type_named(name: &str) -> Option<Type> {
    Some(match name {
        "bool" => Type::Bool,
        "int" => Type::Int,
        "uint" => Type::Uint,
        "double" => Type::Double,
        "string" => Type::String,
        "bytes" => Type::Bytes,
        "null_type" => Type::Null,
        "list" => Type::list(Type::Dyn),
        "map" => Type::Map(Box::new(Type::Dyn), Box::new(Type::Dyn)),
        "google.protobuf.Timestamp" => Type::Timestamp,
        "google.protobuf.Duration" => Type::Duration,
        _ => return None,
    })
}

impl Checker<'_> {
    fn issue(&mut self, expr: &IdedExpr, message: String) -> Type {
        self.issue_at(expr.id, message)
    }

    fn issue_at(&mut self, id: u64, message: String) -> Type {
        let at = usize::try_from(id).ok().and_then(|id| self.places.get(id)).copied().unwrap_or_default();
        self.issues.push(Issue { at, message });
        Type::Error
    }

    fn undeclared(&mut self, expr: &IdedExpr, name: &str) -> Type {
        self.issue(expr, format!("undeclared reference to '{name}' (in container '')"))
    }

    fn variable(&self, name: &str) -> Option<Type> {
        let local = self.locals.iter().rev().find(|(n, _)| n == name).map(|(_, t)| t.clone());
        local.or_else(|| self.environment.variable(name)).or_else(|| Some(Type::Meta(Box::new(type_named(name)?))))
    }

    fn expr(&mut self, expr: &IdedExpr) -> Type {
        let found = self.node(expr);
        self.types.insert(expr.id, found.clone());
        found
    }

    fn node(&mut self, expr: &IdedExpr) -> Type {
        match &expr.expr {
            Expr::Literal(literal) => literal_type(literal),
            Expr::Ident(name) => self.variable(name).unwrap_or_else(|| self.undeclared(expr, name)),
            Expr::Select(select) => self.select(expr, select),
            Expr::Call(call) => self.call(expr, call),
            Expr::List(list) => {
                let mut item = None;
                for (at, element) in list.elements.iter().enumerate() {
                    let mut found = self.expr(element);
                    if list.optional_indices.contains(&at) {
                        found = self.unwrapped(element, found);
                    }
                    item = Some(self.aggregated(element, item, found));
                }
                Type::list(item.unwrap_or(Type::Param('_')))
            }
            Expr::Map(map) => {
                let (mut keys, mut values) = (None, None);
                for entry in &map.entries {
                    let EntryExpr::MapEntry(entry) = &entry.expr else { continue };
                    let found = self.expr(&entry.key);
                    keys = Some(self.aggregated(&entry.key, keys, found));
                    let mut found = self.expr(&entry.value);
                    if entry.optional {
                        found = self.unwrapped(&entry.value, found);
                    }
                    values = Some(self.aggregated(&entry.value, values, found));
                }
                let open = || Type::Param('_');
                Type::Map(Box::new(keys.unwrap_or_else(open)), Box::new(values.unwrap_or_else(open)))
            }
            Expr::Struct(message) => self.message(expr, message),
            Expr::Comprehension(_) | Expr::Unspecified => Type::Error,
        }
    }

    /// Elements of a literal have one type.
    fn aggregated(&mut self, expr: &IdedExpr, before: Option<Type>, found: Type) -> Type {
        let Some(before) = before else { return found };
        match joined(&before, &found) {
            Some(joint) => joint,
            None if self.mixed > 0 => Type::Dyn,
            None => self.issue(expr, format!("expected type '{}' but found '{}'", before.brief(), found.brief())),
        }
    }

    fn unwrapped(&mut self, expr: &IdedExpr, found: Type) -> Type {
        match found {
            Type::Optional(inner) => *inner,
            found if found.is_dyn() => Type::Dyn,
            found => self.issue(expr, format!("expected type 'optional_type({0})' but found '{0}'", found.brief())),
        }
    }

    fn select(&mut self, expr: &IdedExpr, select: &SelectExpr) -> Type {
        // A qualified name comes before a field.
        let name = path(expr);
        if !name.is_empty()
            && !name.split('.').next().is_some_and(|first| self.locals.iter().any(|(n, _)| n == first))
            && let Some(found) =
                self.environment.variable(&name).or_else(|| type_named(&name).map(|t| Type::Meta(Box::new(t))))
        {
            return found;
        }
        let operand = self.expr(&select.operand);
        self.field(expr, &operand, &select.field)
    }

    fn field(&mut self, expr: &IdedExpr, operand: &Type, name: &str) -> Type {
        match operand {
            Type::Dyn | Type::Error | Type::Param(_) => operand.clone(),
            Type::Map(_, value) => (**value).clone(),
            Type::Optional(inner) => match self.field(expr, inner, name) {
                Type::Error => Type::Error,
                found => Type::Optional(Box::new(found)),
            },
            Type::Object(object) => match &object.fields {
                None => Type::Dyn,
                Some(fields) => match fields.get(name) {
                    Some(found) => found.clone(),
                    None => self.issue(expr, format!("undefined field '{name}'")),
                },
            },
            other => self.issue(expr, format!("type '{}' does not support field selection", other.brief())),
        }
    }

    fn message(&mut self, expr: &IdedExpr, message: &StructExpr) -> Type {
        let Some(found) = self.environment.message(&message.type_name) else {
            for entry in &message.entries {
                if let EntryExpr::StructField(field) = &entry.expr {
                    self.expr(&field.value);
                }
            }
            return self.undeclared(expr, &message.type_name);
        };
        for entry in &message.entries {
            let EntryExpr::StructField(field) = &entry.expr else { continue };
            let mut given = self.expr(&field.value);
            if field.optional {
                given = self.unwrapped(&field.value, given);
            }
            let Type::Object(object) = &found else { continue };
            let Some(fields) = &object.fields else { continue };
            match fields.get(&field.field) {
                None => drop(self.issue_at(entry.id, format!("undefined field '{}'", field.field))),
                Some(wanted) if !fits(wanted, &given, &mut Bindings::new()) => {
                    let message = format!(
                        "expected type of field '{}' is '{}' but provided type is '{}'",
                        field.field,
                        wanted.brief(),
                        given.brief()
                    );
                    self.issue_at(entry.id, message);
                }
                Some(_) => {}
            }
        }
        found
    }

    fn call(&mut self, expr: &IdedExpr, call: &CallExpr) -> Type {
        if call.func_name == operators::OPT_SELECT {
            return self.optional_select(expr, call);
        }
        if let Some(found) = self.looped(expr, call) {
            return found;
        }
        // A function with dots in its name.
        if let Some(target) = &call.target {
            let prefix = path(target);
            let whole = format!("{prefix}.{}", call.func_name);
            let declared = prefix.is_empty() || self.variable(&prefix).is_some();
            if !declared && let Some(overloads) = signatures::overloads(&whole) {
                let given: Vec<Type> = call.args.iter().map(|a| self.expr(a)).collect();
                return self.overload(expr, &whole, overloads, false, &given);
            }
        }
        let mixed = usize::from(call.func_name == "format");
        self.mixed += mixed;
        let given: Vec<Type> = call.target.iter().map(|t| &**t).chain(&call.args).map(|a| self.expr(a)).collect();
        self.mixed -= mixed;
        match signatures::overloads(&call.func_name) {
            Some(overloads) => self.overload(expr, &call.func_name, overloads, call.target.is_some(), &given),
            None => self.undeclared(expr, &call.func_name),
        }
    }

    fn optional_select(&mut self, expr: &IdedExpr, call: &CallExpr) -> Type {
        let operand = self.expr(&call.args[0]);
        let Expr::Literal(LiteralValue::String(name)) = &call.args[1].expr else { return Type::Error };
        match self.field(expr, &operand, name.inner()) {
            Type::Error => Type::Error,
            already @ Type::Optional(_) if matches!(operand, Type::Optional(_)) => already,
            found => Type::Optional(Box::new(found)),
        }
    }

    fn overload(
        &mut self,
        expr: &IdedExpr,
        name: &str,
        all: &'static [Signature],
        method: bool,
        given: &[Type],
    ) -> Type {
        if given.contains(&Type::Error) {
            // Said already.
            return Type::Error;
        }
        let mut result: Option<Type> = None;
        let mut overloads = Vec::new();
        for signature in all.iter().filter(|s| s.method == method && s.arguments.len() == given.len()) {
            let mut bindings = Bindings::new();
            if !signature.arguments.iter().zip(given).all(|(wanted, given)| fits(wanted, given, &mut bindings)) {
                continue;
            }
            overloads.push(signature);
            let found = resolved(&signature.result, &bindings);
            result = Some(match result {
                Some(before) if before != found => Type::Dyn,
                _ => found,
            });
        }
        self.calls.insert(expr.id, Call { function: name.to_owned(), method, overloads });
        result.unwrap_or_else(|| {
            let shown: Vec<String> = given.iter().map(Type::brief).collect();
            let applied = match (method, shown.split_first()) {
                (true, Some((target, rest))) => format!("{target}.({})", rest.join(", ")),
                _ => format!("({})", shown.join(", ")),
            };
            self.issue(expr, format!("found no matching overload for '{name}' applied to '{applied}'"))
        })
    }

    /// Macros: calls whose arguments see variables of their own.
    fn looped(&mut self, expr: &IdedExpr, call: &CallExpr) -> Option<Type> {
        let args = &call.args;
        let name = call.func_name.as_str();
        let Some(target) = &call.target else {
            if name != operators::HAS || args.len() != 1 {
                return None;
            }
            let Expr::Select(select) = &args[0].expr else {
                return Some(self.issue(&args[0], "invalid argument to has() macro".into()));
            };
            return Some(match self.select(&args[0], select) {
                Type::Error => Type::Error,
                _ => Type::Bool,
            });
        };
        if name == "bind" && args.len() == 3 && path(target) == "cel" {
            let Expr::Ident(variable) = &args[0].expr else {
                return Some(self.issue(&args[0], "cel.bind() variable names must be simple identifiers".into()));
            };
            let value = self.expr(&args[1]);
            return Some(self.within([(variable.clone(), value)], &args[2]));
        }
        let one = match (name, args.len()) {
            ("all" | "exists" | "exists_one" | "existsOne" | "filter" | "sortBy" | "optMap" | "optFlatMap", 2) => true,
            ("map", 2 | 3) => true,
            ("all" | "exists" | "existsOne" | "exists_one" | "transformList" | "transformMap", 3)
            | ("transformList" | "transformMap", 4) => false,
            _ => return None,
        };
        let range = self.expr(target);
        if let Some(inner) = name.strip_prefix("opt") {
            return Some(self.optional_map(target, &range, args, inner == "FlatMap"));
        }
        let variables = if one { 1 } else { 2 };
        let mut names = Vec::new();
        for arg in &args[..variables] {
            match &arg.expr {
                Expr::Ident(name) => names.push(name.clone()),
                _ => return Some(self.issue(arg, "argument must be a simple name".into())),
            }
        }
        let (key, value) = match &range {
            Type::List(item) => (Type::Int, (**item).clone()),
            Type::Map(key, value) => ((**key).clone(), (**value).clone()),
            range if range.is_dyn() => (Type::Dyn, Type::Dyn),
            other => {
                let message = format!(
                    "expression of type '{}' cannot be range of a comprehension (must be list, map, or dynamic)",
                    other.brief()
                );
                return Some(self.issue(target, message));
            }
        };
        let first = if one && matches!(range, Type::List(_)) { value.clone() } else { key.clone() };
        let first = if matches!(first, Type::Param(_)) { Type::Dyn } else { first };
        let mut scope = vec![(names[0].clone(), first.clone())];
        scope.extend(names.get(1).map(|n| (n.clone(), value.clone())));
        let bodies: Vec<Type> = args[variables..].iter().map(|body| self.within(scope.clone(), body)).collect();
        let bools = match name {
            "map" | "transformList" | "transformMap" => bodies.len() - 1,
            "sortBy" => 0,
            _ => 1,
        };
        for (body, found) in args[variables..].iter().zip(&bodies).take(bools) {
            if !found.is_dyn() && *found != Type::Bool {
                return Some(self.predicate(name, body, found));
            }
        }
        let _ = expr;
        let last = bodies.last().cloned().unwrap_or(Type::Dyn);
        Some(match name {
            "all" | "exists" | "exists_one" | "existsOne" => Type::Bool,
            "filter" => Type::list(first),
            "sortBy" => range,
            "transformMap" => Type::Map(Box::new(key), Box::new(last)),
            _ => Type::list(last),
        })
    }

    /// A body that should have been a condition: the macro's hidden call finds no overload.
    fn predicate(&mut self, name: &str, body: &IdedExpr, found: &Type) -> Type {
        let (function, arguments) = match name {
            "all" => ("_&&_", format!("(bool, {})", found.brief())),
            "exists" => ("_||_", format!("(bool, {})", found.brief())),
            _ => ("_?_:_", format!("({}, list(dyn), list(dyn))", found.brief())),
        };
        self.issue(body, format!("found no matching overload for '{function}' applied to '{arguments}'"))
    }

    fn optional_map(&mut self, target: &IdedExpr, range: &Type, args: &[IdedExpr], flat: bool) -> Type {
        let inner = match range {
            Type::Optional(inner) => (**inner).clone(),
            range if range.is_dyn() => Type::Dyn,
            other => {
                let message = format!("found no matching overload for 'hasValue' applied to '{}.()'", other.brief());
                return self.issue(target, message);
            }
        };
        let Expr::Ident(name) = &args[0].expr else {
            return self.issue(&args[0], "optMap() variable name must be a simple identifier".into());
        };
        match self.within([(name.clone(), inner)], &args[1]) {
            Type::Error => Type::Error,
            found if flat => found,
            found => Type::Optional(Box::new(found)),
        }
    }

    fn within(&mut self, scope: impl IntoIterator<Item = (String, Type)>, body: &IdedExpr) -> Type {
        let outer = self.locals.len();
        self.locals.extend(scope);
        let found = self.expr(body);
        self.locals.truncate(outer);
        found
    }
}

fn literal_type(literal: &LiteralValue) -> Type {
    match literal {
        LiteralValue::Boolean(_) => Type::Bool,
        LiteralValue::Bytes(_) => Type::Bytes,
        LiteralValue::Double(_) => Type::Double,
        LiteralValue::Int(_) => Type::Int,
        LiteralValue::Null => Type::Null,
        LiteralValue::String(_) => Type::String,
        LiteralValue::UInt(_) => Type::Uint,
    }
}
