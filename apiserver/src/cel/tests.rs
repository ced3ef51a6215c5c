//! Expressions: types, errors in upstream's words, evaluation.

use serde_json::{Value, json};

use super::*;

fn environment() -> Environment {
    Environment::default()
        .with("object", Type::Dyn)
        .with("text", Type::String)
        .with("numbers", Type::list(Type::Int))
        .with("request", Type::object("kubernetes.AdmissionRequest", [("name", Type::String)]))
}

fn problem(text: &str, wanted: &[Type]) -> String {
    environment().compile(text, wanted).err().unwrap_or_default()
}

#[test]
fn errors_are_upstreams() {
    let bool = [Type::Bool];
    for (text, want) in [
        (
            "1 +",
            "compilation failed: ERROR: <input>:1:4: Syntax error: mismatched input '<EOF>' expecting {'[', '{', '(', '.', '-', '!', 'true', 'false', 'null', NUM_FLOAT, NUM_INT, NUM_UINT, STRING, BYTES, IDENTIFIER}\n | 1 +\n | ...^",
        ),
        ("1", "must evaluate to bool but got int"),
        ("object.spec.foo", "must evaluate to bool but got dyn"),
        (
            "nope",
            "compilation failed: ERROR: <input>:1:1: undeclared reference to 'nope' (in container '')\n | nope\n | ^",
        ),
        (
            "variables.x == 1",
            "compilation failed: ERROR: <input>:1:1: undeclared reference to 'variables' (in container '')\n | variables.x == 1\n | ^",
        ),
        (
            "text + 1 == 'a'",
            "compilation failed: ERROR: <input>:1:6: found no matching overload for '_+_' applied to '(string, int)'\n | text + 1 == 'a'\n | .....^",
        ),
        (
            "object.x ==\n  text.foo(1)",
            "compilation failed: ERROR: <input>:2:11: undeclared reference to 'foo' (in container '')\n |   text.foo(1)\n | ..........^",
        ),
        (
            "request.nope == 'a'",
            "compilation failed: ERROR: <input>:1:8: undefined field 'nope'\n | request.nope == 'a'\n | .......^",
        ),
        (
            "size(1) == a",
            "compilation failed: ERROR: <input>:1:5: found no matching overload for 'size' applied to '(int)'\n | size(1) == a\n | ....^\nERROR: <input>:1:12: undeclared reference to 'a' (in container '')\n | size(1) == a\n | ...........^",
        ),
        (
            "[1, 'a'].size() == 2",
            "compilation failed: ERROR: <input>:1:5: expected type 'int' but found 'string'\n | [1, 'a'].size() == 2\n | ....^",
        ),
        ("numbers.all(n, n > 1) && object.a.b in ['x'] && text.startsWith('a')", ""),
        ("has(object.a) ? object.a == 1 : text != ''", ""),
        ("object.items.map(i, i.name).exists(n, n.matches('^a$'))", ""),
    ] {
        assert_eq!(problem(text, &bool), want, "{text}");
    }
    let wanted = [Type::String, Type::Null];
    assert_eq!(problem("1", &wanted), "must evaluate to one of [string null_type] but got int");
}

fn run(text: &str, object: &Value) -> Result<Value, Failure> {
    let program = environment().compile(text, &[]).unwrap_or_else(|e| panic!("{text}: {e}"));
    let mut scope = Scope::new();
    scope.set("object", untyped(object));
    scope.set("text", untyped(&json!("äb")));
    scope.set("numbers", untyped(&json!([3, 1, 2])));
    program.evaluate(&scope, &mut BUDGET.clone()).map(|v| json(&v).unwrap())
}

