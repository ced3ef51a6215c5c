//! Impersonation: `Impersonate-User` and friends, each checked against the authorizer.

use std::collections::BTreeMap;

use http::HeaderMap;
use isopod_api::{gvk::GroupResource, status::Status};

use super::{ALL_AUTHENTICATED, ALL_UNAUTHENTICATED, ANONYMOUS, UserInfo};
use crate::{
    authz::{Attributes, Authorizer, Decision},
    server::{forbidden, query::decode},
};

const SERVICE_ACCOUNT: &str = "system:serviceaccount:";

/// The user a request is to run as.
pub(crate) fn impersonate(
    authorizer: &dyn Authorizer,
    user: UserInfo,
    headers: &HeaderMap,
) -> Result<UserInfo, Status> {
    let all = |name: &str| -> Vec<String> {
        headers.get_all(name).iter().filter_map(|v| v.to_str().ok()).map(str::to_owned).collect()
    };
    let name = all("impersonate-user").into_iter().next().unwrap_or_default();
    let groups = all("impersonate-group");
    let uid = all("impersonate-uid").into_iter().next().unwrap_or_default();
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, value) in headers {
        if let (Some(key), Ok(value)) = (key.as_str().strip_prefix("impersonate-extra-"), value.to_str()) {
            extra.entry(decode(key)).or_default().push(value.to_owned());
        }
    }
    if name.is_empty() {
        if groups.is_empty() && uid.is_empty() && extra.is_empty() {
            return Ok(user);
        }
        let quoted: Vec<String> = groups.iter().map(|g| format!("{g:?}")).collect();
        let groups =
            if quoted.is_empty() { "[]string(nil)".into() } else { format!("[]string{{{}}}", quoted.join(", ")) };
        let extra = if extra.is_empty() { "map[string][]string(nil)".into() } else { format!("{extra:?}") };
        return Err(Status::bad_request(format!(
            "requested &user.DefaultInfo{{Name:\"\", UID:{uid:?}, Groups:{groups}, Extra:{extra}}} without impersonating a user name"
        )));
    }
    let check = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let attributes = Attributes {
            user: user.clone(),
            verb: "impersonate".into(),
            resource_request: true,
            group: group.into(),
            version: "v1".into(),
            resource: resource.into(),
            subresource: subresource.into(),
            namespace: namespace.into(),
            name: name.into(),
            path: String::new(),
        };
        match authorizer.authorize(&attributes) {
            Decision::Allow(_) => Ok(()),
            Decision::NoOpinion(reason) | Decision::Deny(reason) => {
                let gr = GroupResource::new(group, resource);
                Err(Status::forbidden(&gr, name, forbidden::message(&attributes, &reason)))
            }
        }
    };
    let account = name.strip_prefix(SERVICE_ACCOUNT).and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, account)) => check("", "serviceaccounts", "", namespace, account)?,
        None => check("", "users", "", "", &name)?,
    }
    for group in &groups {
        check("", "groups", "", "", group)?;
    }
    if !uid.is_empty() {
        check("authentication.k8s.io", "uids", "", "", &uid)?;
    }
    for (key, values) in &extra {
        for value in values {
            check("authentication.k8s.io", "userextras", key, "", value)?;
        }
    }
    let mut groups = groups;
    if let Some((namespace, _)) = account.filter(|_| groups.is_empty()) {
        groups = vec!["system:serviceaccounts".into(), format!("system:serviceaccounts:{namespace}")];
    }
    let unauthenticated = groups.iter().any(|g| g == ALL_UNAUTHENTICATED);
    if name == ANONYMOUS && !unauthenticated {
        groups.push(ALL_UNAUTHENTICATED.into());
    } else if !unauthenticated && !groups.iter().any(|g| g == ALL_AUTHENTICATED) {
        groups.push(ALL_AUTHENTICATED.into());
    }
    Ok(UserInfo { name, uid, groups, extra })
}
