//! From a checked tree to one the cel crate evaluates as upstream does.
//!
//! - Macros become comprehensions, also those the crate does not know (two variables, `cel.bind`, `optMap`, `sortBy`).
//!   Every round of a loop pays `@tick` what it costs, and methods that go through a text pay `@read` for it, in
//!   upstream's units: what is used or called costs 1, new lists, maps and messages more. What `&&`, `||` and `?:` may pass
//!   over is paid for when it runs.
//! - Selections become index calls: the crate answers `false` for a field of what is no map.
//! - Messages become maps; `variables.x` becomes `@variable('x')`, evaluated when it is first asked for.

use kube_cel::cel::common::ast::{
    CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr, ListExpr, LiteralValue, MapEntryExpr,
    MapExpr, SelectExpr, operators,
};

use super::{Environment, VARIABLES, parse::path};

const RESULT: &str = "@result";
const PAIR: &str = "@pair";

/// Lowers a tree that [`super::check`] accepted.
pub(super) fn lower(environment: &Environment, expr: IdedExpr) -> IdedExpr {
    Lowering { environment }.expr(expr)
}

/// Methods that go through the text they are called on.
const READERS: [&str; 13] = [
    "contains",
    "endsWith",
    "find",
    "findAll",
    "indexOf",
    "lastIndexOf",
    "lowerAscii",
    "matches",
    "replace",
    "split",
    "startsWith",
    "trim",
    "upperAscii",
];
/// Making a list.
const LIST: u64 = 10;
/// Making a map.
const MAP: u64 = 30;
/// Making a message.
const MESSAGE: u64 = 40;

/// What a checked tree costs whatever happens: without the rounds of its loops, and without what conditions may pass over.
pub(super) fn own_cost(expr: &IdedExpr) -> u64 {
    let all = |exprs: &[IdedExpr]| exprs.iter().map(own_cost).sum::<u64>();
    match &expr.expr {
        Expr::Ident(_) => 1,
        Expr::Select(select) => own_cost(&select.operand) + u64::from(!select.test),
        Expr::Call(found) => match (&found.target, found.func_name.as_str()) {
            (None, name) if branches(name) => found.args.first().map_or(0, own_cost),
            // Whether there is a field costs what leads to it.
            (None, operators::HAS) => all(&found.args).saturating_sub(1),
            (Some(target), "exists_one" | "existsOne") if found.args.len() > 1 => own_cost(target) + 2,
            (Some(target), name) if loops(name) && found.args.len() > 1 => own_cost(target) + 1,
            (target, _) => 1 + target.as_deref().map_or(0, own_cost) + all(&found.args),
        },
        Expr::List(list) => LIST + all(&list.elements),
        Expr::Map(map) => MAP + map.entries.iter().map(entry_cost).sum::<u64>(),
        Expr::Struct(message) => MESSAGE + message.entries.iter().map(entry_cost).sum::<u64>(),
        Expr::Literal(_) | Expr::Comprehension(_) | Expr::Unspecified => 0,
    }
}

fn entry_cost(entry: &IdedEntryExpr) -> u64 {
    match &entry.expr {
        EntryExpr::MapEntry(entry) => own_cost(&entry.key) + own_cost(&entry.value),
        EntryExpr::StructField(field) => own_cost(&field.value),
    }
}

/// Operators that look at their first argument before they look at another.
fn branches(name: &str) -> bool {
    matches!(name, operators::LOGICAL_AND | operators::LOGICAL_OR | operators::CONDITIONAL)
}

/// Whether a method is a macro that loops.
fn loops(name: &str) -> bool {
    let names =
        ["all", "exists", "exists_one", "existsOne", "filter", "map", "sortBy", "transformList", "transformMap"];
    names.contains(&name)
}

struct Lowering<'e> {
    environment: &'e Environment,
}

fn node(expr: Expr) -> IdedExpr {
    IdedExpr { id: 0, expr }
}

fn ident(name: &str) -> IdedExpr {
    node(Expr::Ident(name.to_owned()))
}

fn text(value: &str) -> IdedExpr {
    node(Expr::Literal(LiteralValue::String(value.into())))
}

fn boolean(value: bool) -> IdedExpr {
    node(Expr::Literal(LiteralValue::Boolean(value.into())))
}

fn integer(value: i64) -> IdedExpr {
    node(Expr::Literal(LiteralValue::Int(value.into())))
}

fn list(elements: Vec<IdedExpr>) -> IdedExpr {
    node(Expr::List(ListExpr::new(elements)))
}

fn call(name: &str, args: Vec<IdedExpr>) -> IdedExpr {
    node(Expr::Call(CallExpr { func_name: name.to_owned(), target: None, args }))
}

fn method(target: IdedExpr, name: &str) -> IdedExpr {
    node(Expr::Call(CallExpr { func_name: name.to_owned(), target: Some(Box::new(target)), args: Vec::new() }))
}

