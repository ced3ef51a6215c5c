//! Content of configMap, secret, downwardAPI and projected volumes.
//!
//! [`Sources`] lists what a volume is made from; [`payload`] makes its content and tells when to make it again.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, KeyToPath, Pod, Volume};

use super::atomic::{File, Payload};
use crate::{
    context::Context,
    objects::{Held, Object, ObjectKind, ObjectRef},
    spec::{env::not_found, field},
    tokens::{self, Token, Wish},
};

/// One source of a volume's content.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    Object { key: ObjectRef, items: Option<Vec<KeyToPath>>, optional: bool },
    Downward { items: Vec<DownwardAPIVolumeFile> },
    Token { wish: Wish, path: String },
}

/// A volume made of content.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sources {
    pub(crate) mode: u32,
    pub(crate) list: Vec<Source>,
}

fn mode(m: Option<i32>, otherwise: u32) -> u32 {
    m.and_then(|m| u32::try_from(m).ok()).unwrap_or(otherwise)
}

/// The sources of a volume, if it is one made of content.
pub(crate) fn sources(namespace: &str, v: &Volume) -> Option<Sources> {
    let key = |kind, name: &str| ObjectRef { kind, namespace: namespace.into(), name: name.into() };
    if let Some(c) = &v.config_map {
        let key = key(ObjectKind::ConfigMap, &c.name);
        let list = vec![Source::Object { key, items: c.items.clone(), optional: c.optional == Some(true) }];
        return Some(Sources { mode: mode(c.default_mode, 0o644), list });
    }
    if let Some(s) = &v.secret {
        let key = key(ObjectKind::Secret, s.secret_name.as_deref().unwrap_or(""));
        let list = vec![Source::Object { key, items: s.items.clone(), optional: s.optional == Some(true) }];
        return Some(Sources { mode: mode(s.default_mode, 0o644), list });
    }
    if let Some(d) = &v.downward_api {
        let list = vec![Source::Downward { items: d.items.clone().unwrap_or_default() }];
        return Some(Sources { mode: mode(d.default_mode, 0o644), list });
    }
    let p = v.projected.as_ref()?;
    let mut list = Vec::new();
    for s in p.sources.iter().flatten() {
        if let Some(c) = &s.config_map {
            let key = key(ObjectKind::ConfigMap, &c.name);
            list.push(Source::Object { key, items: c.items.clone(), optional: c.optional == Some(true) });
        }
        if let Some(c) = &s.secret {
            let key = key(ObjectKind::Secret, &c.name);
            list.push(Source::Object { key, items: c.items.clone(), optional: c.optional == Some(true) });
        }
        if let Some(d) = &s.downward_api {
            list.push(Source::Downward { items: d.items.clone().unwrap_or_default() });
        }
        if let Some(t) = &s.service_account_token {
            let wish = Wish {
                audience: t.audience.clone().filter(|a| !a.is_empty()),
                seconds: t.expiration_seconds.unwrap_or(3600).max(600),
            };
            list.push(Source::Token { wish, path: t.path.clone() });
        }
    }
    Some(Sources { mode: mode(p.default_mode, 0o644), list })
}

/// Objects that the sources refer to.
pub(crate) fn references(s: &Sources) -> impl Iterator<Item = &ObjectRef> {
    s.list.iter().filter_map(|s| match s {
        Source::Object { key, .. } => Some(key),
        _ => None,
    })
}

/// Tokens got so far, by wish.
pub(crate) type Tokens = BTreeMap<String, Token>;

/// Makes the content. `held` has every referenced object, `tokens` keeps tokens that are still good.
pub(crate) async fn payload(
    ctx: &Context,
    pod: &Pod,
    s: &Sources,
    held: &BTreeMap<ObjectRef, Held>,
    tokens: &mut Tokens,
    addresses: &field::Addresses,
) -> Result<Payload, String> {
    let mut out = Payload::new();
    for source in &s.list {
        match source {
            Source::Object { key, items, optional } => {
                let object = match held.get(key) {
                    Some(h) => h.get().await?,
                    None => None,
                };
                match object {
                    Some(o) => object_files(&mut out, key, &o, items.as_deref(), *optional, s.mode)?,
                    None if *optional => {}
                    None => return Err(not_found(key)),
                }
            }
            Source::Downward { items } => {
                for i in items {
                    let text = if let Some(f) = &i.field_ref {
                        field::field(pod, addresses, &f.field_path)?
                    } else if let Some(r) = &i.resource_field_ref {
                        field::resource(pod, r, "", ctx.machine.allocatable)?
                    } else {
                        continue;
                    };
                    let file = File { data: text.into_bytes(), mode: mode(i.mode, s.mode), uid: None };
                    out.insert(i.path.clone(), file);
                }
            }
            Source::Token { wish, path } => {
                let name = format!("{}|{:?}|{}", path, wish.audience, wish.seconds);
                let good = tokens.get(&name).filter(|t| t.refresh > Instant::now()).cloned();
                let token = match good {
                    Some(t) => t,
                    None => {
                        let t = tokens::request(&ctx.api, pod, wish).await?;
                        tokens.insert(name, t.clone());
                        t
                    }
                };
                let uid = single_user(pod);
                let group = pod.spec.as_ref().and_then(|s| s.security_context.as_ref()?.fs_group);
                let mode = if uid.is_some() || group.is_some() { 0o600 } else { s.mode };
                out.insert(path.clone(), File { data: token.text.into_bytes(), mode, uid });
            }
        }
    }
    Ok(out)
}

fn object_files(
    out: &mut Payload,
    key: &ObjectRef,
    object: &Arc<Object>,
    items: Option<&[KeyToPath]>,
    optional: bool,
    default: u32,
) -> Result<(), String> {
    match items.filter(|i| !i.is_empty()) {
        None => {
            for (k, v) in &object.keys {
                out.insert(k.clone(), File { data: v.clone(), mode: default, uid: None });
            }
        }
        Some(items) => {
            for i in items {
                match object.keys.get(&i.key) {
                    Some(v) => {
                        out.insert(i.path.clone(), File { data: v.clone(), mode: mode(i.mode, default), uid: None });
                    }
                    None if optional => {}
                    None => {
                        let kind = if key.kind == ObjectKind::ConfigMap { "configmap" } else { "secret" };
                        return Err(format!("{kind} references non-existent {kind} key: {}", i.key));
                    }
                }
            }
        }
    }
    Ok(())
}

/// The one user all containers run as, if the spec says so.
fn single_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let default = spec.security_context.as_ref().and_then(|s| s.run_as_user);
    let mut users =
        crate::qos::all_containers(spec).map(|c| c.security_context.as_ref().and_then(|s| s.run_as_user).or(default));
    let first = users.next()??;
    users.all(|u| u == Some(first)).then(|| u32::try_from(first).ok()).flatten()
}
