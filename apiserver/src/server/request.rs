//! What a request is about: upstream's request info, from method, path and query alone.

use super::query::{Query, decode};

/// The attributes of a request that authorization and routing look at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RequestInfo {
    /// Whether it addresses a resource (and not, say, `/version` or discovery).
    pub(crate) resource_request: bool,
    /// `get`, `list`, ...; for other requests the lower-case method.
    pub(crate) verb: String,
    /// Decoded path.
    pub(crate) path: String,
    /// API group.
    pub(crate) group: String,
    /// API version.
    pub(crate) version: String,
    /// Namespace.
    pub(crate) namespace: String,
    /// Resource.
    pub(crate) resource: String,
    /// Subresource.
    pub(crate) subresource: String,
    /// Name.
    pub(crate) name: String,
    /// Whether the path has the `namespaces/NS` part.
    pub(crate) namespaced: bool,
    /// What follows the subresource, with slashes as in the request.
    pub(crate) rest: String,
}

impl RequestInfo {
    /// Reads method, raw path and query.
    pub(crate) fn new(method: &str, raw_path: &str, query: &Query) -> Self {
        let mut info = Self { verb: method.to_lowercase(), path: decode(raw_path), ..Self::default() };
        let trimmed = raw_path.trim_matches('/');
        let mut parts: Vec<String> = trimmed.split('/').map(decode).collect();
        let skip = match parts[0].as_str() {
            "api" if parts.len() >= 3 => {
                info.version = parts[1].clone();
                2
            }
            "apis" if parts.len() >= 4 => {
                info.group = parts[1].clone();
                info.version = parts[2].clone();
                3
            }
            _ => return info,
        };
        info.resource_request = true;
        parts.drain(..skip);
        info.verb = match method {
            "POST" => "create",
            "GET" | "HEAD" => "get",
            "PUT" => "update",
            "PATCH" => "patch",
            "DELETE" => "delete",
            _ => "",
        }
        .into();
        let mut watch = query.flag("watch");
        if parts[0] == "watch" && parts.len() > 1 {
            watch = true;
            parts.remove(0);
        }
        info.place(parts);
        if info.name.is_empty() && info.subresource.is_empty() {
            info.collection(query, watch);
        } else if watch && info.verb == "get" && raw_path.contains("/watch/") {
            info.verb = "watch".into();
        }
        info
    }

    fn place(&mut self, parts: Vec<String>) {
        let mut parts = parts;
        if parts[0] == "namespaces" && parts.len() > 1 {
            let of_namespace = parts.len() == 2 || (parts.len() >= 3 && matches!(&*parts[2], "status" | "finalize"));
            self.namespace = parts[1].clone();
            if !of_namespace {
                self.namespaced = true;
                parts.drain(..2);
            }
        }
        self.resource = parts[0].clone();
        self.name = parts.get(1).cloned().unwrap_or_default();
        self.subresource = parts.get(2).cloned().unwrap_or_default();
        if parts.len() > 3 {
            self.rest = format!("/{}", parts[3..].join("/"));
        }
    }

    fn collection(&mut self, query: &Query, watch: bool) {
        match self.verb.as_str() {
            "get" => {
                self.verb = if watch { "watch" } else { "list" }.into();
                // A selector for one name makes it a request about that name for authorization.
                let exact = query.text("fieldSelector").split(',').find_map(|t| t.strip_prefix("metadata.name="));
                if let Some(name) = exact {
                    self.name = name.trim_start_matches('=').to_owned();
                }
            }
            "delete" => self.verb = "deletecollection".into(),
            _ => {}
        }
    }

    /// Whether the path addresses the collection.
    pub(crate) fn is_collection(&self) -> bool {
        self.resource_request
            && self.subresource.is_empty()
            && (self.name.is_empty() || matches!(&*self.verb, "list" | "watch"))
    }

    /// Whether the request may run for long.
    pub(crate) fn long_running(&self) -> bool {
        self.verb == "watch"
            || (self.resource_request
                && matches!(&*self.subresource, "exec" | "attach" | "portforward" | "log" | "proxy"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(method: &str, uri: &str) -> String {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let i = RequestInfo::new(method, path, &Query::parse(query));
        if !i.resource_request {
            return format!("{} {}", i.verb, i.path);
        }
        let (ns, sub) = (&i.namespace, &i.subresource);
        format!("{} {}/{} {} ns={ns} name={} sub={sub}", i.verb, i.group, i.version, i.resource, i.name)
    }

    #[test]
    fn paths() {
        let cases = [
            ("GET", "/api/v1", "get /api/v1"),
            ("GET", "/apis/apps/v1/", "get /apis/apps/v1/"),
            ("GET", "/healthz", "get /healthz"),
            ("GET", "/api/v1/pods", "list /v1 pods ns= name= sub="),
            ("GET", "/api/v1/namespaces/a/pods?watch=1", "watch /v1 pods ns=a name= sub="),
            ("GET", "/api/v1/watch/namespaces/a/pods", "watch /v1 pods ns=a name= sub="),
            ("GET", "/api/v1/namespaces/a", "get /v1 namespaces ns=a name=a sub="),
            ("PUT", "/api/v1/namespaces/a/finalize", "update /v1 namespaces ns=a name=a sub=finalize"),
            (
                "PATCH",
                "/apis/apps/v1/namespaces/a/deployments/d/scale",
                "patch apps/v1 deployments ns=a name=d sub=scale",
            ),
            ("DELETE", "/api/v1/namespaces/a/pods", "deletecollection /v1 pods ns=a name= sub="),
            ("GET", "/api/v1/pods?fieldSelector=metadata.name=x", "list /v1 pods ns= name=x sub="),
            ("GET", "/api/v1/namespaces/a/configmaps/%63/", "get /v1 configmaps ns=a name=c sub="),
            ("POST", "/api/v1/nodes/n/proxy/a/b", "create /v1 nodes ns= name=n sub=proxy"),
        ];
        for (method, uri, expected) in cases {
            assert_eq!(info(method, uri), expected, "{method} {uri}");
        }
    }
}