#[test]
fn evaluates() {
    let object = json!({"a": {"b": 1, "c": "x"}, "items": [{"n": "p", "v": 1}, {"n": "q", "v": 2}], "f": 1.5,
        "labels": {"x/y": "1", "z": "2"}, "when": "2024-01-02T03:04:05Z", "null": null});
    for (text, want) in [
        ("object.a.b + 1", json!(2)),
        ("size(text)", json!(2)),
        ("object.items.map(i, i.n)", json!(["p", "q"])),
        ("object.items.map(i, i.v > 1, i.n)", json!(["q"])),
        ("object.items.filter(i, i.v == 1).size()", json!(1)),
        ("object.items.exists_one(i, i.v == 2)", json!(true)),
        ("object.items.all(i, has(i.n) && i.v > 0)", json!(true)),
        ("object.labels.all(k, v, k != '' && v != '')", json!(true)),
        ("numbers.transformList(i, v, i * 10 + v)", json!([3, 11, 22])),
        ("object.labels.transformMap(k, v, v + k)", json!({"x/y": "1x/y", "z": "2z"})),
        ("object.items.sortBy(i, -i.v).map(i, i.n)", json!(["q", "p"])),
        ("cel.bind(x, object.a.b, x + x)", json!(2)),
        ("object.?nope.b.orValue(7)", json!(7)),
        ("object.?a.b.orValue(7)", json!(1)),
        ("object.a.?b.optMap(v, v + 1).orValue(0)", json!(2)),
        ("has(object.nope) || object.a.c == 'x'", json!(true)),
        ("object.nope == 1 || true", json!(true)),
        ("'z' in object.labels && !('q' in object.labels)", json!(true)),
        ("object.labels['x/y']", json!("1")),
        ("type(object.f) == double && type(object.a) == map", json!(true)),
        ("timestamp(object.when).getFullYear()", json!(2024)),
        ("int('12') + int(object.f)", json!(13)),
        ("'%s-%d'.format(['a', 2])", json!("a-2")),
        ("quantity('1Gi').isGreaterThan(quantity('1Mi'))", json!(true)),
        ("object.items.map(i, numbers.map(n, n * i.v))", json!([[3, 1, 2], [6, 2, 4]])),
        ("{'a': 1, ?'b': object.?nope}", json!({"a": 1})),
        ("-object.a.b == -1 && 0x10 == 16 && r'\\d' == '\\\\d'", json!(true)),
        ("dyn(1) == 1 && bool('true')", json!(true)),
    ] {
        assert_eq!(run(text, &object), Ok(want), "{text}");
    }
    for (text, want) in [
        ("object.nope.b == 1", "no such key: nope"),
        ("object.a.b.c == 1", "no such overload"),
        ("int('x')", "type conversion error from 'string' to 'int'"),
        ("1 / (object.a.b - 1)", "division by zero"),
        ("numbers[5]", "index out of bounds: 5"),
    ] {
        assert_eq!(run(text, &object), Err(Failure::Error(want.into())), "{text}");
    }
}

#[test]
fn mutations() {
    let environment = environment().with_mutations();
    let scope = Scope::new();
    let text = "Object{metadata: Object.metadata{labels: {'a': 'b'}}, spec: Object.spec{replicas: 1}}";
    let program = environment.compile(text, &[object()]).unwrap();
    let value = json(&program.evaluate(&scope, &mut BUDGET.clone()).unwrap()).unwrap();
    assert_eq!(value, json!({"metadata": {"labels": {"a": "b"}}, "spec": {"replicas": 1}}));
    let text = "[JSONPatch{op: 'add', path: '/' + jsonpatch.escapeKey('a/b'), value: [1]}]";
    let program = environment.compile(text, &[list_of_patches()]).unwrap();
    let value = json(&program.evaluate(&scope, &mut BUDGET.clone()).unwrap()).unwrap();
    assert_eq!(value, json!([{"op": "add", "path": "/a~1b", "value": [1]}]));
    assert!(environment.compile("[]", &[list_of_patches()]).is_ok());
    let error = environment.compile("[JSONPatch{nope: 'add'}]", &[list_of_patches()]).err().unwrap();
    assert!(error.contains("undefined field 'nope'"), "{error}");
    assert_eq!(environment.compile("1", &[object()]).err().unwrap(), "must evaluate to Object but got int");
}

#[test]
fn variables_wait_until_they_are_asked_for() {
    let base = environment();
    let program = base.compile("int(object.n)", &[]);
    let base = base.with_member("n", program.as_ref().unwrap().output.clone());
    let variables: Arc<[Variable]> = Arc::new([Variable { name: "n".into(), program }]);
    let run = |text: &str, object: Value| {
        let mut scope = Scope::new();
        scope.set("object", untyped(&object));
        scope.set_variables(&variables);
        base.compile(text, &[Type::Bool]).unwrap().evaluate(&scope, &mut BUDGET.clone()).map(|v| json(&v).unwrap())
    };
    assert_eq!(run("!has(object.n) || variables.n < 5", json!({})), Ok(json!(true)));
    assert_eq!(run("variables.n < 5 && variables.n > 1", json!({"n": "3"})), Ok(json!(true)));
    let error = "composited variable \"n\" fails to evaluate: type conversion error from 'string' to 'int'";
    assert_eq!(run("variables.n < 5", json!({"n": "x"})), Err(Failure::Error(error.into())));
}

