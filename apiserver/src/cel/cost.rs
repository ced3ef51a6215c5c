//! What an expression can cost at most, in upstream's units: CustomResourceDefinitions with rules that could cost too much
//! are refused before anything is evaluated.
//!
//! The numbers are those of upstream's estimator, which sees macros as the loops they stand for; here each has a formula.
//! Sizes of values come from [`Place`]s in a schema, from literals, and from what functions make of their arguments.

use std::collections::HashMap;

use kube_cel::cel::common::ast::{CallExpr, EntryExpr, Expr, IdedExpr, LiteralValue, operators};

use super::{
    check::{Call, Checked},
    sizes::Place,
    types::Type,
};

/// Making a list, a map, a message.
const LIST: u64 = 10;
const MAP: u64 = 30;
const MESSAGE: u64 = 40;
/// Reading one character.
const CHARACTER: f64 = 0.1;
/// One character of a regular expression.
const PATTERN: f64 = 0.25;
/// Asking the authorizer.
const AUTHORIZATION: u64 = 350_000;

/// How large a value is, at least and at most.
#[derive(Clone, Copy)]
struct Size {
    min: u64,
    max: u64,
}

impl Size {
    const UNKNOWN: Self = Self { min: 0, max: u64::MAX };

    fn exactly(size: u64) -> Self {
        Self { min: size, max: size }
    }

    fn plus(self, other: Self) -> Self {
        Self { min: self.min.saturating_add(other.min), max: self.max.saturating_add(other.max) }
    }

    fn times(self, other: Self) -> Self {
        Self { min: self.min.saturating_mul(other.min), max: self.max.saturating_mul(other.max) }
    }

    fn or(self, other: Self) -> Self {
        Self { min: self.min.min(other.min), max: self.max.max(other.max) }
    }

    /// The cost of going through it.
    fn read(self, factor: f64) -> u64 {
        scaled(self.max, factor)
    }
}

/// A product, rounded up. Casts of floats saturate.
fn scaled(size: u64, factor: f64) -> u64 {
    if size == u64::MAX { size } else { (size as f64 * factor).ceil() as u64 }
}

/// Sizes of the entries of a list or map.
#[derive(Clone, Copy)]
struct Entry {
    list: bool,
    key: Size,
    value: Size,
}

impl Entry {
    fn or(self, other: Self) -> Self {
        Self { list: self.list, key: self.key.or(other.key), value: self.value.or(other.value) }
    }
}

/// A name inside a macro.
#[derive(Clone, Copy, Default)]
struct Local<'s> {
    place: Option<Place<'s>>,
    size: Option<Size>,
    entry: Option<Entry>,
}

/// The most an expression over values of a schema can cost.
pub(super) fn estimate(root: &IdedExpr, checked: &Checked, own: Place<'_>) -> u64 {
    let mut coster = Coster {
        checked,
        own,
        locals: Vec::new(),
        places: HashMap::new(),
        sizes: HashMap::new(),
        entries: HashMap::new(),
    };
    coster.cost(root)
}

