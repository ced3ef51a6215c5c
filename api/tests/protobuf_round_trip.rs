//! Every kind with a protobuf form: random objects survive JSON -> protobuf -> JSON.

use isopod_api::{
    gvk::Gvk,
    protobuf,
    schema::{self, Definition, Type},
};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Numbers for one object.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.roll(of.len() as u64) as usize]
    }
}

const TEXTS: [&str; 7] = ["", "a", "example.com/name", "kühl", "\"quoted\"\n", "0", "😀"];
const QUANTITIES: [&str; 8] = ["0", "100m", "1", "1.5", "2Gi", "-3", "12e6", "1500Ki"];

/// Deeper members are left out: some types contain themselves.
const DEPTH: usize = 6;

fn object(definition: &Definition, dice: &mut Dice, depth: usize) -> Value {
    let mut map = Map::new();
    for field in &definition.fields {
        // Messages have no kind; the envelope has that of the outermost.
        if depth > 0 && !definition.gvks.is_empty() && ["kind", "apiVersion"].contains(&&*field.name) {
            continue;
        }
        let scalar = !matches!(field.ty, Type::Object(_) | Type::List(_) | Type::Map(_));
        if (scalar || depth < DEPTH) && dice.roll(3) > 0 {
            map.insert(field.name.to_string(), value(&field.ty, dice, depth + 1));
        }
    }
    map.into()
}

fn value(ty: &Type, dice: &mut Dice, depth: usize) -> Value {
    let few = if depth < DEPTH { 3 } else { 1 };
    match ty {
        // It has to do for schemas as well, whose members are messages.
        Type::Any => json!({"type": dice.one(&TEXTS), "minimum": 1.5, "default": [dice.roll(9), null, {"b": true}]}),
        Type::String => dice.one(&TEXTS).into(),
        Type::Bytes => dice.one(&["", "AAE=", "/+8=", "aGVsbG8="]).into(),
        Type::Bool => (dice.roll(2) == 1).into(),
        Type::Int32 => [0, 1, -1, i32::MAX, i32::MIN][dice.roll(5) as usize].into(),
        Type::Int64 => [0, 1, -1, i64::MAX, i64::MIN][dice.roll(5) as usize].into(),
        Type::Double => [0.0, 1.5, -2.25][dice.roll(3) as usize].into(),
        Type::Quantity => dice.one(&QUANTITIES).into(),
        Type::Time => dice.one(&["2024-02-29T23:59:59Z", "1970-01-01T00:00:01Z"]).into(),
        Type::MicroTime => dice.one(&["2024-02-29T23:59:59.123456Z", "2001-01-01T00:00:00.000000Z"]).into(),
        Type::IntOrString => match dice.roll(2) {
            0 => [0, 80, -1][dice.roll(3) as usize].into(),
            _ => dice.one(&["25%", "http", ""]).into(),
        },
        Type::Object(reference) => match &reference.get().scalar {
            Some(scalar) => value(scalar, dice, depth),
            None if reference.get().opaque => json!({"f:a": {".": {}}}),
            None => object(reference.get(), dice, depth),
        },
        Type::Map(map) => (0..dice.roll(few))
            .map(|i| (format!("k{i}"), value(&map.value, dice, depth + 1)))
            .collect::<Map<_, _>>()
            .into(),
        Type::List(list) => (0..dice.roll(few)).map(|_| value(&list.item, dice, depth + 1)).collect(),
    }
}

/// Removes empty lists and maps: protobuf has no such thing, and Go sees no difference.
fn without_empty(definition: &Definition, value: &mut Value) {
    let Value::Object(map) = value else { return };
    for field in &definition.fields {
        let Some(member) = map.get_mut(&*field.name) else { continue };
        prune(&field.ty, member);
        let empty = match (&field.ty, &*member) {
            (Type::List(_), Value::Array(items)) => items.is_empty(),
            (Type::Map(_), Value::Object(entries)) => entries.is_empty(),
            (_, Value::Null) => true,
            _ => false,
        };
        if empty {
            map.shift_remove(&*field.name);
        }
    }
}

