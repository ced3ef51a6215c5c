//! Endpoints and EndpointSlices.

use isopod_api::{field::ErrorList, meta::label};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, meta, net},
};

/// `endpoints`.
pub(crate) struct Endpoints;
/// `endpointslices`.
pub(crate) struct EndpointSlice;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

/// The first three of a list, and how many more.
fn first_three(mut all: Vec<String>, empty: &str) -> String {
    if all.is_empty() {
        return empty.to_owned();
    }
    let more = all.len().saturating_sub(3);
    all.truncate(3);
    let text = all.join(",");
    if more == 0 { text } else { format!("{text} + {more} more...") }
}

impl Strategy for Endpoints {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        for subset in At::field(obj, "subsets").items() {
            let (ready, not_ready, ports) =
                (subset.get("addresses"), subset.get("notReadyAddresses"), subset.get("ports"));
            if ready.len() == 0 && not_ready.len() == 0 {
                e.required(&subset, "must specify `addresses` or `notReadyAddresses`");
            }
            for list in [ready, not_ready] {
                for address in list.items() {
                    endpoint_address(&mut e, &address);
                }
            }
            for port in ports.items() {
                endpoint_port(&mut e, &port, ports.len() > 1);
            }
        }
        e.0
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        // What controllers write is in order.
        if label(obj, "endpoints.kubernetes.io/managed-by") == Some("endpoint-controller") {
            return Vec::new();
        }
        let subsets = At::field(obj, "subsets").items();
        let lists = subsets.iter().flat_map(|subset| ["addresses", "notReadyAddresses"].map(|list| subset.get(list)));
        let ips = lists.flat_map(|list| list.items()).map(|address| address.get("ip"));
        ips.filter_map(|ip| net::ip_warning(&ip.path, ip.s())).collect()
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let mut all = Vec::new();
        for subset in obj["subsets"].as_array().into_iter().flatten() {
            let ips = || subset["addresses"].as_array().into_iter().flatten().filter_map(|a| a["ip"].as_str());
            match subset["ports"].as_array().filter(|p| !p.is_empty()) {
                None => all.extend(ips().map(str::to_owned)),
                Some(ports) => {
                    for port in ports {
                        let port = port["port"].as_i64().unwrap_or_default();
                        all.extend(ips().map(|ip| {
                            if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
                        }));
                    }
                }
            }
        }
        // Subsets of which nothing is ready are shown as nothing, too, but not as none.
        let empty = if table::count(&obj["subsets"]) == 0 { "<none>" } else { "" };
        vec![table::name(obj), json!(first_three(all, empty)), table::age(obj, now)]
    }
}

fn endpoint_address(e: &mut Errs, at: &At<'_>) {
    let (ip, hostname, node) = (at.get("ip"), at.get("hostname"), at.get("nodeName"));
    net::ip(e, &ip);
    if !hostname.s().is_empty() {
        e.dns_label(&hostname);
    }
    if node.is_set() {
        e.dns_subdomain(&node);
    }
    net::non_special_ip(e, &ip);
}

fn endpoint_port(e: &mut Errs, at: &At<'_>, named: bool) {
    let (name, app) = (at.get("name"), at.get("appProtocol"));
    if named && name.s().is_empty() {
        e.required(&name, "");
    } else if !name.s().is_empty() {
        e.dns_label(&name);
    }
    e.port(&at.get("port"));
    e.required_one_of(&at.get("protocol"), PROTOCOLS);
    if app.is_set() {
        e.qualified_name(&app);
    }
}

impl Strategy for EndpointSlice {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let kind = At::field(obj, "addressType");
        e.required_one_of(&kind, &["FQDN", "IPv4", "IPv6"]);
        ports(&mut e, &At::field(obj, "ports"));
        let endpoints = At::field(obj, "endpoints");
        if endpoints.len() > 1000 {
            e.too_many(&endpoints, endpoints.len(), 1000);
            return e.0;
        }
        for endpoint in endpoints.items() {
            slice_endpoint(&mut e, &endpoint, kind.s());
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs(self.validate(cx, new));
        e.immutable(&At::field(new, "addressType"), &old["addressType"]);
        e.0
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let mut out = Vec::new();
        if obj["addressType"] == "FQDN" {
            out.push("spec.addressType: FQDN endpoints are deprecated".to_owned());
        }
        let manager = label(obj, "endpointslice.kubernetes.io/managed-by").unwrap_or_default();
        if !["endpointslice-controller.k8s.io", "endpointslicemirroring-controller.k8s.io"].contains(&manager) {
            let endpoints = At::field(obj, "endpoints").items();
            let addresses = endpoints.iter().flat_map(|endpoint| endpoint.get("addresses").items());
            out.extend(addresses.filter_map(|address| net::ip_warning(&address.path, address.s())));
        }
        out
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let port = |p: &Value| {
            let name = p["name"].as_str().unwrap_or_default();
            match p["port"].as_i64() {
                Some(port) => port.to_string(),
                None if name.is_empty() => "*".to_owned(),
                None => name.to_owned(),
            }
        };
        let ports = obj["ports"].as_array().into_iter().flatten().map(port).collect();
        let addresses = obj["endpoints"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|e| e["addresses"].as_array().into_iter().flatten())
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect();
        vec![
            table::name(obj),
            table::or(&obj["addressType"], ""),
            json!(first_three(ports, "<unset>")),
            json!(first_three(addresses, "<unset>")),
            table::age(obj, now),
        ]
    }
}