struct Coster<'c, 's> {
    checked: &'c Checked,
    /// Of `self` and `oldSelf`.
    own: Place<'s>,
    locals: Vec<(String, Local<'s>)>,
    places: HashMap<u64, Place<'s>>,
    sizes: HashMap<u64, Size>,
    entries: HashMap<u64, Entry>,
}

/// A sum that ends at the largest number.
fn sum(costs: impl IntoIterator<Item = u64>) -> u64 {
    costs.into_iter().fold(0, u64::saturating_add)
}

impl<'s> Coster<'_, 's> {
    fn cost(&mut self, expr: &IdedExpr) -> u64 {
        match &expr.expr {
            Expr::Literal(_) => 0,
            Expr::Ident(name) => {
                let place = self.local(name).map_or(Some(self.own), |local| local.place);
                self.places.extend(place.map(|place| (expr.id, place)));
                1
            }
            Expr::Select(select) => {
                let cost = self.cost(&select.operand);
                let place = self.place(&select.operand).and_then(|place| place.field(&select.field));
                self.places.extend(place.map(|place| (expr.id, place)));
                let counts =
                    matches!(self.found(&select.operand), Some(Type::Map(..) | Type::Object(_) | Type::Param(_)));
                cost.saturating_add(u64::from(counts))
            }
            Expr::Call(call) => self.call(expr, call),
            Expr::List(list) => {
                let cost = sum(list.elements.iter().map(|element| self.cost(element)));
                let value = self.any_of(list.elements.iter());
                self.entries.insert(expr.id, Entry { list: true, key: Size::exactly(1), value });
                cost.saturating_add(LIST)
            }
            Expr::Map(map) => {
                let entries = || {
                    map.entries.iter().filter_map(|entry| match &entry.expr {
                        EntryExpr::MapEntry(entry) => Some(entry),
                        EntryExpr::StructField(_) => None,
                    })
                };
                let cost = sum(entries().map(|entry| self.cost(&entry.key).saturating_add(self.cost(&entry.value))));
                let (key, value) = (self.any_of(entries().map(|e| &e.key)), self.any_of(entries().map(|e| &e.value)));
                self.entries.insert(expr.id, Entry { list: false, key, value });
                cost.saturating_add(MAP)
            }
            Expr::Struct(message) => {
                let fields = message.entries.iter().filter_map(|entry| match &entry.expr {
                    EntryExpr::StructField(field) => Some(&field.value),
                    EntryExpr::MapEntry(_) => None,
                });
                sum(fields.map(|value| self.cost(value))).saturating_add(MESSAGE)
            }
            Expr::Comprehension(_) | Expr::Unspecified => 0,
        }
    }

