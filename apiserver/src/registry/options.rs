//! Options of writes and deletes: read from query and body, checked with upstream's messages.

use isopod_api::{
    field::{Error, ErrorList, Path},
    gvk::GroupKind,
    schema,
    status::Status,
};
use serde_json::{Map, Value, json};

use super::decode;
use crate::server::query::Query;

/// What happens to fields nobody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FieldValidation {
    /// They are dropped.
    Ignore,
    /// They are dropped with a warning.
    Warn,
    /// The request is refused.
    Strict,
}

/// Options of create, update and patch.
#[derive(Debug, Clone)]
pub(crate) struct WriteOptions {
    /// dryRun=All.
    pub(crate) dry_run: bool,
    /// Field manager: given, or from the user agent.
    pub(crate) manager: String,
    /// force=true (apply only).
    pub(crate) force: bool,
    /// What happens to unknown fields.
    pub(crate) validation: FieldValidation,
    /// The options as an object, for admission.
    pub(crate) object: Value,
}

impl WriteOptions {
    /// Options of the server's own writes.
    pub(crate) fn internal() -> Self {
        Self {
            dry_run: false,
            manager: "kube-apiserver".into(),
            force: false,
            validation: FieldValidation::Ignore,
            object: json!({}),
        }
    }

    /// Reads and checks the query. `kind` is `CreateOptions`, `UpdateOptions` or `PatchOptions`; `apply` is for apply
    /// patches only.
    pub(crate) fn read(query: &Query, user_agent: &str, kind: &str, apply: bool) -> Result<Self, Status> {
        let mut errors = ErrorList::new();
        let given = query.text("fieldManager");
        let force = query.get("force");
        if kind == "PatchOptions" {
            if apply && given.is_empty() {
                errors.push(Error::required(&Path::new("fieldManager"), "is required for apply patch"));
            }
            if !apply && force.is_some() {
                errors.push(Error::forbidden(&Path::new("force"), "may not be specified for non-apply patch"));
            }
        }
        if given.len() > 128 {
            errors.push(Error::too_long(&Path::new("fieldManager"), 128));
        }
        for (at, c) in given.char_indices().filter(|(_, c)| c.is_control()) {
            let detail =
                format!("should not contain unprintable characters (found U+{:04X} at position {at})", c as u32);
            errors.push(Error::invalid(&Path::new("fieldManager"), given, detail));
        }
        let dry_run = dry_run(&query.all("dryRun"), &mut errors);
        let validation = match query.text("fieldValidation") {
            "Ignore" => FieldValidation::Ignore,
            "" | "Warn" => FieldValidation::Warn,
            "Strict" => FieldValidation::Strict,
            other => {
                let supported = ["", "Ignore", "Strict", "Warn"];
                errors.push(Error::not_supported(&Path::new("fieldValidation"), other, &supported));
                FieldValidation::Warn
            }
        };
        refuse(kind, errors)?;
        let manager = if given.is_empty() { manager_of(user_agent) } else { given.to_owned() };
        // To admission a patch is an update.
        let admitted = if kind == "PatchOptions" { "UpdateOptions" } else { kind };
        let mut object = json!({"kind": admitted, "apiVersion": "meta.k8s.io/v1"});
        if dry_run {
            object["dryRun"] = json!(["All"]);
        }
        if !given.is_empty() {
            object["fieldManager"] = given.into();
        }
        if query.has("fieldValidation") {
            object["fieldValidation"] = query.text("fieldValidation").into();
        }
        Ok(Self { dry_run, manager, force: query.flag("force"), validation, object })
    }
}

/// The part of a user agent in front of the version.
fn manager_of(user_agent: &str) -> String {
    let prefix: String = user_agent.split('/').next().unwrap_or("").chars().filter(|c| !c.is_control()).collect();
    let mut end = prefix.len().min(128);
    while !prefix.is_char_boundary(end) {
        end -= 1;
    }
    match &prefix[..end] {
        "" => "unknown".into(),
        name => name.into(),
    }
}

