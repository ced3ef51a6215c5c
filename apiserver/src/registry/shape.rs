//! The versions of an object under admission: what webhooks and policies see of it, and their changes back.

use isopod_api::{
    gvk::{Gvk, Gvr},
    schema::{self, Definition},
    status::Status,
};
use serde_json::Value;

use super::{Resource, STORED_ELSEWHERE, convert::convert, decode, scale};
use crate::admission::Shape;

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
}

impl Of<'_> {
    /// A Scale is what clients send; the registry works on the object behind it.
    fn scaled(&self) -> bool {
        self.subresource == "scale" && self.body.is_none()
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

    fn show(&self, object: &Value, gvk: &Gvk) -> Result<Value, Status> {
        if self.scaled() {
            return Ok(scale::seen(self.resource, object));
        }
        match &self.resource.custom {
            Some(custom) if self.body.is_none() => Ok(custom.in_version(object.clone(), gvk)),
            _ => Ok(convert(object.clone(), gvk)),
        }
    }

    fn take(&self, mut shown: Value, current: &Value) -> Result<Value, Status> {
        let found = Gvk::of(&shown);
        let unfit = |error: schema::DecodeError| Status::internal(error);
        if self.scaled() {
            return scale::put_back(self.resource, current, &shown, self.name);
        }
        if let Some(custom) = self.resource.custom.as_ref().filter(|_| self.body.is_none()) {
            shown = custom.in_version(shown, self.inner());
            self.resource.schema(self.inner()).decode(&mut shown, &[]).map_err(unfit)?;
            decode::complete(self.resource, &mut shown);
            return Ok(shown);
        }
        let known = schema::lookup(&found).ok_or_else(|| Status::internal(format!("no kind {found} is known")))?;
        schema::decode(known, &mut shown, &[]).map_err(unfit)?;
        schema::default(known, &mut shown);
        let mut taken = convert(shown, self.inner());
        if self.body.is_none() {
            decode::complete(self.resource, &mut taken);
        }
        Ok(taken)
    }

    fn definition(&self, gvk: &Gvk) -> Option<&Definition> {
        match &self.resource.custom {
            Some(custom) if self.body.is_none() && !self.scaled() => {
                Some(custom.definition.version(&gvk.version)?.schema.definition())
            }
            _ => schema::lookup(gvk),
        }
    }
}
