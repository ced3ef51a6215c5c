//! What one kind adds to the generic registry: a small strategy.
//!
//! The generic path of a write is: decode -> prune unknown fields -> type check -> schema defaults ->
//! [`Strategy::default`] -> mutating admission -> prepare -> validate -> validating admission -> commit. Everything here is
//! synchronous and pure but for [`Context`], which reads the watch cache.

use isopod_api::{field::ErrorList, gvk::Gvr, status::Status};
use serde_json::Value;

use crate::{authn::UserInfo, objects::Objects};

/// What strategies and admission plugins may look at besides the object.
pub struct Context<'a> {
    /// The resource.
    pub gvr: &'a Gvr,
    /// `""`, `"status"`, `"scale"`, ...
    pub subresource: &'a str,
    /// Namespace of the request, `""` for cluster scope.
    pub namespace: &'a str,
    /// Name in the request (empty with generateName).
    pub name: &'a str,
    /// Who asks.
    pub user: &'a UserInfo,
    /// Read access to every stored object.
    pub objects: &'a dyn Objects,
    /// dryRun=All.
    pub dry_run: bool,
}

/// One table column (`kubectl get`): upstream's tuple.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Header.
    pub name: String,
    /// `string`, `integer`, `number`, `date`, `boolean`.
    pub kind: String,
    /// `name` or empty.
    pub format: String,
    /// 0 is always shown, 1 only with -o wide.
    pub priority: i64,
    /// Help text.
    pub description: String,
}

/// Something a write holds while it is in flight (see [`Strategy::reserve`]); dropping it lets go.
pub type Reservation = Option<Box<dyn std::any::Any + Send>>;

/// The behaviour of one kind. Every method has the generic behaviour as its default.
pub trait Strategy: Send + Sync {
    /// What is done to decoded objects after the schema's defaults: fields of features that are off go, for instance.
    /// Idempotent.
    fn default(&self, _obj: &mut Value) {}

    /// Clears what clients may not set on create (status, generation is handled generically).
    fn prepare_for_create(&self, _cx: &Context<'_>, _obj: &mut Value) {}

    /// Warning headers about what `prepare_for_create` will change; they come before those of [`Strategy::warnings`].
    fn warnings_before_create(&self, _obj: &Value) -> Vec<String> {
        Vec::new()
    }

    /// Carries over what clients may not change on update. For subresource `status` the generic code has already taken
    /// spec and metadata from `old`; for the main resource it has already taken `status` from `old` when the kind has a
    /// status subresource.
    fn prepare_for_update(&self, _cx: &Context<'_>, _new: &mut Value, _old: &Value) {}

    /// Takes what the write needs from outside the object (service addresses, node ports) and fills it in. Runs right
    /// before validation. The generic code holds the answer until the write is acknowledged or has failed, then drops it.
    fn reserve(&self, _cx: &Context<'_>, _new: &mut Value, _old: Option<&Value>) -> Result<Reservation, Status> {
        Ok(None)
    }

    /// Validation of a new object; metadata is validated generically (`validation::meta::{create, update}`) and its
    /// errors come first.
    fn validate(&self, _cx: &Context<'_>, _obj: &Value) -> ErrorList {
        ErrorList::new()
    }

    /// Validation of an update beyond metadata. `cx.subresource` tells which.
    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        self.validate(cx, new)
    }

    /// Errors and, when there are none, warnings of an update: for kinds where looking for one finds the other.
    fn judge_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> (ErrorList, Vec<String>) {
        let errors = self.validate_update(cx, new, old);
        let warnings = if errors.is_empty() { self.warnings(cx, new, Some(old)) } else { Vec::new() };
        (errors, warnings)
    }

    /// Warning headers for a create or update.
    fn warnings(&self, _cx: &Context<'_>, _obj: &Value, _old: Option<&Value>) -> Vec<String> {
        Vec::new()
    }

    /// Whether a PUT to a missing object creates it.
    fn allow_create_on_update(&self) -> bool {
        false
    }

    /// Whether a PUT without resourceVersion is accepted.
    fn allow_unconditional_update(&self) -> bool {
        true
    }

    /// Default grace period in seconds for deletion (pods); `None` deletes at once.
    fn grace_period(&self, _obj: &Value) -> Option<i64> {
        None
    }

    /// Field selector values besides metadata.name and metadata.namespace: (path, value).
    fn fields(&self, _obj: &Value) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Names of the field selectors supported besides metadata.name and metadata.namespace.
    fn field_names(&self) -> &'static [&'static str] {
        &[]
    }

    /// Cells of a table row, in the order of the columns of `columns()`.
    fn cells(&self, obj: &Value, now: jiff::Timestamp) -> Vec<Value> {
        crate::registry::table::default_cells(obj, now)
    }

    /// Columns of a table; `None` for the built-in ones.
    fn columns(&self) -> Option<Vec<Column>> {
        None
    }

    /// What the rows of a table are sorted by, when it is not the name.
    fn row_rank(&self) -> Option<fn(&Value) -> i64> {
        None
    }

    /// Whether items of a list carry their kind and apiVersion.
    fn whole_items(&self) -> bool {
        false
    }

    /// Changes an object that is asked to go for the first time (finalizers of its own).
    fn prepare_for_delete(&self, _obj: &mut Value) {}

    /// Conditions of a table row (pods that ran to their end).
    fn row_conditions(&self, _obj: &Value) -> Vec<Value> {
        Vec::new()
    }
}

/// The generic behaviour, for kinds that add nothing.
pub struct Generic;
impl Strategy for Generic {}