fn dry_run(values: &[&str], errors: &mut ErrorList) -> bool {
    if values.iter().any(|v| *v != "All") {
        errors.push(Error::not_supported(&Path::new("dryRun"), json!(values), &["All"]));
    }
    !values.is_empty()
}

fn refuse(kind: &str, errors: ErrorList) -> Result<(), Status> {
    match errors.is_empty() {
        true => Ok(()),
        false => Err(Status::invalid(&GroupKind::new("meta.k8s.io", kind), "", errors)),
    }
}

/// DeleteOptions from the body, or from the query when there is none.
pub(crate) fn delete_options(body: &[u8], content_type: Option<&str>, query: &Query) -> Result<Value, Status> {
    let mut options = if body.is_empty() {
        from_query(query)?
    } else {
        let decoded = decode::body(body, content_type)?;
        let kind = decoded.get("kind").and_then(Value::as_str).unwrap_or("DeleteOptions");
        let version = decoded.get("apiVersion").and_then(Value::as_str).unwrap_or("v1");
        if kind != "DeleteOptions" {
            return Err(Status::bad_request(format!(
                "no kind \"{kind}\" is registered for version \"{version}\" in scheme \"k8s.io/apimachinery/pkg/apis/meta/internalversion/scheme/register.go:27\""
            )));
        }
        let mut decoded = decoded;
        if let Some(definition) = schema::definition("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions") {
            schema::decode(definition, &mut decoded, &[]).map_err(|e| Status::bad_request(e.to_string()))?;
        }
        decoded
    };
    check_delete(&options)?;
    (options["kind"], options["apiVersion"]) = ("DeleteOptions".into(), "meta.k8s.io/v1".into());
    Ok(options)
}

fn from_query(query: &Query) -> Result<Value, Status> {
    let mut options = Map::new();
    if let Some(seconds) = query.integer("gracePeriodSeconds").map_err(Status::bad_request)? {
        options.insert("gracePeriodSeconds".into(), seconds.into());
    }
    if let Some(policy) = query.get("propagationPolicy") {
        options.insert("propagationPolicy".into(), policy.into());
    }
    if query.has("orphanDependents") {
        options.insert("orphanDependents".into(), query.flag("orphanDependents").into());
    }
    let dry_run = query.all("dryRun");
    if !dry_run.is_empty() {
        options.insert("dryRun".into(), json!(dry_run));
    }
    Ok(options.into())
}

fn check_delete(options: &Value) -> Result<(), Status> {
    let mut errors = ErrorList::new();
    let policy = options.get("propagationPolicy").filter(|p| !p.is_null());
    if policy.is_some() && options.get("orphanDependents").is_some_and(|o| !o.is_null()) {
        let detail = "orphanDependents and deletionPropagation cannot be both set";
        errors.push(Error::invalid(&Path::new("propagationPolicy"), json!(policy), detail));
    }
    if let Some(text) = policy.and_then(Value::as_str)
        && !matches!(text, "Foreground" | "Background" | "Orphan")
    {
        let supported = ["Background", "Foreground", "Orphan"];
        errors.push(Error::not_supported(&Path::new("propagationPolicy"), text, &supported));
    }
    let values: Vec<&str> =
        options.get("dryRun").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    dry_run(&values, &mut errors);
    refuse("DeleteOptions", errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_options() {
        let message =
            |q: &str, kind, apply| WriteOptions::read(&Query::parse(q), "golden/1", kind, apply).unwrap_err().message;
        assert_eq!(
            message("dryRun=Some", "CreateOptions", false),
            "CreateOptions.meta.k8s.io \"\" is invalid: dryRun: Unsupported value: [\"Some\"]: supported values: \"All\""
        );
        assert_eq!(
            message("", "PatchOptions", true),
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch"
        );
        assert!(message("force=true", "PatchOptions", false).ends_with("may not be specified for non-apply patch"));
    }

    #[test]
    fn the_manager_is_the_program() {
        let manager = |agent| WriteOptions::read(&Query::default(), agent, "CreateOptions", false).unwrap().manager;
        assert_eq!((manager("kubectl/v1.36.2 (linux/amd64)").as_str(), manager("").as_str()), ("kubectl", "unknown"));
    }
}
