//! Running the admission plugins over one write.

use isopod_api::{gvk::Gvk, meta, schema, status::Status};
use parking_lot::Mutex;
use serde_json::Value;

use super::{Registry, Resource, Writer};
use super::{managed, metadata, shape};
use crate::{
    admission::{Operation, Reinvocation, Request},
    authn::UserInfo,
    server::request::RequestInfo,
};

/// What is admitted.
pub(super) struct Admission<'a> {
    /// Operation.
    pub(super) operation: Operation,
    /// Resource.
    pub(super) resource: &'a Resource,
    /// Kind of the body when it is not the resource's.
    pub(super) gvk: Option<&'a Gvk>,
    /// Subresource or empty.
    pub(super) subresource: &'a str,
    /// Namespace or empty.
    pub(super) namespace: &'a str,
    /// Name or empty.
    pub(super) name: &'a str,
    /// The stored object (null on create).
    pub(super) old: &'a Value,
}

/// Which of the two passes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// May change the object.
    Mutating,
    /// Sees the final object.
    Validating,
}

impl Registry {
    /// Asks every plugin in order; the first refusal ends the write.
    pub(super) async fn admit(
        &self,
        pass: Pass,
        admission: &Admission<'_>,
        object: &mut Value,
        writer: &mut Writer<'_>,
    ) -> Result<(), Status> {
        if !writer.admission {
            return Ok(());
        }
        let shape = shape::Of {
            resource: admission.resource,
            body: admission.gvk,
            subresource: admission.subresource,
            name: admission.name,
            converted: Mutex::default(),
        };
        let mut reinvocation = Reinvocation::default();
        let mut request = Request {
            operation: admission.operation,
            gvr: &admission.resource.gvr,
            gvk: admission.gvk.unwrap_or(&admission.resource.gvk),
            subresource: admission.subresource,
            namespace: admission.namespace,
            name: admission.name,
            user: writer.user,
            object,
            old: admission.old,
            options: &writer.options.object,
            dry_run: writer.options.dry_run,
            objects: self,
            warnings: &mut writer.warnings,
            shape: &shape,
            authorizer: self.authorizer.get(),
            reinvocation: &mut reinvocation,
        };
        loop {
            for plugin in &self.plugins {
                match pass {
                    Pass::Mutating => plugin.admit(&mut request).await?,
                    Pass::Validating => plugin.validate(&mut request).await?,
                }
            }
            // Once more after a policy or webhook has changed the object, never a third time.
            if !request.reinvocation.needed || request.reinvocation.again {
                return Ok(());
            }
            request.reinvocation.again = true;
        }
    }

    /// Admits a connection: its options are the object. What plugins make of them is not used.
    pub(crate) async fn admit_connect(
        &self,
        resource: &Resource,
        info: &RequestInfo,
        mut options: Value,
        user: &UserInfo,
    ) -> Result<(), Status> {
        let gvk = Gvk::of(&options);
        let admission = Admission {
            operation: Operation::Connect,
            resource,
            gvk: Some(&gvk),
            subresource: &info.subresource,
            namespace: &info.namespace,
            name: &info.name,
            old: &Value::Null,
        };
        let mut writer = Writer { admission: true, ..Writer::internal(user) };
        writer.options.object = Value::Null;
        self.admit(Pass::Mutating, &admission, &mut options, &mut writer).await?;
        self.admit(Pass::Validating, &admission, &mut options, &mut writer).await
    }

    /// Defaults and admits the body of a create that is answered instead of stored.
    pub(crate) async fn admit_create(
        &self,
        resource: &Resource,
        info: &RequestInfo,
        gvk: &Gvk,
        mut object: Value,
        writer: &mut Writer<'_>,
    ) -> Result<Value, Status> {
        if let Some(definition) = schema::lookup(gvk) {
            schema::default(definition, &mut object);
        }
        if resource.info.namespaced {
            metadata::place(resource, &info.namespace, &mut object)?;
        }
        let review = info.subresource.is_empty() && schema::lookup(gvk).is_some_and(|d| d.field("metadata").is_some());
        if review && gvk.group == "authorization.k8s.io" {
            managed::track(resource, gvk, None, &mut object, &writer.options.manager, "");
        }
        let name = if info.name.is_empty() { meta::name(&object).to_owned() } else { info.name.clone() };
        let admission = Admission {
            operation: Operation::Create,
            resource,
            gvk: Some(gvk),
            subresource: &info.subresource,
            namespace: &info.namespace,
            name: &name,
            old: &Value::Null,
        };
        self.admit(Pass::Mutating, &admission, &mut object, writer).await?;
        self.admit(Pass::Validating, &admission, &mut object, writer).await?;
        Ok(object)
    }
}
