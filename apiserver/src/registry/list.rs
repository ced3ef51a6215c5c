//! Lists: resourceVersion semantics, selectors, paging.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use isopod_api::{
    field::{Error, ErrorList, Path},
    gvk::GroupKind,
    status::{Cause, Details, Status},
};
use serde_json::json;

use super::{Resource, Selection};
use crate::{
    cache::{Object, ResourceCache},
    server::query::Query,
};

/// How long a read waits for a revision that is not there yet.
const FRESH_WAIT: std::time::Duration = std::time::Duration::from_secs(3);

/// The objects of a list and what its metadata says.
pub(crate) struct Listing {
    /// Objects in key order.
    pub(crate) objects: Vec<Arc<Object>>,
    /// resourceVersion of the list.
    pub(crate) revision: u64,
    /// Where the next page starts.
    pub(crate) next: Option<String>,
    /// Objects behind this page, when that can be told.
    pub(crate) remaining: Option<usize>,
}

/// What a continue token says.
#[derive(Debug, PartialEq, Eq)]
struct Token {
    revision: i64,
    start: String,
}

impl Token {
    fn encode(&self) -> String {
        let json = json!({"v": "meta.k8s.io/v1", "rv": self.revision, "start": self.start});
        URL_SAFE_NO_PAD.encode(json.to_string())
    }

    fn decode(text: &str) -> Result<Self, String> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|e| {
            let at = match e {
                base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => at,
                // Go reports the start of the incomplete group.
                _ => text.len() / 4 * 4,
            };
            format!("continue key is not valid: illegal base64 data at input byte {at}")
        })?;
        let parsed = isopod_api::schema::json::parse(&bytes).map_err(|e| format!("continue key is not valid: {e}"))?;
        let value = parsed.value;
        if value["v"] != "meta.k8s.io/v1" {
            return Err("continue key is not valid: server does not recognize this encoded version".into());
        }
        let start = value["start"].as_str().unwrap_or_default().to_owned();
        let revision = value["rv"].as_i64().unwrap_or_default();
        if start.is_empty() {
            return Err("continue key is not valid: encoded start key empty (version meta.k8s.io/v1)".into());
        }
        if revision == 0 {
            return Err(
                "continue key is not valid: incorrect encoded start resourceVersion (version meta.k8s.io/v1)".into()
            );
        }
        Ok(Self { revision, start })
    }
}

/// Parses a resourceVersion parameter; empty is `None`.
pub(super) fn revision(query: &Query) -> Result<Option<u64>, Status> {
    match query.text("resourceVersion") {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| {
            Status::generic(
                400,
                "BadRequest",
                format!(
                    "resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
                ),
            )
        }),
    }
}

/// Waits until a revision has been reached.
pub(super) async fn wait_fresh(store: &ResourceCache, wanted: u64) -> Result<(), Status> {
    if tokio::time::timeout(FRESH_WAIT, store.reached(wanted)).await.is_ok() {
        return Ok(());
    }
    let mut status = Status::timeout(format!("Too large resource version: {wanted}, current: {}", store.revision()), 1);
    if let Some(details) = &mut status.details {
        details.causes.push(Cause {
            reason: "ResourceVersionTooLarge".into(),
            message: "Too large resource version".into(),
            field: String::new(),
        });
    }
    Err(status)
}

/// Checks resourceVersionMatch and sendInitialEvents as upstream's ValidateListOptions does.
pub(super) fn check_options(query: &Query, watch: bool) -> Result<(), Status> {
    let mut errors = ErrorList::new();
    let path = Path::new("resourceVersionMatch");
    let wanted = query.text("resourceVersionMatch");
    let initial = query.has("sendInitialEvents");
    let mut forbid = |message: &str| errors.push(Error::forbidden(&path, message));
    if watch {
        if initial && wanted != "NotOlderThan" {
            forbid("sendInitialEvents requires setting resourceVersionMatch to NotOlderThan");
        }
        if !initial && !wanted.is_empty() {
            forbid("resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided");
        }
        if !wanted.is_empty() && wanted != "NotOlderThan" {
            errors.push(Error::not_supported(&path, wanted, &["NotOlderThan"]));
        }
        if !wanted.is_empty() && !query.text("continue").is_empty() {
            errors.push(Error::forbidden(&path, "resourceVersionMatch is forbidden when continue is provided"));
        }
    } else if !wanted.is_empty() {
        if query.text("resourceVersion").is_empty() {
            forbid("resourceVersionMatch is forbidden unless resourceVersion is provided");
        }
        if !query.text("continue").is_empty() {
            forbid("resourceVersionMatch is forbidden when continue is provided");
        }
        if !matches!(wanted, "Exact" | "NotOlderThan") {
            errors.push(Error::not_supported(&path, wanted, &["Exact", "NotOlderThan", ""]));
        }
        if wanted == "Exact" && query.text("resourceVersion") == "0" {
            let message = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
            errors.push(Error::forbidden(&path, message));
        }
    }
    if !watch && initial {
        let message = "sendInitialEvents is forbidden for list";
        errors.push(Error::forbidden(&Path::new("sendInitialEvents"), message));
    }
    match errors.is_empty() {
        true => Ok(()),
        false => Err(Status::invalid(&GroupKind::new("meta.k8s.io", "ListOptions"), "", errors)),
    }
}

