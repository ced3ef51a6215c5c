//! The versions of an object under admission: what webhooks and policies see of it, and their changes back.

use futures::future::BoxFuture;
use isopod_api::{
    gvk::{Gvk, Gvr},
    schema::{self, Definition},
    status::Status,
};
use parking_lot::Mutex;
use serde_json::Value;

use super::{Resource, STORED_ELSEWHERE, convert::convert, decode, scale};
use crate::{admission::Shape, custom::Custom};

/// The object of one request.
pub(super) struct Of<'a> {
    /// Resource.
    pub(super) resource: &'a Resource,
    /// Kind of the body when it is not the resource's.
    pub(super) body: Option<&'a Gvk>,
    /// Subresource or empty.
    pub(super) subresource: &'a str,
    /// Name in the request.
    pub(super) name: &'a str,
    /// What a webhook has converted: objects and what they are in another version.
    pub(super) converted: Mutex<Vec<(Value, Value)>>,
}

impl Of<'_> {
    /// A Scale is what clients send; the registry works on the object behind it.
    fn scaled(&self) -> bool {
        self.subresource == "scale" && self.body.is_none()
    }

    /// The custom resource the object is one of.
    fn custom(&self) -> Option<&Custom> {
        self.resource.custom.as_ref().filter(|_| self.body.is_none() && !self.scaled())
    }

    /// What is known of an object in a version, when only a webhook can know it.
    fn known(&self, object: &Value, gvk: &Gvk) -> Option<Value> {
        let converted = self.converted.lock();
        converted.iter().find(|(from, to)| from == object && Gvk::of(to) == *gvk).map(|(_, to)| to.clone())
    }

    /// A changed object of a built-in kind, or of a subresource with a kind of its own.
    fn taken(&self, mut shown: Value, current: &Value) -> Result<Value, Status> {
        if self.scaled() {
            return scale::put_back(self.resource, current, &shown, self.name);
        }
        let found = Gvk::of(&shown);
        let known = schema::lookup(&found).ok_or_else(|| Status::internal(format!("no kind {found} is known")))?;
        schema::decode(known, &mut shown, &[]).map_err(Status::internal)?;
        schema::default(known, &mut shown);
        let mut taken = convert(shown, self.inner());
        if self.body.is_none() {
            decode::complete(self.resource, &mut taken);
        }
        Ok(taken)
    }

    /// The kind the registry works on.
    fn inner(&self) -> &Gvk {
        match (self.body, &self.resource.custom) {
            (Some(body), _) => body,
            (None, Some(_)) => &self.resource.gvk,
            (None, None) => &self.resource.storage,
        }
    }
}

impl Shape for Of<'_> {
    fn kind(&self) -> Gvk {
        match self.body {
            Some(body) => body.clone(),
            None if self.scaled() => scale::gvk(),
            None => self.resource.gvk.clone(),
        }
    }

    fn versions(&self) -> Vec<(Gvr, Gvk)> {
        let own = &self.resource.gvr;
        let of = |group: &str, version: &str| {
            let gvk = if self.scaled() || self.body.is_some() {
                self.kind()
            } else {
                Gvk::new(group, version, &self.resource.gvk.kind)
            };
            (Gvr::new(group, version, &own.resource), gvk)
        };
        if let Some(custom) = &self.resource.custom {
            let others = custom.definition.versions.iter().filter(|v| v.served && v.gvk.version != own.version);
            return others.map(|v| of(&v.gvk.group, &v.gvk.version)).collect();
        }
        let mut out = Vec::new();
        for (group, version, plural, stored_group, stored_version) in STORED_ELSEWHERE {
            if plural != own.resource {
                continue;
            }
            if (group, version) == (own.group.as_str(), own.version.as_str()) {
                out.push(of(stored_group, stored_version));
            } else if (stored_group, stored_version) == (own.group.as_str(), own.version.as_str()) {
                out.push(of(group, version));
            }
        }
        out
    }

    fn prepare<'a>(&'a self, objects: [&'a Value; 2], gvk: &'a Gvk) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(async move {
            let Some(custom) = self.custom().filter(|custom| custom.definition.conversion.is_some()) else {
                return Ok(());
            };
            for object in objects {
                if object.is_null() || Gvk::of(object) == *gvk || self.known(object, gvk).is_some() {
                    continue;
                }
                let shown = custom.convert(object.clone(), gvk).await?;
                self.converted.lock().push((object.clone(), shown));
            }
            Ok(())
        })
    }

    fn show(&self, object: &Value, gvk: &Gvk) -> Result<Value, Status> {
        if self.scaled() {
            return Ok(scale::seen(self.resource, object));
        }
        match self.custom() {
            Some(custom) if custom.definition.conversion.is_some() && Gvk::of(object) != *gvk => self
                .known(object, gvk)
                .ok_or_else(|| Status::internal(format!("the object was not converted to {gvk}"))),
            Some(custom) => Ok(custom.in_version(object.clone(), gvk)),
            None => Ok(convert(object.clone(), gvk)),
        }
    }

    fn take<'a>(&'a self, shown: Value, current: &'a Value) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            let Some(custom) = self.custom() else { return self.taken(shown, current) };
            let mut taken = custom.convert(shown, self.inner()).await?;
            self.resource.schema(self.inner()).decode(&mut taken, &[]).map_err(Status::internal)?;
            decode::complete(self.resource, &mut taken);
            Ok(taken)
        })
    }

    fn definition(&self, gvk: &Gvk) -> Option<&Definition> {
        match self.custom() {
            Some(custom) => Some(custom.definition.version(&gvk.version)?.schema.definition()),
            None => schema::lookup(gvk),
        }
    }
}