fn qualified(prefix: &str, name: &str, args: Vec<IdedExpr>) -> IdedExpr {
    let target = Some(Box::new(ident(prefix)));
    node(Expr::Call(CallExpr { func_name: name.to_owned(), target, args }))
}

fn conditional(condition: IdedExpr, yes: IdedExpr, no: IdedExpr) -> IdedExpr {
    call(operators::CONDITIONAL, vec![condition, yes, no])
}

/// `body` with a name for a value: a loop that runs no round.
fn bind(name: &str, value: IdedExpr, body: IdedExpr) -> IdedExpr {
    node(Expr::Comprehension(Box::new(ComprehensionExpr {
        iter_range: list(Vec::new()),
        iter_var: "@none".into(),
        iter_var2: None,
        accu_var: name.to_owned(),
        accu_init: value,
        loop_cond: boolean(false),
        loop_step: ident(name),
        result: body,
    })))
}

/// A loop: over what, its variable, the start, whether to go on, one round, the end.
struct Loop {
    range: IdedExpr,
    variable: String,
    start: IdedExpr,
    going: IdedExpr,
    step: IdedExpr,
    end: IdedExpr,
    /// What asking whether to go on costs, and what a round costs then.
    cost: (u64, u64),
}

/// An expression that costs something when it runs.
fn paid(cost: u64, expr: IdedExpr) -> IdedExpr {
    if cost == 0 {
        return expr;
    }
    let cost = i64::try_from(cost).unwrap_or(i64::MAX);
    conditional(call("@tick", vec![integer(cost)]), expr, boolean(false))
}

impl Loop {
    fn build(self) -> IdedExpr {
        let (asking, round) = self.cost;
        // Where nothing is asked the round is paid for at once: one call a round either way.
        let (before, after) = if asking == 0 { (round, 0) } else { (asking, round) };
        node(Expr::Comprehension(Box::new(ComprehensionExpr {
            iter_range: self.range,
            iter_var: self.variable,
            iter_var2: None,
            accu_var: RESULT.into(),
            accu_init: self.start,
            loop_cond: paid(before, self.going),
            loop_step: paid(after, self.step),
            result: self.end,
        })))
    }
}

