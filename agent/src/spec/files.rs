//! The files every pod gets: hosts, resolv.conf, hostname.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Pod, PodSpec};

/// The pod's host name and, with a subdomain, its domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostName {
    pub(crate) short: String,
    pub(crate) domain: Option<String>,
    /// What the UTS namespace gets.
    pub(crate) kernel: String,
}

/// Names of a pod.
pub(crate) fn hostname(pod: &Pod, cluster_domain: &str) -> HostName {
    let spec = pod.spec.clone().unwrap_or_default();
    let name = pod.metadata.name.as_deref().unwrap_or("pod");
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let wanted = spec.hostname.as_deref().filter(|h| !h.is_empty());
    let short: String = wanted.unwrap_or(name).chars().take(63).collect();
    let short = short.trim_end_matches(['-', '.']).to_string();
    if let Some(all) = spec.hostname_override.filter(|h| !h.is_empty()) {
        return HostName { short: all.clone(), domain: None, kernel: all };
    }
    let domain = spec.subdomain.filter(|s| !s.is_empty()).map(|s| format!("{s}.{namespace}.svc.{cluster_domain}"));
    let kernel = match &domain {
        Some(d) if spec.set_hostname_as_fqdn == Some(true) => format!("{short}.{d}"),
        _ => short.clone(),
    };
    HostName { short, domain, kernel }
}

/// /etc/hosts. `host_file` is the node's, for pods in its network.
pub(crate) fn hosts(spec: &PodSpec, ips: &[IpAddr], name: &HostName, host_file: Option<&str>) -> String {
    let mut out = match host_file {
        Some(text) => format!("# Kubernetes-managed hosts file (host network).\n{text}"),
        None => {
            let mut out = String::from(
                "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
                 fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
            );
            for ip in ips {
                match &name.domain {
                    Some(d) => out.push_str(&format!("{ip}\t{0}.{d}\t{0}\n", name.short)),
                    None => out.push_str(&format!("{ip}\t{}\n", name.short)),
                }
            }
            out
        }
    };
    let aliases = spec.host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        out.push_str("\n# Entries added by HostAliases.\n");
        for a in aliases {
            out.push_str(&format!("{}\t{}\n", a.ip, a.hostnames.as_deref().unwrap_or_default().join("\t")));
        }
    }
    out
}

/// A resolver configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Resolver {
    pub(crate) nameservers: Vec<String>,
    pub(crate) searches: Vec<String>,
    pub(crate) options: Vec<String>,
}

impl Resolver {
    /// Parses a resolv.conf.
    pub(crate) fn parse(text: &str) -> Self {
        let mut out = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => out.nameservers.extend(words.next().map(Into::into)),
                Some("search") => out.searches = words.filter(|w| *w != ".").map(Into::into).collect(),
                Some("options") => out.options = words.map(Into::into).collect(),
                _ => {}
            }
        }
        out
    }

    /// Brings it within the libc's limits; says what had to be left out for that.
    pub(crate) fn fit(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        let searches = self.searches.len();
        self.searches.truncate(32);
        while self.searches.join(" ").len() > 2048 {
            self.searches.pop();
        }
        if self.searches.len() < searches {
            let line = self.searches.join(" ");
            said.push(format!(
                "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {line}"
            ));
        }
        if self.nameservers.len() > 3 {
            self.nameservers.truncate(3);
            let line = self.nameservers.join(" ");
            said.push(format!(
                "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {line}"
            ));
        }
        said
    }

    /// Writes it.
    pub(crate) fn render(&self) -> String {
        let mut out = String::new();
        if !self.searches.is_empty() {
            out.push_str(&format!("search {}\n", self.searches.join(" ")));
        }
        for n in &self.nameservers {
            out.push_str(&format!("nameserver {n}\n"));
        }
        if !self.options.is_empty() {
            out.push_str(&format!("options {}\n", self.options.join(" ")));
        }
        out
    }
}

/// Whether a pod is to ask the cluster's DNS, and its policy.
fn cluster_first(spec: &PodSpec) -> (bool, &str) {
    let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    (policy == "ClusterFirstWithHostNet" || policy == "ClusterFirst" && spec.host_network != Some(true), policy)
}

/// What a pod is told that is to ask the cluster's DNS where there is none.
pub(crate) fn no_cluster_dns(pod: &Pod, cluster_dns: &[IpAddr]) -> Option<String> {
    let (true, policy) = cluster_first(pod.spec.as_ref()?) else { return None };
    let m = &pod.metadata;
    let text = |of: &Option<String>| of.clone().unwrap_or_default();
    let pod = format!("{}_{}({})", text(&m.name), text(&m.namespace), text(&m.uid));
    cluster_dns.is_empty().then(|| {
        format!("pod: {pod:?}. kubelet does not have ClusterDNS IP configured and cannot create Pod using {policy:?} policy. Falling back to \"Default\" policy.")
    })
}

