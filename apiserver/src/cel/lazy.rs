//! `variables`: expressions with names, evaluated when they are first asked for and then remembered.

use std::{fmt, sync::Arc};

use kube_cel::cel::{ExecutionError, FunctionContext, ResolveResult, Value as Cel, objects::Opaque};
use parking_lot::Mutex;

use super::{Program, functions::explain};

/// Under this name a scope holds its variables.
pub(super) const SLOT: &str = "@variables";

/// A named expression; what is wrong with it when it does not compile.
pub(crate) struct Variable {
    /// Name.
    pub(crate) name: String,
    /// Compiled expression.
    pub(crate) program: Result<Program, String>,
}

/// The variables of one scope.
pub(super) struct Lazy {
    variables: Arc<[Variable]>,
    known: Mutex<Vec<Option<ResolveResult>>>,
}

impl Lazy {
    pub(super) fn new(variables: Arc<[Variable]>) -> Self {
        let known = Mutex::new(vec![None; variables.len()]);
        Self { variables, known }
    }

    fn get(&self, name: &str, context: &FunctionContext) -> ResolveResult {
        let missing = || ExecutionError::UndeclaredReference(Arc::new(format!("variables.{name}")));
        let at = self.variables.iter().position(|v| v.name == name).ok_or_else(missing)?;
        if let Some(known) = &self.known.lock()[at] {
            return known.clone();
        }
        let failed = |what: &str, error: &str| {
            ExecutionError::function_error(name, format!("composited variable \"{name}\" fails to {what}: {error}"))
        };
        let found = match &self.variables[at].program {
            Ok(program) => program.resolve(context.ptx).map_err(|e| failed("evaluate", &explain(&e))),
            Err(error) => Err(failed("compile", error)),
        };
        self.known.lock()[at] = Some(found.clone());
        found
    }
}

impl PartialEq for Lazy {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.variables, &other.variables)
    }
}

impl Eq for Lazy {}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lazy").finish_non_exhaustive()
    }
}

impl Opaque for Lazy {
    fn runtime_type_name(&self) -> &str {
        "kubernetes.variables"
    }
}

/// `@variable(name)`.
pub(super) fn variable(context: &FunctionContext, name: Arc<String>) -> ResolveResult {
    let slot = context.ptx.get_variable(SLOT).ok_or(ExecutionError::NoSuchOverload)?;
    match Cel::try_from(slot.as_ref())? {
        Cel::Opaque(opaque) => match opaque.downcast_ref::<Lazy>() {
            Some(lazy) => lazy.get(&name, context),
            None => Err(ExecutionError::NoSuchOverload),
        },
        _ => Err(ExecutionError::NoSuchOverload),
    }
}
