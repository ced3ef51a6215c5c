//! The environments of admission policies and of webhooks' match conditions.

use serde_json::Value;

use super::{Environment, Type, Variable};

/// Which optional variables there are.
#[derive(Clone, Copy)]
pub(crate) struct Offers {
    /// `params`.
    pub(crate) params: bool,
    /// `authorizer`.
    pub(crate) authorizer: bool,
}

/// What expressions about a request can name.
pub(crate) fn environment(offers: Offers) -> Environment {
    let mut environment = Environment::default()
        .with("object", Type::Dyn)
        .with("oldObject", Type::Dyn)
        .with("request", request())
        .with("namespaceObject", namespace());
    if offers.params {
        environment = environment.with("params", Type::Dyn);
    }
    if offers.authorizer {
        let check = Type::named("kubernetes.authorization.ResourceCheck");
        environment = environment
            .with("authorizer", Type::named("kubernetes.authorization.Authorizer"))
            .with("authorizer.requestResource", check);
    }
    environment
}

fn request() -> Type {
    let text = || Type::String;
    let kind =
        || Type::object("kubernetes.GroupVersionKind", [("group", text()), ("version", text()), ("kind", text())]);
    let resource = || {
        let fields = [("group", text()), ("version", text()), ("resource", text())];
        Type::object("kubernetes.GroupVersionResource", fields)
    };
    let user = [
        ("username", text()),
        ("uid", text()),
        ("groups", Type::list(text())),
        ("extra", Type::map(Type::list(text()))),
    ];
    let fields = [
        ("kind", kind()),
        ("resource", resource()),
        ("subResource", text()),
        ("requestKind", kind()),
        ("requestResource", resource()),
        ("requestSubResource", text()),
        ("name", text()),
        ("namespace", text()),
        ("operation", text()),
        ("userInfo", Type::object("kubernetes.UserInfo", user)),
        ("dryRun", Type::Bool),
        ("options", Type::Dyn),
    ];
    Type::object("kubernetes.AdmissionRequest", fields)
}

/// The fields of namespaces that expressions see.
pub(crate) const NAMESPACE_METADATA: [&str; 12] = [
    "name",
    "generateName",
    "namespace",
    "labels",
    "annotations",
    "uid",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "resourceVersion",
    "finalizers",
];

fn namespace() -> Type {
    let fields = NAMESPACE_METADATA.map(|name| {
        let found = match name {
            "labels" | "annotations" => Type::map(Type::String),
            "creationTimestamp" | "deletionTimestamp" => Type::Timestamp,
            "deletionGracePeriodSeconds" | "generation" => Type::Int,
            "finalizers" => Type::list(Type::String),
            _ => Type::String,
        };
        (if name == "uid" { "UID" } else { name }, found)
    });
    let spec = Type::object("kubernetes.NamespaceSpec", [("finalizers", Type::list(Type::String))]);
    let status = Type::object("kubernetes.NamespaceStatus", [("phase", Type::String)]);
    let metadata = Type::object("kubernetes.NamespaceMetadata", fields);
    Type::object("kubernetes.Namespace", [("metadata", metadata), ("spec", spec), ("status", status)])
}

/// The environments of one policy's expressions, and its variables.
pub(crate) struct Environments {
    /// Of match conditions.
    pub(crate) conditions: Environment,
    /// Of validations, mutations and audit annotations.
    pub(crate) expressions: Environment,
    /// Of messages.
    pub(crate) messages: Environment,
    /// The variables, in order; each sees those before it.
    pub(crate) variables: Vec<Variable>,
}

impl Environments {
    /// From the spec of a policy.
    pub(crate) fn new(spec: &Value, mutating: bool) -> Self {
        let params = spec["paramKind"].is_object();
        let conditions = environment(Offers { params, authorizer: true });
        let mut expressions = conditions.clone();
        let mut messages = environment(Offers { params, authorizer: false });
        if mutating {
            expressions = expressions.with_mutations();
        }
        let (expressions, variables) = with_variables(expressions, spec);
        for variable in &variables {
            messages = messages.with_member(&variable.name, output(variable));
        }
        Self { conditions, expressions, messages, variables }
    }
}

fn output(variable: &Variable) -> Type {
    variable.program.as_ref().map_or(Type::Dyn, |program| program.output.clone())
}

/// An environment with the variables of a policy.
pub(crate) fn with_variables(mut environment: Environment, spec: &Value) -> (Environment, Vec<Variable>) {
    let mut variables = Vec::new();
    for variable in spec["variables"].as_array().into_iter().flatten() {
        let name = variable["name"].as_str().unwrap_or_default().to_owned();
        let program = environment.compile(variable["expression"].as_str().unwrap_or_default(), &[]);
        let variable = Variable { name, program };
        environment = environment.with_member(&variable.name, output(&variable));
        variables.push(variable);
    }
    (environment, variables)
}