#[test]
fn work_is_bounded() {
    let numbers: Vec<i64> = (0..300).collect();
    let text = "object.all(x, object.all(y, object.all(z, x + y + z >= 0)))";
    assert_eq!(run(text, &json!(numbers)), Err(Failure::Error(OVER.into())));
    let program = environment().compile("object.all(x, x >= 0)", &[]).unwrap();
    let mut scope = Scope::new();
    scope.set("object", untyped(&json!(numbers)));
    // Naming the list, and for each of 300 numbers: the loop 3, the name 1, the comparison 1.
    let mut budget = 10_000;
    program.evaluate(&scope, &mut budget).unwrap();
    assert_eq!(budget, 10_000 - 2 - 300 * 5);
    let mut budget = 1_000;
    assert_eq!(program.evaluate(&scope, &mut budget), Err(Failure::Budget));
    assert_eq!(budget, 0);
    let long = json!("x".repeat(1_000_000));
    assert_eq!(
        run("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11].all(n, object.contains('y') || n > 0)", &long),
        Err(Failure::Error(OVER.into()))
    );
    let nested = format!("{}1{} == 1", "(".repeat(2000), ")".repeat(2000));
    assert!(problem(&nested, &[]).contains("recursion limit"));
}

#[test]
fn only_what_runs_is_paid_for() {
    let cost = |text: &str| {
        let mut scope = Scope::new();
        scope.set("object", untyped(&json!({"n": 3, "l": [1, 2, 3, 4]})));
        let mut budget = 10_000;
        environment().compile(text, &[]).unwrap().evaluate(&scope, &mut budget).unwrap();
        10_000 - budget
    };
    // A name, a field and a call cost 1 each, a new list 10.
    let table = [
        ("object.n == 3", 3),
        ("object.n == 3 || object.n == 4", 3),
        ("object.n == 4 || object.n == 3", 6),
        ("object.n == 4 && object.n == 3 && object.n == 5", 3),
        ("object.n > 1 ? object.n : object.n + object.n", 5),
        ("object.n < 1 ? object.n : object.n + object.n", 8),
        // The list and the result 3; a round 3, its condition 2.
        ("object.l.all(x, x > 0)", 3 + 4 * 5),
        // Two rounds, and one that ends.
        ("object.l.all(x, x < 2)", 3 + 2 * 5 + 2),
        ("object.l.exists(x, x == 1)", 3 + 6 + 3),
        ("object.l.exists_one(x, x == 1)", 4 + 4 * 3 + 1),
        ("object.l.filter(x, x == 1)", 3 + 4 * 3 + 12),
        ("object.l.map(x, x + 1)", 3 + 4 * 14),
        ("object.l.map(x, x == 1, x + 1)", 3 + 4 * 3 + 13),
        ("object.l.all(x, x > 2 || object.n == 3)", 3 + 4 * 5 + 2 * 3),
    ];
    for (text, want) in table {
        assert_eq!(cost(text), want, "{text}");
    }
}

