//! Connections to the containers of a pod: log, exec, attach, port-forward. They end at the pod's node.

use std::{num::IntErrorKind, sync::Arc};

use futures::future::BoxFuture;
use http::Response;
use http_body_util::{BodyExt, Empty};
use isopod_api::{
    gvk::{GroupKind, Gvr},
    meta,
    pod_log::PodLogOptions,
    status::Status,
    text::quote,
};
use serde_json::Value;

use super::{
    Body, Connect, ConnectRequest,
    query::Query,
    socket,
    transport::{Scheme, Target, Transport},
};
use crate::objects::Objects;

/// What is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// `pods/log`.
    Log,
    /// `pods/exec`.
    Exec,
    /// `pods/attach`.
    Attach,
    /// `pods/portforward`.
    PortForward,
}

/// One of the pod connections.
pub(super) struct PodConnect {
    pub(super) what: What,
    pub(super) transport: Option<Arc<Transport>>,
}

/// Addresses of a node in the order they are tried.
const ADDRESS_TYPES: [&str; 3] = ["InternalIP", "ExternalIP", "Hostname"];

/// Where a node's server is.
pub(super) fn node_target(objects: &dyn Objects, name: &str) -> Result<Target, Status> {
    let gvr = Gvr::new("", "v1", "nodes");
    let node = objects.get(&gvr, "", name).ok_or_else(|| Status::not_found(&gvr.group_resource(), name))?.value();
    let addresses = node["status"]["addresses"].as_array().map_or(&[][..], Vec::as_slice);
    let address = ADDRESS_TYPES.iter().find_map(|kind| {
        let found = addresses.iter().find(|address| address["type"] == *kind)?;
        found["address"].as_str()
    });
    let host = address.ok_or_else(|| Status::internal(format!("no preferred addresses found for node {name:?}")))?;
    let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64();
    let port = port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0).unwrap_or(10250);
    Ok(Target { host: host.to_owned(), port, scheme: Scheme::Node })
}

fn names(pod: &Value, field: &str) -> Vec<String> {
    let list = pod["spec"][field].as_array().into_iter().flatten();
    list.filter_map(|container| container["name"].as_str().map(str::to_owned)).collect()
}

/// The container a request means.
fn container(pod: &Value, asked: &str) -> Result<String, Status> {
    let name = meta::name(pod);
    let containers = names(pod, "containers");
    let all: Vec<String> =
        ["initContainers", "containers", "ephemeralContainers"].iter().flat_map(|field| names(pod, field)).collect();
    if asked.is_empty() {
        return match containers.as_slice() {
            [only] => Ok(only.clone()),
            [] => Err(Status::bad_request(format!("a container name must be specified for pod {name}"))),
            _ => Err(Status::bad_request(format!(
                "a container name must be specified for pod {name}, choose one of: [{}]",
                all.join(" ")
            ))),
        };
    }
    if all.iter().any(|known| known == asked) {
        return Ok(asked.to_owned());
    }
    Err(Status::bad_request(format!("container {asked} is not valid for pod {name}")))
}

/// Checks `PodLogOptions`.
fn validate_log(name: &str, query: &Query) -> Result<(), Status> {
    let errors = PodLogOptions::parse(|key| query.get(key)).map_err(Status::bad_request)?.validate();
    if errors.is_empty() {
        return Ok(());
    }
    Err(Status::invalid(&GroupKind::new("", "PodLogOptions"), name, errors))
}

/// Ports of a query, with commas between them.
fn ports(text: &str) -> Result<(), Status> {
    let wrong = text.split(',').find_map(|port| Some((port, port.parse::<u16>().err()?)));
    wrong.map_or(Ok(()), |(port, error)| {
        let why = match error.kind() {
            IntErrorKind::PosOverflow => "value out of range",
            _ => "invalid syntax",
        };
        let quoted = quote(port);
        Err(Status::bad_request(format!("cannot convert to []int32: strconv.ParseUint: parsing {quoted}: {why}")))
    })
}

impl What {
    /// The path on the node.
    fn path(self, pod: &Value, container: &str) -> String {
        let (namespace, name) = (meta::namespace(pod), meta::name(pod));
        match self {
            What::Log => format!("/containerLogs/{namespace}/{name}/{container}"),
            What::Exec => format!("/exec/{namespace}/{name}/{container}"),
            What::Attach => format!("/attach/{namespace}/{name}/{container}"),
            What::PortForward => format!("/portForward/{namespace}/{name}"),
        }
    }

    /// The query on the node: the names of streams differ there.
    fn query(self, query: &Query) -> Query {
        let mut out = Query::default();
        match self {
            What::Log => {
                for flag in ["follow", "previous", "timestamps"] {
                    if query.flag(flag) {
                        out.push(flag, "true");
                    }
                }
                for name in ["sinceSeconds", "sinceTime", "tailLines", "limitBytes"] {
                    if let Some(value) = query.get(name) {
                        out.push(name, value);
                    }
                }
                if let Some(stream) = query.get("stream").filter(|stream| *stream != "All") {
                    out.push("stream", stream);
                }
            }
            What::Exec | What::Attach => {
                for (ours, theirs) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")] {
                    if query.flag(ours) {
                        out.push(theirs, "1");
                    }
                }
                if self == What::Exec {
                    query.all("command").for_each(|command| out.push("command", command));
                }
            }
            What::PortForward => query.all("ports").for_each(|port| out.push("port", port)),
        }
        out
    }
}

