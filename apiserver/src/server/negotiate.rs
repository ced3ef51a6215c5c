//! Content negotiation: which representation a client wants, in upstream's two steps (the router's, the serializer's).

use isopod_api::status::{Details, Status};

/// Encodings of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Media {
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// Protobuf with upstream's envelope.
    Protobuf,
}

/// Whether a resource's own objects have a protobuf form. Their metadata always has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Binary {
    /// They have.
    Served,
    /// They have not (custom resources).
    MetadataOnly,
}

impl Media {
    /// The Content-Type.
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Media::Json => "application/json",
            Media::Yaml => "application/yaml",
            Media::Protobuf => "application/vnd.kubernetes.protobuf",
        }
    }

    /// The Content-Type of a watch.
    pub(crate) fn stream_type(self) -> &'static str {
        match self {
            Media::Json | Media::Yaml => "application/json",
            Media::Protobuf => "application/vnd.kubernetes.protobuf;stream=watch",
        }
    }
}

/// What objects are turned into on their way out (`as=...`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transform {
    /// Nothing.
    None,
    /// A table; true for meta.k8s.io/v1beta1.
    Table(bool),
    /// PartialObjectMetadata; true for meta.k8s.io/v1beta1.
    Partial(bool),
}

/// The negotiated representation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// Encoding.
    pub(crate) media: Media,
    /// Transformation.
    pub(crate) transform: Transform,
    /// `pretty` in the media type.
    pub(crate) pretty: bool,
    /// Whether the transformation names a list kind; `None` when both will do.
    pub(crate) list: Option<bool>,
    /// Aggregated discovery was asked for: `v2`.
    pub(crate) discovery: Option<&'static str>,
}

impl Accepted {
    /// Plain JSON.
    pub(crate) const JSON: Self =
        Self { media: Media::Json, transform: Transform::None, pretty: false, list: None, discovery: None };
}

const ROUTES: [&str; 3] = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];
const WATCH_ROUTES: [&str; 2] = ["application/json;stream=watch", "application/vnd.kubernetes.protobuf;stream=watch"];

struct Clause<'a> {
    kind: &'a str,
    subkind: &'a str,
    params: Vec<(&'a str, &'a str)>,
    quality: f32,
}

fn clauses(header: &str) -> Vec<Clause<'_>> {
    let mut out: Vec<Clause<'_>> = header
        .split(',')
        .filter_map(|part| {
            let mut pieces = part.split(';').map(str::trim);
            let (kind, subkind) = pieces.next()?.split_once('/')?;
            let params: Vec<_> = pieces.map(|p| p.split_once('=').unwrap_or((p, ""))).collect();
            let quality = params.iter().find(|(k, _)| *k == "q").and_then(|(_, v)| v.parse().ok()).unwrap_or(1.0);
            Some(Clause { kind, subkind, params, quality })
        })
        .collect();
    let specificity = |c: &Clause<'_>| (c.kind != "*") as u8 + (c.subkind != "*") as u8;
    // Stable: equal clauses keep the client's order.
    out.sort_by(|a, b| b.quality.total_cmp(&a.quality).then(specificity(b).cmp(&specificity(a))));
    out
}

/// Negotiates an Accept header. `watchable` is for routes that also stream.
pub(crate) fn negotiate(header: Option<&str>, watchable: bool, binary: Binary) -> Result<Accepted, Status> {
    let header = header.unwrap_or("").trim();
    if header.is_empty() {
        return Ok(Accepted::JSON);
    }
    let routed = header.split(',').any(|part| {
        let bare = part.split(';').next().unwrap_or("").trim();
        bare == "*/*" || ROUTES.contains(&bare)
    });
    if !routed {
        let mut available = ROUTES.to_vec();
        if watchable {
            available.extend(WATCH_ROUTES);
        }
        let text = format!("406: Not Acceptable\n\nAvailable representations: {}", available.join(", "));
        return Err(Status::not_acceptable(text).with_details(Details::default()));
    }
    clauses(header).iter().find_map(|clause| accept(clause, binary)).ok_or_else(|| {
        Status::not_acceptable(format!("only the following media types are accepted: {}", ROUTES.join(", ")))
    })
}

/// There is nothing to stream a watch in the form that was asked for.
pub(crate) fn no_stream() -> Status {
    Status::not_acceptable(format!("only the following media types are accepted: {}", WATCH_ROUTES.join(", ")))
}

fn accept(clause: &Clause<'_>, binary: Binary) -> Option<Accepted> {
    let media = match (clause.kind, clause.subkind) {
        ("*", "*") | ("application", "*" | "json") => Media::Json,
        ("application", "yaml") => Media::Yaml,
        ("application", "vnd.kubernetes.protobuf") => Media::Protobuf,
        _ => return None,
    };
    let param = |name: &str| clause.params.iter().find(|(k, _)| *k == name).map(|(_, v)| *v);
    let mut accepted = Accepted { media, transform: Transform::None, pretty: false, list: None, discovery: None };
    accepted.pretty = matches!(param("pretty"), Some("1" | "true"));
    let Some(target) = param("as") else {
        return (media != Media::Protobuf || binary == Binary::Served).then_some(accepted);
    };
    match (target, param("g"), param("v")) {
        // Tables have no protobuf form.
        ("Table", Some("meta.k8s.io"), Some(v @ ("v1" | "v1beta1"))) if media != Media::Protobuf => {
            accepted.transform = Transform::Table(v == "v1beta1");
        }
        ("PartialObjectMetadata" | "PartialObjectMetadataList", Some("meta.k8s.io"), Some(v @ ("v1" | "v1beta1"))) => {
            accepted.list = Some(target.ends_with("List"));
            accepted.transform = Transform::Partial(v == "v1beta1");
        }
        ("APIGroupDiscoveryList", Some("apidiscovery.k8s.io"), Some("v2")) => accepted.discovery = Some("v2"),
        _ => return None,
    }
    Some(accepted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_headers() {
        let ok = |h| negotiate(Some(h), false, Binary::Served).unwrap();
        assert_eq!(ok("application/json;q=0.5,application/yaml;q=0.9").media, Media::Yaml);
        let protobuf = "application/vnd.kubernetes.protobuf,application/json";
        assert_eq!(ok(protobuf).media, Media::Protobuf);
        assert_eq!(negotiate(Some(protobuf), false, Binary::MetadataOnly).unwrap().media, Media::Json);
        let metadata = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
        assert_eq!(negotiate(Some(metadata), false, Binary::MetadataOnly).unwrap().media, Media::Protobuf);
        let table = "application/vnd.kubernetes.protobuf;as=Table;g=meta.k8s.io;v=v1,application/json";
        assert_eq!((ok(table).media, ok(table).transform), (Media::Json, Transform::None));
        assert_eq!(
            ok("application/json;as=Table;g=meta.k8s.io;v=v1,application/json").transform,
            Transform::Table(false)
        );
        assert_eq!(ok("application/json;as=Table;g=other;v=v1,application/json").transform, Transform::None);
        assert!(ok("application/json;pretty=1").pretty);
        let message = |h| negotiate(Some(h), false, Binary::Served).unwrap_err().message;
        for header in ["text/html", "application/*", "garbage", "application/cbor"] {
            assert!(message(header).starts_with("406: Not Acceptable\n"), "{header}");
        }
        assert!(message("application/json;as=Table").starts_with("only the following media types"));
    }
}