fn prune(ty: &Type, value: &mut Value) {
    match (ty, value) {
        (Type::Object(reference), value) if !reference.get().opaque => without_empty(reference.get(), value),
        (Type::List(list), Value::Array(items)) => items.iter_mut().for_each(|item| prune(&list.item, item)),
        (Type::Map(map), Value::Object(entries)) => entries.values_mut().for_each(|entry| prune(&map.value, entry)),
        _ => {}
    }
}

/// What a server makes of an object before anything else.
fn settled(gvk: &Gvk, definition: &Definition, mut object: Value) -> Value {
    schema::decode(definition, &mut object, &[]).unwrap_or_else(|e| panic!("{gvk}: {e}"));
    schema::fill(definition, &mut object);
    without_empty(definition, &mut object);
    object
}

fn kinds() -> Vec<(Gvk, &'static Definition)> {
    let definitions = schema::definition_names().filter_map(schema::definition);
    let all = definitions.flat_map(|definition| {
        definition.gvks.iter().filter_map(move |gvk| {
            let (version, kind) = gvk.rsplit_once('/')?;
            Some((Gvk::from_api_version(version, kind), definition))
        })
    });
    // Events have an encoder of their own.
    all.filter(|(gvk, _)| protobuf::supported(gvk) && gvk.kind != "WatchEvent").collect()
}

#[test]
fn every_stored_kind_is_here() {
    let kinds = kinds();
    for resource in isopod_api::resources::all().iter().filter(|r| r.etcd_prefix.is_some()) {
        let custom = ["apiextensions.k8s.io", "apiregistration.k8s.io"].contains(&&*resource.group);
        assert!(custom || kinds.iter().any(|(gvk, _)| *gvk == resource.gvk()), "{} has no message", resource.gvk());
    }
    assert!(kinds.len() > 100, "{}", kinds.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn objects_survive(seed in any::<u64>()) {
        let mut dice = Dice(seed);
        for (gvk, definition) in kinds() {
            let mut sent = object(definition, &mut dice, 0);
            (sent["kind"], sent["apiVersion"]) = (gvk.kind.as_str().into(), gvk.api_version().into());
            let sent = settled(&gvk, definition, sent);
            let bytes = protobuf::encode(&sent).unwrap_or_else(|e| panic!("{gvk}: {e}: {sent}"));
            let back = protobuf::decode(&bytes).unwrap_or_else(|e| panic!("{gvk}: {e}"));
            let back = settled(&gvk, definition, back);
            if back != sent {
                let at = difference("", &sent, &back);
                prop_assert!(false, "{} differs: {}", gvk, at);
            }
        }
    }

    #[test]
    fn damaged_messages_are_refused_or_read(seed in any::<u64>()) {
        let mut dice = Dice(seed);
        for (gvk, definition) in kinds() {
            let mut sent = object(definition, &mut dice, 3);
            (sent["kind"], sent["apiVersion"]) = (gvk.kind.as_str().into(), gvk.api_version().into());
            let Ok(mut bytes) = protobuf::encode(&sent) else { continue };
            for _ in 0..4 {
                let at = dice.roll(bytes.len() as u64) as usize;
                bytes[at] = dice.roll(256) as u8;
            }
            bytes.truncate(dice.roll(bytes.len() as u64 + 1) as usize);
            // It must come back; with what is of no interest.
            let _ = protobuf::decode(&bytes);
        }
    }
}

/// Where two values part.
fn difference(path: &str, a: &Value, b: &Value) -> String {
    if let (Value::Object(x), Value::Object(y)) = (a, b) {
        for (key, value) in x {
            match y.get(key) {
                Some(other) if other == value => {}
                Some(other) => return difference(&format!("{path}.{key}"), value, other),
                None => return format!("{path}.{key}: {value} is gone"),
            }
        }
        let more = y.keys().find(|key| !x.contains_key(*key));
        return format!("{path}: {more:?} came from nowhere");
    }
    if let (Value::Array(x), Value::Array(y)) = (a, b)
        && let Some((i, (x, y))) = x.iter().zip(y).enumerate().find(|(_, (x, y))| x != y)
    {
        return difference(&format!("{path}[{i}]"), x, y);
    }
    format!("{path}: {a} became {b}")
}
