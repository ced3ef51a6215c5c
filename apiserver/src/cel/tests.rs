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
    assert_eq!(run(text, &json!(numbers)), Err(Failure::Budget));
    let nested = format!("{}1{} == 1", "(".repeat(2000), ")".repeat(2000));
    assert!(problem(&nested, &[]).contains("recursion limit"));
}
