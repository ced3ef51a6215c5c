//! From request bodies to objects: media types, syntax, kind and version, unknown fields, types, defaults.

use isopod_api::{
    field::{Error, Path},
    gvk::Gvk,
    meta, protobuf, schema,
    schema::json::Parsed,
    status::Status,
    yaml,
};
use serde_json::Value;

use super::{Resource, convert::convert, options::FieldValidation};

/// The media type of a body, without parameters; JSON when there is none.
fn media(content_type: Option<&str>) -> &str {
    let bare = content_type.unwrap_or("").split(';').next().unwrap_or("").trim();
    if bare.is_empty() { "application/json" } else { bare }
}

/// A parsed body, and strict errors the parser itself found.
type Body = (Parsed, Vec<String>);

fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Result<Body, String>, Status> {
    match media(content_type) {
        "application/json" => Ok(schema::json::parse(bytes)
            .map(|parsed| (parsed, Vec::new()))
            .map_err(|e| format!("couldn't get version/kind; json parse error: {e}"))),
        "application/yaml" => Ok(parse_yaml(bytes)),
        "application/vnd.kubernetes.protobuf" => Ok(protobuf::decode(bytes)
            .map(|value| (Parsed { value, duplicates: Vec::new() }, Vec::new()))
            .map_err(|e| format!("couldn't get version/kind; protobuf parse error: {e}"))),
        _ => Err(Status::unsupported_media_type(
            "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml, application/vnd.kubernetes.protobuf",
        )),
    }
}

/// Duplicate keys are reported like unknown fields, not refused: the last one counts.
fn parse_yaml(bytes: &[u8]) -> Result<Body, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let (value, repeated) =
        yaml::parse_strict(text).map_err(|e| format!("couldn't get version/kind; json parse error: {e}"))?;
    Ok((Parsed { value, duplicates: Vec::new() }, repeated))
}

/// A body as a bare value (DeleteOptions).
pub(super) fn body(bytes: &[u8], content_type: Option<&str>) -> Result<Value, Status> {
    let (parsed, _) = parse(bytes, content_type)?.map_err(Status::bad_request)?;
    Ok(parsed.value)
}

/// Decodes a body as an object of `gvk`, without defaults.
pub(crate) fn object(
    resource: &Resource,
    gvk: &Gvk,
    bytes: &[u8],
    content_type: Option<&str>,
    validation: FieldValidation,
    warnings: &mut Vec<String>,
) -> Result<Value, Status> {
    let parsed = parse(bytes, content_type)?.and_then(|(parsed, strict)| Ok((named(parsed)?, strict)));
    let (parsed, strict) = parsed.map_err(|e| unrecognized(gvk, &e, bytes))?;
    typed(resource, gvk, parsed, strict, validation, warnings)
}

/// What upstream reads first of a body is its version and kind; null has none, like an empty object.
fn named(mut parsed: Parsed) -> Result<Parsed, String> {
    const HEAD: &str =
        r#"struct { APIVersion string "json:\"apiVersion,omitempty\""; Kind string "json:\"kind,omitempty\"" }"#;
    let unmarshal = |what: &str, into: &str| {
        Err(format!("couldn't get version/kind; json parse error: json: cannot unmarshal {what} into Go {into}"))
    };
    if parsed.value.is_null() {
        parsed.value = Value::Object(serde_json::Map::new());
    }
    let Some(map) = parsed.value.as_object() else {
        return unmarshal(schema::json::kind(&parsed.value), &format!("value of type {HEAD}"));
    };
    for (field, value) in map.iter().filter(|(field, _)| ["apiVersion", "kind"].contains(&field.as_str())) {
        if !value.is_string() && !value.is_null() {
            return unmarshal(schema::json::kind(value), &format!("struct field .{field} of type string"));
        }
    }
    Ok(parsed)
}

fn unrecognized(gvk: &Gvk, error: &str, body: &[u8]) -> Status {
    let summary = match body.first() {
        None => "<empty>".to_owned(),
        Some(first) => {
            let head = &body[..body.len().min(30)];
            let text = match first {
                b'{' => String::from_utf8_lossy(head).into_owned(),
                _ => head.iter().map(|b| format!("{b:02x}")).collect(),
            };
            if body.len() > 30 { format!("{text} ...") } else { text }
        }
    };
    Status::bad_request(format!(
        "the object provided is unrecognized (must be of type {}): {error} ({summary})",
        gvk.kind
    ))
}