fn ports(e: &mut Errs, list: &At<'_>) {
    if list.len() > 20_000 {
        return e.too_many(list, list.len(), 20_000);
    }
    let mut seen = Vec::new();
    for at in list.items() {
        let (name, app) = (at.get("name"), at.get("appProtocol"));
        if !name.s().is_empty() {
            e.dns_label(&name);
        }
        if seen.contains(&name.s()) {
            e.duplicate(&name, name.s());
        }
        seen.push(name.s());
        e.required_one_of(&at.get("protocol"), PROTOCOLS);
        if app.is_set() {
            e.qualified_name(&app);
        }
    }
}

fn slice_endpoint(e: &mut Errs, at: &At<'_>, kind: &str) {
    let addresses = at.get("addresses");
    if addresses.len() == 0 {
        e.required(&addresses, "must contain at least 1 address");
    } else if addresses.len() > 100 {
        e.too_many(&addresses, addresses.len(), 100);
    }
    for address in addresses.items() {
        match kind {
            "IPv4" | "IPv6" => {
                let messages = net::ip_messages(address.s());
                if !messages.is_empty() {
                    e.messages(&address, messages);
                    continue;
                }
                if net::family(address.s()) != kind {
                    // Upstream leaves the index out here.
                    e.invalid_as(&addresses, address.s(), &format!("must be an {kind} address"));
                }
                net::non_special_ip(e, &address);
            }
            "FQDN" => domain(e, &address),
            _ => {}
        }
    }
    let node = at.get("nodeName");
    if node.is_set() {
        e.dns_subdomain(&node);
    }
    let topology = at.get("deprecatedTopology");
    if topology.len() > 16 {
        e.too_many(&topology, topology.len(), 16);
    }
    meta::labels(e, &topology);
    let hostname = at.get("hostname");
    if hostname.is_set() {
        e.dns_label(&hostname);
    }
    hints(e, &at.get("hints.forZones"), isopod_api::names::label_value);
    hints(e, &at.get("hints.forNodes"), isopod_api::names::dns1123_subdomain);
}

fn hints(e: &mut Errs, list: &At<'_>, rule: fn(&str) -> Vec<String>) {
    if list.len() > 8 {
        return e.too_many(list, list.len(), 8);
    }
    let mut seen = Vec::new();
    for at in list.items() {
        let name = at.get("name");
        if seen.contains(&name.s()) {
            e.duplicate(&name, name.s());
        }
        e.messages(&name, rule(name.s()));
        seen.push(name.s());
    }
}

/// A domain of at least two parts; a dot may end it.
fn domain(e: &mut Errs, at: &At<'_>) {
    let name = at.s().strip_suffix('.').unwrap_or(at.s());
    let messages = isopod_api::names::dns1123_subdomain(name);
    if name.is_empty() {
        e.required(at, "");
    } else if !messages.is_empty() {
        e.invalid_as(at, name, &messages.join(","));
    } else if !name.contains('.') {
        e.invalid_as(at, name, "should be a domain with at least two segments separated by dots");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admission::testing::FakeObjects, authn::UserInfo};

    #[test]
    fn endpoints_that_are_not_ready_are_not_shown() {
        let cell = |subsets: Value| {
            Endpoints.cells(&json!({"metadata": {"name": "e"}, "subsets": subsets}), Timestamp::UNIX_EPOCH)[1].clone()
        };
        let ports = json!([{"port": 80}]);
        assert_eq!(cell(json!([])), "<none>");
        assert_eq!(cell(json!([{"notReadyAddresses": [{"ip": "1.1.1.1"}], "ports": ports}])), "");
        assert_eq!(
            cell(json!([{"addresses": [{"ip": "1.1.1.1"}, {"ip": "fd00::1"}], "ports": ports}])),
            "1.1.1.1:80,[fd00::1]:80"
        );
    }

    #[test]
    fn addresses_that_are_not_canonical() {
        let (objects, user) = (FakeObjects::default(), UserInfo::default());
        let gvr = isopod_api::gvk::Gvr::new("discovery.k8s.io", "v1", "endpointslices");
        let cx = Context {
            gvr: &gvr,
            subresource: "",
            namespace: "n",
            name: "s",
            user: &user,
            objects: &objects,
            dry_run: false,
        };
        let ip = "2001:DB8::1";
        let told = |at: &str| {
            vec![format!("{at}: IPv6 address \"{ip}\" should be in RFC 5952 canonical format (\"2001:db8::1\")")]
        };
        let mut slice = json!({"addressType": "IPv6", "endpoints": [{"addresses": ["::1", ip]}]});
        assert_eq!(EndpointSlice.warnings(&cx, &slice, None), told("endpoints[0].addresses[1]"));
        slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] =
            "endpointslice-controller.k8s.io".into();
        assert_eq!(EndpointSlice.warnings(&cx, &slice, None), Vec::<String>::new());
        let names = json!({"addressType": "FQDN", "endpoints": [{"addresses": ["a.example.com"]}]});
        assert_eq!(EndpointSlice.warnings(&cx, &names, None), ["spec.addressType: FQDN endpoints are deprecated"]);
        let endpoints = json!({"subsets": [{"notReadyAddresses": [{ "ip": ip }]}]});
        assert_eq!(Endpoints.warnings(&cx, &endpoints, None), told("subsets[0].notReadyAddresses[0].ip"));
    }
}