impl Lowering<'_> {
    fn expr(&self, expr: IdedExpr) -> IdedExpr {
        match expr.expr {
            Expr::Select(select) => self.select(select),
            Expr::Call(call) => self.call(call),
            Expr::List(list) => {
                let elements = list.elements.into_iter().map(|e| self.expr(e)).collect();
                node(Expr::List(ListExpr { elements, optional_indices: list.optional_indices }))
            }
            Expr::Map(map) => self.map(map.entries),
            Expr::Struct(message) => self.map(message.entries),
            other => node(other),
        }
    }

    fn map(&self, entries: Vec<IdedEntryExpr>) -> IdedExpr {
        let entry = |entry: IdedEntryExpr| {
            let (key, value, optional) = match entry.expr {
                EntryExpr::MapEntry(e) => (self.expr(e.key), e.value, e.optional),
                EntryExpr::StructField(f) => (text(&f.field), f.value, f.optional),
            };
            let value = self.expr(value);
            IdedEntryExpr { id: 0, expr: EntryExpr::MapEntry(MapEntryExpr { key, value, optional }) }
        };
        node(Expr::Map(MapExpr { entries: entries.into_iter().map(entry).collect() }))
    }

    fn select(&self, select: SelectExpr) -> IdedExpr {
        if matches!(&select.operand.expr, Expr::Ident(name) if name == VARIABLES) && self.environment.lazy() {
            return call("@variable", vec![text(&select.field)]);
        }
        let prefix = path(&select.operand);
        let whole = format!("{prefix}.{}", select.field);
        if !prefix.is_empty() && self.environment.variable(&whole).is_some() {
            return ident(&whole);
        }
        call(operators::INDEX, vec![self.expr(*select.operand), text(&select.field)])
    }

    fn call(&self, found: CallExpr) -> IdedExpr {
        let CallExpr { func_name, target, mut args } = found;
        match (&target, func_name.as_str(), args.len()) {
            (None, operators::OPT_SELECT, 2) => {
                let field = args.remove(1);
                return call(operators::OPT_INDEX, vec![self.expr(args.remove(0)), field]);
            }
            (None, operators::HAS, 1) => {
                if let Expr::Select(select) = args.remove(0).expr {
                    let operand = Box::new(self.expr(*select.operand));
                    return node(Expr::Select(SelectExpr { operand, field: select.field, test: true }));
                }
                return boolean(false);
            }
            (Some(target), "bind", 3) if path(target) == "cel" => {
                let (body, value) = (args.remove(2), args.remove(1));
                let name = path(&args[0]);
                return bind(&name, self.expr(value), self.expr(body));
            }
            _ => {}
        }
        if let Some(target) = target {
            return self.on_target(*target, func_name, args);
        }
        let branching = branches(&func_name);
        let arg = |(at, arg): (usize, IdedExpr)| match at > 0 && branching {
            true => paid(own_cost(&arg), self.expr(arg)),
            false => self.expr(arg),
        };
        let args = args.into_iter().enumerate().map(arg).collect();
        node(Expr::Call(CallExpr { func_name, target: None, args }))
    }

    fn on_target(&self, target: IdedExpr, func_name: String, mut args: Vec<IdedExpr>) -> IdedExpr {
        let name = func_name.as_str();
        match (name, args.len()) {
            ("all" | "exists" | "exists_one" | "existsOne" | "filter", 2) | ("map", 2 | 3) => {
                let variable = path(&args.remove(0));
                let item = ident(&variable);
                self.looped(name, self.expr(target), variable, item, args, |body| body)
            }
            ("all" | "exists" | "exists_one" | "existsOne" | "transformList" | "transformMap", 3)
            | ("transformList" | "transformMap", 4) => {
                let (value, key) = (path(&args.remove(1)), path(&args.remove(0)));
                let part = |index| call(operators::INDEX, vec![ident(PAIR), integer(index)]);
                let range = call("@pairs", vec![self.expr(target)]);
                let scoped = |body| bind(&key, part(0), bind(&value, part(1), body));
                self.looped(name, range, PAIR.into(), part(0), args, scoped)
            }
            ("sortBy", 2) => {
                let (body, variable) = (args.remove(1), path(&args.remove(0)));
                let range = self.expr(target);
                let item = ident(&variable);
                let keys = self.looped("map", range.clone(), variable, item, vec![body], |body| body);
                call("@sortBy", vec![range, keys])
            }
            ("optMap" | "optFlatMap", 2) => {
                let (body, variable) = (args.remove(1), path(&args.remove(0)));
                let range = self.expr(target);
                let body = bind(&variable, method(range.clone(), "value"), self.expr(body));
                let body = if name == "optMap" { qualified("optional", "of", vec![body]) } else { body };
                conditional(method(range, "hasValue"), body, qualified("optional", "none", Vec::new()))
            }
            _ => {
                // Functions with a dot in their name keep it.
                let prefix = path(&target);
                let plain = matches!(target.expr, Expr::Ident(_)) && self.environment.variable(&prefix).is_none();
                let reads = !plain && READERS.contains(&func_name.as_str());
                let target = if plain { target } else { self.expr(target) };
                let target = if reads { call("@read", vec![target]) } else { target };
                let args = args.into_iter().map(|a| self.expr(a)).collect();
                node(Expr::Call(CallExpr { func_name, target: Some(Box::new(target)), args }))
            }
        }
    }

    fn looped(
        &self,
        name: &str,
        range: IdedExpr,
        variable: String,
        item: IdedExpr,
        bodies: Vec<IdedExpr>,
        scoped: impl Fn(IdedExpr) -> IdedExpr,
    ) -> IdedExpr {
        let mut bodies = bodies.into_iter().map(|body| (own_cost(&body), self.expr(body)));
        let (cost, body) = bodies.next().unwrap_or_else(|| (0, boolean(true)));
        let second = bodies.next();
        let result = || ident(RESULT);
        let more = |value| call(operators::ADD, vec![result(), list(vec![value])]);
        let truth = |value| call(operators::NOT_STRICTLY_FALSE, vec![value]);
        // Besides the body: what there is so far costs 1, and so does each name and call that makes more of it.
        let (start, going, step, end, costs) = match name {
            "all" => {
                let step = call(operators::LOGICAL_AND, vec![result(), body]);
                (boolean(true), truth(result()), step, result(), (2, 1 + cost))
            }
            "exists" => {
                let going = truth(call(operators::LOGICAL_NOT, vec![result()]));
                let step = call(operators::LOGICAL_OR, vec![result(), body]);
                (boolean(false), going, step, result(), (3, 1 + cost))
            }
            "exists_one" | "existsOne" => {
                let next = paid(1, call(operators::ADD, vec![result(), integer(1)]));
                let end = call(operators::EQUALS, vec![result(), integer(1)]);
                (integer(0), boolean(true), conditional(body, next, result()), end, (0, 1 + cost))
            }
            "filter" => {
                let step = conditional(body, paid(LIST + 2, more(item)), result());
                (list(Vec::new()), boolean(true), step, result(), (0, 1 + cost))
            }
            "transformMap" => {
                let start = node(Expr::Map(MapExpr { entries: Vec::new() }));
                let put = |value| call("@insert", vec![result(), item, value]);
                let (step, cost) = match second {
                    Some((more, value)) => (conditional(body, paid(MAP + 1 + more, put(value)), result()), cost),
                    None => (put(body), MAP + 1 + cost),
                };
                (start, boolean(true), step, result(), (0, 1 + cost))
            }
            _ => {
                let (step, cost) = match second {
                    Some((own, value)) => (conditional(body, paid(LIST + 1 + own, more(value)), result()), cost),
                    None => (more(body), LIST + 1 + cost),
                };
                (list(Vec::new()), boolean(true), step, result(), (0, 1 + cost))
            }
        };
        Loop { range, variable, start, going, step: scoped(step), end, cost: costs }.build()
    }
}