#[test]
fn rules_in_the_wild_compile() {
    let text = || json!({"type": "string"});
    let schema = json!({"type": "object", "properties": {
        "name": text(), "group": text(), "kind": text(), "namespace": text(), "replicas": {"type": "integer"},
        "ratio": {"type": "number"}, "size": {"x-kubernetes-int-or-string": true}, "wait": {"type": "string", "format": "duration"},
        "from": {"type": "string", "format": "date-time"}, "labels": {"type": "object", "additionalProperties": text()},
        "tags": {"type": "array", "items": text()}, "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        "listeners": {"type": "array", "items": {"type": "object", "properties": {
            "name": text(), "port": {"type": "integer"}, "protocol": text(),
            "tls": {"type": "object", "properties": {"mode": text(), "certificateRefs": {"type": "array", "items": text()}}}}}}}});
    let own = Type::of_schema(&schema, true);
    let environment = Environment::default().with("self", own.clone()).with("oldSelf", own);
    for rule in [
        "self.listeners.all(l1, self.listeners.exists_one(l2, l1.name == l2.name && l1.port == l2.port))",
        "self.listeners.all(l, l.protocol in ['HTTP', 'TCP', 'UDP'] ? !has(l.tls) : true)",
        "self.listeners.all(l, has(l.tls) && l.tls.mode == 'Terminate' ? size(l.tls.certificateRefs) > 0 || size(l.name) > 0 : true)",
        "(has(self.group) && self.group == 'g' && has(self.kind)) ? self.kind.matches('^[A-Z]+$') : true",
        "[has(self.name), has(self.kind), has(self.group)].filter(x, x).size() == 1",
        "has(self.name) != has(self.kind) || (self.kind == 'a') == has(self.group)",
        "self.wait >= duration('0s') && duration(self.wait) < duration('1h') && self.from > timestamp('2020-01-01T00:00:00Z')",
        "isQuantity(string(self.size)) && quantity(string(self.size)).isGreaterThan(quantity('0'))",
        "type(self.size) == string ? self.size == 'x' : self.size > 0",
        "self.replicas >= 0 && self.replicas < 2.5 && self.ratio > 1 && self.replicas % 2 == 0",
        "self.labels.exists(k, k.startsWith('x')) && self.labels.all(k, v, v != '') && 'a' in self.labels",
        "self.__namespace__ == oldSelf.__namespace__ || self.tags.map(t, t.split('/')[0]).isSorted()",
        "self.?tags.orValue([]).size() == 0 && self.tags.join(',').lowerAscii() != 'a'",
        "self.open.any.thing == 1 && self.metadata.name.size() <= 63 && self.kind == 'Thing'",
        "math.greatest([self.replicas, 1]) > 1 && math.greatest(self.replicas, 1) > 1",
        "cidr(self.name).prefixLength() <= 24 && ip(self.name).family() == 4 && isIP(self.group)",
        "cel.bind(t, self.tags, t.all(x, !format.dns1123Label().validate(x).hasValue()))",
        "self.listeners.filter(l, l.protocol == 'HTTP').map(l, l.port).sum() > 0 && sets.contains(self.tags, ['a'])",
        "oldSelf.tags.all(t, self.tags.exists(u, u == t)) && self.tags.distinct().size() == self.tags.size()",
    ] {
        let compiled = environment.compile(rule, &[Type::Bool]);
        assert_eq!(compiled.err(), None, "{rule}");
    }
    let error = environment.compile("self.nope == 1", &[Type::Bool]).err().unwrap();
    assert_eq!(error, "compilation failed: ERROR: <input>:1:5: undefined field 'nope'\n | self.nope == 1\n | ....^");
}

/// Allows one verb, and says who asked for what.
struct OnlyGet;

impl crate::authz::Authorizer for OnlyGet {
    fn authorize(&self, asked: &crate::authz::Attributes) -> crate::authz::Decision {
        let what = if asked.resource_request {
            format!("{}/{}/{}/{} {}", asked.group, asked.resource, asked.subresource, asked.namespace, asked.name)
        } else {
            asked.path.clone()
        };
        let text = format!("{} {what}", asked.user.name);
        match asked.verb.as_str() {
            "get" => crate::authz::Decision::Allow(text),
            _ => crate::authz::Decision::NoOpinion(text),
        }
    }
}

#[test]
fn expressions_ask_the_authorizer() {
    let environment = admission::environment(admission::Offers { params: false, authorizer: true });
    let mut scope = Scope::new();
    let user = crate::authn::UserInfo { name: "ann".into(), ..Default::default() };
    let own = crate::authz::Attributes {
        user: user.clone(),
        resource: "pods".into(),
        resource_request: true,
        ..Default::default()
    };
    scope.set("authorizer", authorizer(Arc::new(OnlyGet), &user));
    scope.set("authorizer.requestResource", request_resource(Arc::new(OnlyGet), own));
    for (text, want) in [
        (
            "authorizer.group('apps').resource('deployments').namespace('ns').name('d').check('get').allowed()",
            json!(true),
        ),
        ("authorizer.group('apps').resource('deployments').check('list').allowed()", json!(false)),
        (
            "authorizer.group('apps').resource('deployments').subresource('scale').namespace('ns').name('d').check('get').reason()",
            json!("ann apps/deployments/scale/ns d"),
        ),
        ("authorizer.path('/healthz').check('get').reason()", json!("ann /healthz")),
        (
            "authorizer.serviceAccount('ns', 'sa').path('/x').check('get').reason()",
            json!("system:serviceaccount:ns:sa /x"),
        ),
        ("authorizer.requestResource.check('update').allowed()", json!(false)),
        ("authorizer.requestResource.check('get').reason()", json!("ann /pods// ")),
        ("authorizer.requestResource.check('get').errored()", json!(false)),
    ] {
        let program = environment.compile(text, &[]).unwrap_or_else(|e| panic!("{text}: {e}"));
        let value = program.evaluate(&scope, &mut BUDGET.clone()).map(|v| json(&v).unwrap());
        assert_eq!(value, Ok(want), "{text}");
    }
    let error = environment.compile("authorizer.allowed()", &[Type::Bool]).err().unwrap();
    assert!(
        error.contains("found no matching overload for 'allowed' applied to 'kubernetes.authorization.Authorizer.()'"),
        "{error}"
    );
}