/// Checks kind, version, fields and types of a parsed object.
pub(crate) fn typed(
    resource: &Resource,
    gvk: &Gvk,
    parsed: Parsed,
    mut strict: Vec<String>,
    validation: FieldValidation,
    warnings: &mut Vec<String>,
) -> Result<Value, Status> {
    let Parsed { mut value, duplicates } = parsed;
    if value.is_object() {
        identify(resource, gvk, &mut value)?;
    }
    let found = resource
        .schema(gvk)
        .decode(&mut value, &duplicates)
        .map_err(|e| schema::decode_failure(&value, &gvk.kind, &e.to_string()))?;
    strict.extend(found);
    match validation {
        FieldValidation::Strict if !strict.is_empty() => Err(schema::strict_failure(&value, &gvk.kind, &strict)),
        FieldValidation::Warn => {
            warnings.extend(strict);
            Ok(value)
        }
        _ => Ok(value),
    }
}

/// Kinds that are no longer served but still understood in bodies.
fn old_name(found: &Gvk, wanted: &Gvk) -> bool {
    wanted.kind == "Eviction" && found.kind == wanted.kind && found.group == wanted.group && found.version == "v1beta1"
}

/// Fills in a missing kind and version, refuses others than the expected.
fn identify(resource: &Resource, gvk: &Gvk, value: &mut Value) -> Result<(), Status> {
    let version = gvk.api_version();
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (kind, api_version) = (text(value, "kind"), text(value, "apiVersion"));
    let kind = if kind.is_empty() { gvk.kind.clone() } else { kind };
    let api_version = if api_version.is_empty() { version.clone() } else { api_version };
    value["kind"] = kind.as_str().into();
    value["apiVersion"] = api_version.as_str().into();
    let found = Gvk::from_api_version(&api_version, &kind);
    if found == *gvk {
        return Ok(());
    }
    if old_name(&found, gvk) {
        value["apiVersion"] = version.as_str().into();
        return Ok(());
    }
    if resource.custom.is_some() && *gvk == resource.gvk {
        return Err(mistaken(value, &found, gvk));
    }
    if found.kind == gvk.kind && found.group == gvk.group && schema::lookup(&found).is_some() {
        return Err(Status::bad_request(format!(
            "the API version in the data ({api_version}) does not match the expected API version ({version})"
        )));
    }
    let reason = match schema::lookup(&found) {
        Some(_) if found.group == gvk.group || found.kind != gvk.kind => {
            format!(
                "converting ({}.{}) to ({}.{}): unknown conversion",
                found.version,
                found.kind,
                go_package(&gvk.group),
                gvk.kind
            )
        }
        _ => format!(
            "no kind \"{}\" is registered for version \"{api_version}\" in scheme \"pkg/api/legacyscheme/scheme.go:30\"",
            found.kind
        ),
    };
    Err(Status::bad_request(format!(
        "{} in version \"{}\" cannot be handled as a {}: {reason}",
        found.kind, found.version, gvk.kind
    )))
}

/// A custom resource's body that is of another kind or version.
fn mistaken(value: &Value, found: &Gvk, wanted: &Gvk) -> Status {
    if found.api_version() != wanted.api_version() {
        return Status::bad_request(format!(
            "the API version in the data ({}) does not match the expected API version ({})",
            found.api_version(),
            wanted.api_version()
        ));
    }
    let error = Error::invalid(&Path::new("kind"), found.kind.as_str(), format!("must be {}", wanted.kind));
    Status::invalid(&wanted.group_kind(), meta::name(value), vec![error])
}

fn go_package(group: &str) -> &str {
    match group {
        "" => "core",
        group => group.split('.').next().unwrap_or(group),
    }
}

fn fill_in(resource: &Resource, value: &mut Value, gvk: &Gvk) {
    value["kind"] = gvk.kind.as_str().into();
    value["apiVersion"] = gvk.api_version().into();
    resource.schema(gvk).default(value);
}

/// Defaults of the served version.
pub(super) fn complete_served(resource: &Resource, value: &mut Value) {
    fill_in(resource, value, &resource.gvk);
}

/// Turns a decoded object of the served version into a complete one of the stored version: defaults, conversion.
pub(crate) fn complete(resource: &Resource, value: &mut Value) {
    if resource.converted() && Gvk::of(value) == resource.gvk {
        fill_in(resource, value, &resource.gvk);
        *value = convert(std::mem::take(value), &resource.storage);
    }
    fill_in(resource, value, &resource.storage);
    resource.strategy.default(value);
    meta::metadata_mut(value).shift_remove("selfLink");
}

/// Adds to an object with nothing in it what upstream's encoder always prints.
pub(super) fn complete_empty(resource: &Resource, value: &mut Value) {
    resource.schema(&resource.gvk).fill(value);
}