/// The answer to a log request of a pod that has no node yet.
fn no_content() -> Response<Body> {
    let mut response = Response::new(Empty::new().map_err(|never| match never {}).boxed());
    *response.status_mut() = http::StatusCode::NO_CONTENT;
    response
}

impl PodConnect {
    async fn answer(&self, mut request: ConnectRequest) -> Result<Response<Body>, Status> {
        let query = Query::parse(request.request.uri().query().unwrap_or_default());
        match self.what {
            What::Log => validate_log(&request.name, &query)?,
            What::PortForward => query.all("ports").try_for_each(ports)?,
            What::Exec | What::Attach => {}
        }
        let gvr = Gvr::new("", "v1", "pods");
        let pod = request.objects.get(&gvr, &request.namespace, &request.name);
        let pod = pod.ok_or_else(|| Status::not_found(&gvr.group_resource(), &request.name))?.value();
        let container = match self.what {
            What::PortForward => String::new(),
            _ => container(&pod, query.get("container").unwrap_or_default())?,
        };
        let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        if node.is_empty() {
            if self.what == What::Log {
                return Ok(no_content());
            }
            return Err(Status::bad_request(format!("pod {} does not have a host assigned", request.name)));
        }
        let target = node_target(&*request.objects, node)?;
        let transport = self.transport.as_ref().ok_or_else(|| Status::internal("no client certificate for nodes"))?;
        let query = self.what.query(&query).to_string();
        let path = self.what.path(&pod, &container);
        let path = if query.is_empty() { path } else { format!("{path}?{query}") };
        let socket = match self.what {
            What::Log => {
                let mut extensions = std::mem::take(request.request.extensions_mut());
                let socket = socket::for_log(request.request.headers_mut(), &mut extensions)?;
                *request.request.extensions_mut() = extensions;
                socket
            }
            _ => None,
        };
        let response = transport.forward(&target, &path, request.request).await?;
        if self.what != What::Log {
            return Ok(response);
        }
        let log = log_answer(response).await?;
        if let Some(socket) = socket { socket.send(log.into_body()) } else { Ok(log) }
    }
}

/// Errors of the node come as text; clients of logs expect a Status.
async fn log_answer(mut response: Response<Body>) -> Result<Response<Body>, Status> {
    let code = response.status();
    if code.is_success() {
        let kind = http::HeaderValue::from_static("text/plain");
        response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
        return Ok(response);
    }
    let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let message = String::from_utf8_lossy(&body).trim().to_owned();
    Err(match code.as_u16() {
        404 => Status::generic(
            404,
            isopod_api::status::reason::NOT_FOUND,
            format!("the server could not find the requested resource ({message})"),
        ),
        400 => Status::bad_request(message),
        _ => Status::internal(message),
    })
}

impl Connect for PodConnect {
    fn connect<'a>(&'a self, request: ConnectRequest) -> BoxFuture<'a, Result<Response<Body>, Status>> {
        Box::pin(self.answer(request))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Value {
        json!({"metadata": {"name": "two", "namespace": "ns"}, "spec": {
            "initContainers": [{"name": "i"}], "containers": [{"name": "a"}, {"name": "b"}]}})
    }

    #[test]
    fn containers_are_chosen_as_upstream_does() {
        let message = |asked: &str| container(&pod(), asked).unwrap_err().message;
        assert_eq!(message(""), "a container name must be specified for pod two, choose one of: [i a b]");
        assert_eq!(message("zz"), "container zz is not valid for pod two");
        assert_eq!(container(&pod(), "i").unwrap(), "i");
    }

    #[test]
    fn log_options_are_checked() {
        let check = |query: &str| validate_log("p", &Query::parse(query)).map_err(|status| status.message);
        assert_eq!(check("tailLines=5&follow=true"), Ok(()));
        assert_eq!(
            check("sinceTime=x"),
            Err("parsing time \"x\" as \"2006-01-02T15:04:05Z07:00\": cannot parse \"x\" as \"2006\"".into())
        );
        let port = |text: &str| ports(text).map_err(|status| status.message);
        assert_eq!(port("80,443"), Ok(()));
        let wrong = |port: &str, why: &str| {
            Err(format!("cannot convert to []int32: strconv.ParseUint: parsing \"{port}\": {why}"))
        };
        assert_eq!(port("80,x"), wrong("x", "invalid syntax"));
        assert_eq!(port("65536"), wrong("65536", "value out of range"));
        assert_eq!(
            check("tailLines=-1"),
            Err("PodLogOptions \"p\" is invalid: tailLines: Invalid value: -1: must be greater than or equal to 0"
                .into())
        );
        let code = |query: &str| validate_log("p", &Query::parse(query)).map_err(|status| status.code).unwrap_err();
        assert_eq!((code("sinceTime=abc"), code("limitBytes=0")), (400, 422));
    }

    #[test]
    fn streams_have_other_names_on_the_node() {
        let query = Query::parse("stdin=true&stdout=1&stderr=false&tty=true&command=sh&command=a%20b&container=a");
        assert_eq!(What::Exec.query(&query).to_string(), "input=1&output=1&tty=1&command=sh&command=a%20b");
        assert_eq!(What::Exec.path(&pod(), "a"), "/exec/ns/two/a");
    }
}