    fn local(&self, name: &str) -> Option<Local<'s>> {
        self.locals.iter().rev().find(|(own, _)| own == name).map(|(_, local)| *local)
    }

    fn place(&self, expr: &IdedExpr) -> Option<Place<'s>> {
        self.places.get(&expr.id).copied()
    }

    fn found(&self, expr: &IdedExpr) -> Option<&Type> {
        self.checked.types.get(&expr.id)
    }

    /// A size that holds for each.
    fn any_of<'e>(&self, exprs: impl Iterator<Item = &'e IdedExpr>) -> Size {
        exprs.map(|expr| self.size(expr)).reduce(Size::or).unwrap_or(Size::exactly(0))
    }

    fn size(&self, expr: &IdedExpr) -> Size {
        self.known(expr).unwrap_or(Size::UNKNOWN)
    }

    fn known(&self, expr: &IdedExpr) -> Option<Size> {
        let literal = || match &expr.expr {
            Expr::Literal(LiteralValue::String(text)) => Some(text.inner().chars().count()),
            Expr::Literal(LiteralValue::Bytes(bytes)) => Some(bytes.inner().len()),
            Expr::Literal(_) => Some(1),
            Expr::List(list) => Some(list.elements.len()),
            Expr::Map(map) => Some(map.entries.len()),
            _ => None,
        };
        let local = || match &expr.expr {
            Expr::Ident(name) => self.local(name)?.size,
            _ => None,
        };
        let own = self.sizes.get(&expr.id).copied();
        own.or_else(|| literal().map(|size| Size::exactly(size as u64)))
            .or_else(|| self.place(expr).map(|place| Size { min: 0, max: place.max() }))
            .or_else(|| self.found(expr).filter(|found| scalar(found)).map(|_| Size::exactly(1)))
            .or_else(local)
    }

    fn entry(&self, expr: &IdedExpr) -> Option<Entry> {
        let local = || match &expr.expr {
            Expr::Ident(name) => self.local(name)?.entry,
            _ => None,
        };
        self.entries.get(&expr.id).copied().or_else(local)
    }

    fn call(&mut self, expr: &IdedExpr, call: &CallExpr) -> u64 {
        let checked = self.checked;
        if let Some(resolved) = checked.calls.get(&expr.id) {
            let target = call.target.as_deref().filter(|_| resolved.method);
            return self.function(expr, resolved, target, &call.args);
        }
        match &call.target {
            Some(target) => self.looped(expr, &call.func_name, target, &call.args),
            // Looking whether there is a field is free.
            None if call.func_name == operators::HAS => match call.args.first().map(|arg| &arg.expr) {
                Some(Expr::Select(select)) => self.cost(&select.operand),
                _ => 0,
            },
            // `a.?b`.
            None => sum(call.args.iter().map(|arg| self.cost(arg))).saturating_add(1),
        }
    }

    fn function(&mut self, expr: &IdedExpr, call: &Call, target: Option<&IdedExpr>, args: &[IdedExpr]) -> u64 {
        let each: Vec<u64> = args.iter().map(|arg| self.cost(arg)).collect();
        let before = target.map_or(0, |target| self.cost(target));
        let arguments = match call.function.as_str() {
            "_?_:_" => each[0].saturating_add(each[1].max(each[2])),
            _ => sum(each),
        };
        let mut cost = 0;
        let mut made: Option<Size> = None;
        for signature in &call.overloads {
            let (own, size) = self.overload(expr, &call.function, &signature.arguments, target, args);
            cost = cost.max(own);
            made = size.map_or(made, |size| Some(made.map_or(size, |before| before.or(size))));
        }
        if let Some(size) = made {
            self.sizes.insert(expr.id, size);
        }
        if call.function == "dyn" {
            self.take_after(expr, &args[0]);
        }
        sum([before, arguments, cost])
    }

    /// The cost of one overload without its arguments, and the size of what it makes.
    fn overload(
        &mut self,
        expr: &IdedExpr,
        function: &str,
        types: &[Type],
        target: Option<&IdedExpr>,
        args: &[IdedExpr],
    ) -> (u64, Option<Size>) {
        // Methods have their target as first argument.
        let all: Vec<&IdedExpr> = target.into_iter().chain(args).collect();
        let sizes: Vec<Size> = all.iter().map(|arg| self.size(arg)).collect();
        let text = matches!(types.first(), Some(Type::String | Type::Bytes));
        let size = |at: usize| sizes.get(at).copied().unwrap_or(Size::UNKNOWN);
        let read = |at: usize| size(at).read(CHARACTER);
        match function {
            "_||_" | "_&&_" => (0, None),
            "_?_:_" => {
                if let (Some(yes), Some(no)) = (self.entry(all[1]), self.entry(all[2])) {
                    self.entries.insert(expr.id, yes.or(no));
                }
                (0, Some(size(1).or(size(2))))
            }
            "_[_]" if matches!(types[0], Type::List(_) | Type::Map(..)) => {
                let place = self.place(all[0]).and_then(Place::element);
                self.places.extend(place.map(|place| (expr.id, place)));
                (1, self.entry(all[0]).map(|entry| entry.value))
            }
            "_+_" if matches!(types[0], Type::List(_)) || text => {
                if let (Some(a), Some(b)) = (self.entry(all[0]), self.entry(all[1])) {
                    self.entries.insert(expr.id, a.or(b));
                }
                let whole = size(0).plus(size(1));
                (if text { whole.read(CHARACTER) } else { 1 }, Some(whole))
            }
            "_<_" | "_<=_" | "_>_" | "_>=_" if text => (scaled(size(0).max.min(size(1).max), CHARACTER), None),
            "_==_" | "_!=_" => (scaled(size(0).max.min(size(1).max), CHARACTER), None),
            "@in" if matches!(types[1], Type::List(_)) => (size(1).max, None),
            "bytes" if text => (read(0), Some(Size { min: size(0).min, max: size(0).max.saturating_mul(4) })),
            "string" if types[0] == Type::Bytes => (read(0), Some(Size { min: size(0).min / 4, max: size(0).max })),
            "startsWith" | "endsWith" => (read(1), None),
            "contains" => (read(0).saturating_mul(read(1)), None),
            "matches" => (self.searched(size(0), size(1)), None),
            "find" | "findAll" => (self.searched(size(0), size(1)), Some(Size { min: 0, max: size(0).max })),
            "format" => (read(0), None),
            "check" => (AUTHORIZATION, None),
            "isSorted" | "sum" | "max" | "min" | "indexOf" | "lastIndexOf" => (self.compared(all[0], size(0)), None),
            "lowerAscii" | "upperAscii" | "substring" | "trim" => (read(0), Some(size(0))),
            "replace" => (size(0).read(2.0 * CHARACTER), Some(replaced(size(0), size(1), size(2)))),
            "split" => {
                (size(0).read(2.0 * CHARACTER), Some(Size { min: 0, max: limit(all.get(2)).unwrap_or(size(0).max) }))
            }
            "join" => {
                let element = self.element(all[0]);
                let whole = size(0).times(element);
                let between = Size { min: size(0).min.saturating_sub(1), max: size(0).max.saturating_sub(1) };
                let whole = if all.len() > 1 { whole.plus(size(1).times(between)) } else { whole };
                (whole.read(CHARACTER), Some(whole))
            }
            "url" => (read(0), None),
            // Addresses of at most 16 bytes are compared; as texts they are parsed first.
            "containsIP" | "containsCIDR" => {
                let compared = 4 + if function == "containsCIDR" { 3 } else { 0 };
                (compared + if types[1] == Type::String { read(1) } else { 0 }, None)
            }
            _ => (1, None),
        }
    }

    /// A search for a pattern: it is thought to have a state for every four characters.
    fn searched(&self, text: Size, pattern: Size) -> u64 {
        text.plus(Size::exactly(1)).read(CHARACTER).saturating_mul(pattern.read(PATTERN))
    }

    /// Comparing all items of a list, or going through a text.
    fn compared(&self, list: &IdedExpr, size: Size) -> u64 {
        match self.found(list) {
            Some(Type::List(item)) => {
                let text = matches!(**item, Type::String | Type::Bytes);
                let each = if text { self.element(list).read(CHARACTER).saturating_add(1) } else { 1 };
                size.max.saturating_mul(each)
            }
            _ => size.read(CHARACTER),
        }
    }

    /// The size of a list's items by its schema.
    fn element(&self, list: &IdedExpr) -> Size {
        let place = self.place(list).and_then(Place::element);
        place.map_or(Size::UNKNOWN, |place| Size { min: 0, max: place.max() })
    }

    /// Macros.
    fn looped(&mut self, expr: &IdedExpr, name: &str, target: &IdedExpr, args: &[IdedExpr]) -> u64 {
        let variable = |at: usize| match args.get(at).map(|arg| &arg.expr) {
            Some(Expr::Ident(name)) => name.clone(),
            _ => String::new(),
        };
        if name == "bind" && args.len() == 3 {
            let value = self.cost(&args[1]);
            let place = self.place(&args[1]);
            let local = Local { place, size: self.known(&args[1]), entry: self.entry(&args[1]) };
            let body = self.within(vec![(variable(0), local)], &args[2]);
            self.take_after(expr, &args[2]);
            return sum([LIST, value, body]);
        }
        let range = self.cost(target);
        if name.starts_with("opt") && args.len() == 2 {
            let body = self.within(vec![(variable(0), Local::default())], &args[1]);
            // The condition, then a bound value: the option is looked at twice.
            let made = u64::from(name == "optMap");
            return sum([range, 1, LIST, range, 1, body, made]);
        }
        let two = args.len() == 3 && name != "map" || args.len() == 4;
        let names = if two { 2 } else { 1 };
        let scope = self.variables(target, (0..names).map(variable).collect());
        let bodies = &args[names.min(args.len())..];
        let costs: Vec<u64> = bodies.iter().map(|body| self.within(scope.clone(), body)).collect();
        let (condition, last) = (costs.first().copied().unwrap_or(0), costs.last().copied().unwrap_or(0));
        let filtered = if costs.len() > 1 { condition } else { 0 };
        let entered = |coster: &Self| bodies.last().map(|body| coster.size(body));
        // Before the loop, each round, and behind it.
        let (start, round, end, value) = match name {
            "all" => (0, condition.saturating_add(3), 1, None),
            "exists" => (0, condition.saturating_add(4), 1, None),
            "exists_one" | "existsOne" => (0, condition.saturating_add(2), 2, None),
            "filter" => (LIST, condition.saturating_add(LIST + 3), 1, Some(self.kept(target, &scope))),
            "transformMap" => (MAP, sum([filtered, last, 3]), 1, None),
            _ => (LIST, sum([filtered, last, LIST + 2]), 1, entered(self)),
        };
        let rounds = self.size(target);
        self.sizes.insert(expr.id, if start > 0 { rounds } else { Size::exactly(1) });
        if let Some(value) = value {
            let value = value.or(Size::exactly(0));
            self.entries.insert(expr.id, Entry { list: true, key: Size::exactly(1), value });
        }
        sum([range, start, rounds.max.saturating_mul(round), end])
    }

    /// The size of what a filter keeps.
    fn kept(&self, range: &IdedExpr, scope: &[(String, Local<'s>)]) -> Size {
        let Some((_, local)) = scope.first() else { return Size::UNKNOWN };
        let of_place = local.place.map(|place| Size { min: 0, max: place.max() });
        let same = matches!(self.found(range), Some(Type::List(item)) if scalar(item)).then_some(Size::exactly(1));
        of_place.or(same).or(local.size).unwrap_or(Size::UNKNOWN)
    }

    /// What the variables of a loop stand for.
    fn variables(&self, range: &IdedExpr, names: Vec<String>) -> Vec<(String, Local<'s>)> {
        let (entry, place) = (self.entry(range), self.place(range));
        let list = entry.map_or_else(|| matches!(self.found(range), Some(Type::List(_))), |entry| entry.list);
        let value = Local { place: place.and_then(Place::element), size: entry.map(|e| e.value), entry: None };
        let key = match list {
            true => Local::default(),
            false => Local { place: place.and_then(Place::key), size: entry.map(|e| e.key), entry: None },
        };
        let order = match (names.len(), list) {
            (1, true) => vec![value],
            (1, false) => vec![key],
            _ => vec![key, value],
        };
        names.into_iter().zip(order).collect()
    }

    fn within(&mut self, scope: Vec<(String, Local<'s>)>, body: &IdedExpr) -> u64 {
        let outer = self.locals.len();
        self.locals.extend(scope);
        let cost = self.cost(body);
        // Its size is asked for later, when the names are gone.
        if let Some(size) = self.known(body) {
            self.sizes.insert(body.id, size);
        }
        self.locals.truncate(outer);
        cost
    }

    fn take_after(&mut self, expr: &IdedExpr, other: &IdedExpr) {
        let (size, entry) = (self.known(other), self.entry(other));
        self.sizes.extend(size.map(|size| (expr.id, size)));
        self.entries.extend(entry.map(|entry| (expr.id, entry)));
    }
}

/// Whether all values of a type have one size.
fn scalar(found: &Type) -> bool {
    match found {
        Type::Bool | Type::Double | Type::Duration | Type::Int | Type::Timestamp | Type::Uint => true,
        Type::Optional(inner) => scalar(inner),
        _ => false,
    }
}

/// The literal limit of a split.
fn limit(expr: Option<&&IdedExpr>) -> Option<u64> {
    match &expr?.expr {
        Expr::Literal(LiteralValue::Int(limit)) => u64::try_from(*limit.inner()).ok(),
        _ => None,
    }
}

/// The size of a text after replacements.
fn replaced(text: Size, from: Size, to: Size) -> Size {
    let fits = |whole: u64, part: u64| whole.div_ceil(part.max(1));
    let (most, kept) = match from.min {
        0 => (text.max.saturating_add(1), text.max),
        from if to.max <= from => (0, text.max),
        from => (fits(text.max, from), 0),
    };
    let (least, left) = match from.max {
        0 => (text.min.saturating_add(1), text.min),
        from if from <= to.min => (0, text.min),
        from => (fits(text.min, from), 0),
    };
    Size { min: least, max: most }.times(to).plus(Size { min: left, max: kept })
}