/// Lists.
pub(crate) async fn list(resource: &Resource, selection: &Selection, query: &Query) -> Result<Listing, Status> {
    if selection.reads_objects()
        && let Some(store) = &resource.store
    {
        resource.prepare(&store.snapshot(&selection.prefix, None).0.objects).await?;
    }
    let listing = selected(resource, selection, query).await?;
    resource.prepare(&listing.objects).await?;
    Ok(listing)
}

async fn selected(resource: &Resource, selection: &Selection, query: &Query) -> Result<Listing, Status> {
    let store = resource.store.as_ref().ok_or_else(Status::no_route)?;
    let limit = query.integer("limit").map_err(Status::bad_request)?.unwrap_or(0).max(0) as usize;
    query.integer("timeoutSeconds").map_err(Status::bad_request)?;
    check_options(query, false)?;
    let wanted = revision(query)?;
    let token = query.text("continue");
    if !token.is_empty() {
        if wanted.is_some_and(|r| r != 0) {
            return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
        }
        let token = Token::decode(token).map_err(|e| Status::bad_request(format!("invalid continue token: {e}")))?;
        return next_page(store, selection, &token, limit);
    }
    // A limit with an old revision, like Exact, asks for that very state.
    let exact = query.text("resourceVersionMatch") == "Exact";
    let snapshot = match wanted {
        Some(wanted) if exact => {
            wait_fresh(store, wanted).await?;
            store
                .snapshot_at(&selection.prefix, None, wanted)
                .map_err(|_| Status::expired("The resourceVersion for the provided list is too old."))?
        }
        Some(wanted) => {
            wait_fresh(store, wanted).await?;
            store.snapshot(&selection.prefix, None).0
        }
        None => match selection.exact_name() {
            Some(name) => {
                let revision = store.revision();
                let namespaced = resource.info.namespaced && selection.prefix.is_empty();
                if namespaced {
                    store.snapshot(&selection.prefix, None).0
                } else {
                    let key = format!("{}{name}", selection.prefix);
                    crate::cache::Snapshot { revision, objects: store.get(&key).into_iter().collect() }
                }
            }
            None => store.snapshot(&selection.prefix, None).0,
        },
    };
    // resourceVersion=0 asks for anything, in one piece.
    let limit = if wanted == Some(0) { 0 } else { limit };
    Ok(page(snapshot.objects, snapshot.revision, selection, limit))
}

fn next_page(store: &ResourceCache, selection: &Selection, token: &Token, limit: usize) -> Result<Listing, Status> {
    let after = format!("{}{}", selection.prefix, token.start);
    if token.revision < 0 {
        let snapshot = store.snapshot(&selection.prefix, Some(&after)).0;
        return Ok(page(snapshot.objects, snapshot.revision, selection, limit));
    }
    match store.snapshot_at(&selection.prefix, Some(&after), token.revision as u64) {
        Ok(snapshot) => Ok(page(snapshot.objects, snapshot.revision, selection, limit)),
        Err(_) => {
            let message = "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and now may show up in the list.";
            let mut status = Status::expired(message);
            let fresh = Token { revision: -1, start: token.start.clone() };
            status.metadata.insert("continue".into(), fresh.encode().into());
            Err(status.with_details(Details::default()))
        }
    }
}

fn page(objects: Vec<Arc<Object>>, revision: u64, selection: &Selection, limit: usize) -> Listing {
    let filters = selection.filters();
    if limit == 0 {
        let objects = match filters {
            true => objects.into_iter().filter(|o| selection.matches(o)).collect(),
            false => objects,
        };
        return Listing { objects, revision, next: None, remaining: None };
    }
    let total = objects.len();
    let mut taken = Vec::with_capacity(limit.min(total));
    let mut seen = 0;
    for object in objects {
        if taken.len() == limit {
            let start = format!(
                "{}\0",
                &taken.last().map_or_else(Box::default, |o: &Arc<Object>| o.key())[selection.prefix.len()..]
            );
            // With a selector there may be nothing left: only another match behind makes a next page.
            if filters && !selection.matches(&object) {
                continue;
            }
            let next = Token { revision: revision as i64, start }.encode();
            let remaining = (!filters).then_some(total - seen);
            return Listing { objects: taken, revision, next: Some(next), remaining };
        }
        seen += 1;
        if !filters || selection.matches(&object) {
            taken.push(object);
        }
    }
    Listing { objects: taken, revision, next: None, remaining: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens() {
        let token = Token { revision: 7, start: "a/b\0".into() };
        assert_eq!(Token::decode(&token.encode()).unwrap(), token);
        assert_eq!(
            Token::decode("bogus").unwrap_err(),
            "continue key is not valid: illegal base64 data at input byte 4"
        );
        let other = URL_SAFE_NO_PAD.encode("{\"v\":\"x\"}");
        assert!(Token::decode(&other).unwrap_err().contains("does not recognize"));
    }
}