/// The resolver configuration of a pod.
pub(crate) fn resolver(pod: &Pod, host: &Resolver, cluster_dns: &[IpAddr], domain: &str) -> Resolver {
    let Some(spec) = &pod.spec else { return host.clone() };
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let (cluster, policy) = cluster_first(spec);
    let cluster = cluster && !cluster_dns.is_empty();
    let mut out = match policy {
        "None" => Resolver::default(),
        _ if cluster => Resolver {
            nameservers: cluster_dns.iter().map(ToString::to_string).collect(),
            searches: if domain.is_empty() {
                host.searches.clone()
            } else {
                let mut s = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_string()];
                s.extend(host.searches.iter().cloned());
                s
            },
            options: vec!["ndots:5".into()],
        },
        _ => host.clone(),
    };
    if let Some(c) = &spec.dns_config {
        out.nameservers.extend(c.nameservers.iter().flatten().cloned());
        out.searches.extend(c.searches.iter().flatten().cloned());
        for o in c.options.iter().flatten() {
            let Some(name) = o.name.as_deref() else { continue };
            out.options.retain(|x| x.split(':').next() != Some(name));
            out.options.push(match o.value.as_deref() {
                Some(v) if !v.is_empty() => format!("{name}:{v}"),
                _ => name.to_string(),
            });
        }
    }
    for list in [&mut out.nameservers, &mut out.searches] {
        let mut seen = std::collections::HashSet::new();
        list.retain(|x| seen.insert(x.clone()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata":{"name":"web-0","namespace":"ns"},"spec":spec})).unwrap()
    }

    #[test]
    fn resolvers_by_policy() {
        let host = Resolver::parse("# x\nsearch corp.example .\nnameserver 1.1.1.1\noptions edns0\n");
        let dns = ["10.96.0.10".parse().unwrap()];
        let of = |s| resolver(&pod(s), &host, &dns, "cluster.local").render();
        assert_eq!(
            of(serde_json::json!({"containers":[]})),
            "search ns.svc.cluster.local svc.cluster.local cluster.local corp.example\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
        let default = "search corp.example\nnameserver 1.1.1.1\noptions edns0\n";
        assert_eq!(of(serde_json::json!({"containers":[],"dnsPolicy":"Default"})), default);
        assert_eq!(of(serde_json::json!({"containers":[],"hostNetwork":true})), default);
        assert_eq!(
            of(serde_json::json!({"containers":[],"dnsPolicy":"None","dnsConfig":{"nameservers":["9.9.9.9"],
                "searches":["a.b"],"options":[{"name":"ndots","value":"2"},{"name":"rotate"}]}})),
            "search a.b\nnameserver 9.9.9.9\noptions ndots:2 rotate\n"
        );
    }

    #[test]
    fn what_the_libc_would_not_read_is_left_out_and_told() {
        let many = |n: usize| (1..=n).map(|i| format!("n{i}")).collect::<Vec<_>>();
        let mut r = Resolver { nameservers: many(3), searches: many(32), options: Vec::new() };
        assert!(r.fit().is_empty());
        let mut r = Resolver { nameservers: many(4), searches: many(33), options: Vec::new() };
        let said = r.fit();
        assert_eq!((r.nameservers.len(), r.searches.len(), said.len()), (3, 32, 2));
        assert!(said[0].starts_with("Search Line limits were exceeded") && said[0].ends_with(" n31 n32"), "{said:?}");
        assert!(said[1].ends_with("the applied nameserver line is: n1 n2 n3"), "{said:?}");
        let mut long = Resolver { searches: vec!["a".repeat(1500), "b".repeat(600)], ..Resolver::default() };
        assert_eq!((long.fit().len(), long.searches.len()), (1, 1));
    }

    #[test]
    fn who_misses_the_clusters_dns() {
        let told = |spec, dns: &[IpAddr]| no_cluster_dns(&pod(spec), dns);
        let text = told(serde_json::json!({"containers":[]}), &[]).unwrap();
        assert!(text.starts_with("pod: \"web-0_ns()\". kubelet does not have ClusterDNS IP configured"), "{text}");
        assert_eq!(told(serde_json::json!({"containers":[],"hostNetwork":true}), &[]), None);
        assert_eq!(told(serde_json::json!({"containers":[]}), &["10.96.0.10".parse().unwrap()]), None);
    }

    #[test]
    fn hosts_file_with_subdomain_and_aliases() {
        let p = pod(serde_json::json!({"containers":[],"hostname":"h","subdomain":"s",
            "hostAliases":[{"ip":"1.2.3.4","hostnames":["a","b"]}]}));
        let name = hostname(&p, "cluster.local");
        let text = hosts(p.spec.as_ref().unwrap(), &["10.0.0.5".parse().unwrap()], &name, None);
        assert!(
            text.ends_with("10.0.0.5\th.s.ns.svc.cluster.local\th\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n")
        );
        assert_eq!(name.kernel, "h");
    }
}
