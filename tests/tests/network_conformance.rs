//! The conformance sample's rows about names and services, as pods see them; each comment is the name of a row.
//!
//! Rows about the API alone are the API server's tests. NetworkPolicy, which the sample leaves out, is `policy`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use isopod_tests::{Cluster, Host, Net, eventually};

/// UDP for pods: their busybox has none, so they borrow the host's perl. Who answers on port 9000; one question, from a port
/// of its own if it is told one; a server of two names.
const SCRIPTS: [(&str, &str); 3] = [
    (
        "serve.pl",
        "my $s = IO::Socket::INET->new(Proto => 'udp', LocalPort => 9000) or die $!;
while (1) { $s->recv(my $m, 512); $s->send(`hostname`) }
",
    ),
    (
        "ask.pl",
        "my ($to, $port, @own) = @ARGV; alarm 2;
my $s = IO::Socket::INET->new(Proto => 'udp', PeerAddr => $to, PeerPort => $port, map { (LocalPort => $_) } @own) or die $!;
$s->send('x'); $s->recv(my $m, 512); print $m;
",
    ),
    (
        "names.pl",
        "my %a = ('printer.corp.test', '192.0.2.7', 'far.example.org', '192.0.2.8');
my $s = IO::Socket::INET->new(Proto => 'udp', LocalPort => 53) or die $!;
while (1) {
    $s->recv(my $q, 512); my ($i, @l) = (12);
    while (my $n = ord substr($q, $i, 1)) { push @l, substr($q, $i + 1, $n); $i += $n + 1 }
    my $ip = $a{lc join '.', @l}; my $hit = $ip && unpack('n', substr($q, $i + 1, 2)) == 1;
    $s->send(pack('n6', unpack('n', $q), 0x8180 | ($ip ? 0 : 3), 1, $hit ? 1 : 0, 0, 0) . substr($q, 12, $i - 7)
        . ($hit ? pack('n3NnC4', 0xc00c, 1, 1, 1, 4, split /\\./, $ip) : ''));
}
",
    ),
];

const PERL: &str = "volumes: [{name: usr, hostPath: {path: /usr}}, {name: lib, hostPath: {path: /usr/lib}}, \
    {name: lib64, hostPath: {path: /usr/lib64}}, {name: scripts, hostPath: {path: /etc/isopod}}], containers: [{name: c, \
    image: 'busybox:1', volumeMounts: [{name: usr, mountPath: /usr}, {name: lib, mountPath: /lib}, {name: lib64, mountPath: \
    /lib64}, {name: scripts, mountPath: /scripts}], ";

const PODS: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: client}
spec: {terminationGracePeriodSeconds: 0, PERL command: [sleep, '100000']}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db-a, labels: {app: db}}
spec: {hostname: first, subdomain: db, terminationGracePeriodSeconds: 0, containers: [{name: c, image: 'web:1'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db-b, labels: {app: db}}
spec: {terminationGracePeriodSeconds: 0, containers: [{name: c, image: 'web:1'}]}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: db}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
";

struct World {
    c: Cluster,
}

impl World {
    fn start(net: &mut Net) -> Self {
        let c = Cluster::start(&net.host("one"));
        scripts(&c.host);
        eventually("pods are made", || c.try_apply(&PODS.replace("PERL", PERL)));
        ["client", "db-a", "db-b"].iter().for_each(|pod| c.wait_ready(pod));
        Self { c }
    }

    /// Waits until what the client finds for a name has these words: addresses by its resolver, with its search path;
    /// other kinds by a query for exactly this name.
    #[track_caller]
    fn resolves(&self, kind: &str, name: &str, words: &[&str]) {
        let how = if kind == "a" { "getent ahostsv4".to_owned() } else { format!("nslookup -type={kind}") };
        eventually(&format!("{kind} {name}"), || {
            let ran = self.c.kubectl(&format!("exec client -- {how} {name}"));
            if ran.code == 0 && words.iter().all(|w| ran.out.contains(w)) { Ok(()) } else { Err(ran) }
        });
    }

    fn cluster_ip(&self, service: &str) -> String {
        self.c.get(&format!("service {service}"))["spec"]["clusterIP"].as_str().unwrap_or_default().to_owned()
    }

    fn pod_ip(&self, pod: &str) -> String {
        self.c.get(&format!("pod {pod}"))["status"]["podIP"].as_str().unwrap().to_owned()
    }

    /// Who answers the client at a URL, asked so often.
    fn who(&self, url: &str, times: u32) -> Result<BTreeSet<String>, String> {
        let line = format!("exec client -- sh -c 'for i in $(seq {times}); do timeout 3 wget -q -O- {url}; done'");
        let ran = self.c.kubectl(&line);
        let names: BTreeSet<String> = ran.out.split_whitespace().map(str::to_owned).collect();
        if ran.code == 0 && !names.is_empty() { Ok(names) } else { Err(format!("{ran:?}")) }
    }

    /// Waits until it is `count` pods.
    #[track_caller]
    fn answered_by(&self, url: &str, count: usize) {
        eventually(url, || match self.who(url, 20) {
            Ok(names) if names.len() == count => Ok(()),
            other => Err(other),
        });
    }

    #[track_caller]
    fn patch(&self, service: &str, spec: &str) {
        self.c.k(&format!("patch service {service} -p '{{\"spec\":{spec}}}'"));
    }
}

fn scripts(host: &Host) {
    for (name, text) in SCRIPTS {
        std::fs::write(host.path("/etc/isopod").join(name), format!("use IO::Socket::INET;\n{text}")).unwrap();
    }
}

fn dashed(address: &str) -> String {
    address.replace('.', "-")
}

fn reversed(address: &str) -> String {
    let parts: Vec<&str> = address.rsplit('.').collect();
    format!("{}.in-addr.arpa", parts.join("."))
}

#[test]
fn names_are_those_of_the_sample() {
    let mut net = Net::new();
    let w = World::start(&mut net);
    let (web, first, second) = (w.cluster_ip("web"), w.pod_ip("db-a"), w.pod_ip("db-b"));
    // DNS, cluster (by DNS).
    let api = w.cluster_ip("kubernetes");
    for name in ["kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"] {
        w.resolves("a", name, &[&api]);
    }
    // DNS, cluster (by /etc/hosts).
    let hosts = w.c.k("exec db-a -- cat /etc/hosts");
    assert!(hosts.contains(&format!("{first}\tfirst.db.default.svc.cluster.local\tfirst")), "{hosts}");
    // DNS, services; DNS, PQDN for services.
    for end in ["", ".default", ".default.svc", ".default.svc.cluster.local"] {
        w.resolves("a", &format!("web{end}"), &[&web]);
        w.resolves("a", &format!("db{end}"), &[&first, &second]);
    }
    let hosts =
        ["8080 first.db.default.svc.cluster.local", &format!("8080 {}.db.default.svc.cluster.local", dashed(&second))];
    w.resolves("srv", "_http._tcp.db.default.svc.cluster.local", &hosts);
    w.resolves("srv", "_http._tcp.web.default.svc.cluster.local", &["80 web.default.svc.cluster.local"]);
    w.resolves("ptr", &reversed(&web), &["web.default.svc.cluster.local"]);
    w.resolves("ptr", &reversed(&first), &["first.db.default.svc.cluster.local"]);
    // DNS, resolve the hostname; DNS, resolve the subdomain.
    w.resolves("a", "first.db.default.svc.cluster.local", &[&first]);
    w.resolves("a", "db.default.svc.cluster.local", &[&first]);
    assert_eq!(w.c.k("exec db-a -- hostname -f").trim(), "first.db.default.svc.cluster.local");
    // DNS, for ExternalName Services.
    w.c.k("create service externalname out --external-name=one.example.com");
    let out = "out.default.svc.cluster.local";
    w.resolves("cname", out, &["canonical name = one.example.com"]);
    w.patch("out", r#"{"externalName":"two.example.com"}"#);
    w.resolves("cname", out, &["canonical name = two.example.com"]);
    w.patch("out", r#"{"type":"ClusterIP","externalName":null,"ports":[{"port":80,"name":"http"}]}"#);
    w.resolves("a", out, &[&w.cluster_ip("out")]);
    // DNS, custom dnsConfig.
    w.c.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: own}\nspec: {dnsPolicy: None, dnsConfig: {nameservers: [10.96.0.10], \
         searches: [default.svc.cluster.local], options: [{name: ndots, value: '2'}]}, terminationGracePeriodSeconds: 0, \
         containers: [{name: c, image: 'busybox:1', command: [sleep, '100000']}]}\n",
    );
    w.c.wait_ready("own");
    let text = w.c.k("exec own -- cat /etc/resolv.conf");
    assert_eq!(text, "search default.svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:2\n");
    let said = w.c.k("exec own -- wget -q -O- http://web/");
    assert!(["first", "db-b"].contains(&said.trim()), "{said:?}");
    forwards(&w, &net.host("two"));
}

/// ConfigMap kube-system/kube-dns: who is asked for other names.
fn forwards(w: &World, peer: &Host) {
    scripts(peer);
    peer.must("perl /etc/isopod/names.pl >/dev/null 2>&1 &");
    let map = |data: &str| {
        w.c.apply(&format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: kube-dns, namespace: kube-system}}\ndata: {data}\n"
        ));
    };
    let unknown = |name: &str| {
        eventually(&format!("{name} is not known"), || {
            let ran = w.c.kubectl(&format!("exec client -- getent ahostsv4 {name}."));
            if ran.out.contains("192.0.2.") { Err(ran) } else { Ok(()) }
        });
    };
    unknown("printer.corp.test");
    map(&format!(r#"{{stubDomains: '{{"corp.test": ["{}"]}}'}}"#, peer.address));
    w.resolves("a", "printer.corp.test.", &["192.0.2.7"]);
    unknown("far.example.org");
    map(&format!(r#"{{upstreamNameservers: '["{}"]'}}"#, peer.address));
    w.resolves("a", "far.example.org.", &["192.0.2.8"]);
    w.c.k("delete configmap -n kube-system kube-dns");
    unknown("far.example.org");
    // The cluster's own names never left.
    w.resolves("a", "web.default.svc.cluster.local", &[&w.cluster_ip("web")]);
}

#[test]
fn services_are_those_of_the_sample() {
    let mut net = Net::new();
    let w = World::start(&mut net);
    w.answered_by("http://web/", 2);
    // Service, change type, ClusterIP to ExternalName; ExternalName to ClusterIP; ExternalName to NodePort.
    w.c.k("create service clusterip changing --tcp=80:8080");
    w.patch("changing", r#"{"type":"ExternalName","externalName":"web.default.svc.cluster.local","selector":null}"#);
    assert_eq!(w.cluster_ip("changing"), "");
    w.resolves("cname", "changing.default.svc.cluster.local", &["web.default.svc.cluster.local"]);
    w.answered_by("http://changing/", 2);
    let ports = r#""externalName":null,"selector":{"app":"db"},"ports":[{"name":"http","port":80,"targetPort":8080}]"#;
    w.patch("changing", &format!(r#"{{"type":"ClusterIP",{ports}}}"#));
    assert_ne!(w.cluster_ip("changing"), "");
    w.answered_by("http://changing/", 2);
    w.patch("changing", r#"{"type":"ExternalName","externalName":"web.default.svc.cluster.local"}"#);
    w.patch("changing", &format!(r#"{{"type":"NodePort",{ports}}}"#));
    // Service, NodePort Service.
    let node_port = w.c.get("service changing")["spec"]["ports"][0]["nodePort"].as_i64().unwrap();
    let at_node = format!("http://{}:{node_port}/", w.c.host.address);
    w.answered_by("http://changing/", 2);
    w.answered_by(&format!("http://{}/", w.cluster_ip("changing")), 2);
    w.answered_by(&at_node, 2);
    // Service, NodePort type, session affinity to None; ClusterIP type, session affinity to ClientIP.
    w.patch("changing", r#"{"sessionAffinity":"ClientIP"}"#);
    w.answered_by(&at_node, 1);
    w.answered_by("http://changing/", 1);
    w.patch("changing", r#"{"sessionAffinity":"None"}"#);
    w.answered_by(&at_node, 2);
    w.answered_by("http://changing/", 2);
    protocols(&w);
    slices(&w);
    host_ports(&w, &net.host("two"));
}

/// A pod whose port 9000 says its name, over UDP.
fn udp_pod(name: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{udp: {name}}}}}\nspec: {{terminationGracePeriodSeconds: \
         1, {PERL} command: [perl, /scripts/serve.pl], ports: [{{containerPort: 9000, protocol: UDP{more}}}]}}]}}\n"
    )
}

/// Service, should serve endpoints on same port and different protocols.
fn protocols(w: &World) {
    w.c.apply(
        &(udp_pod("both", "")
            + "---\napiVersion: v1\nkind: Service\nmetadata: {name: both}\nspec: {selector: {udp: both}, \
        ports: [{name: t, port: 90, targetPort: 9001}, {name: u, port: 90, targetPort: 9000, protocol: UDP}]}\n"),
    );
    w.c.wait_ready("both");
    w.c.k("exec both -- sh -c 'echo both >/tmp/index.html; busybox httpd -p 9001 -h /tmp'");
    let tcp = || w.who("http://both:90/", 1).is_ok();
    let ip = w.cluster_ip("both");
    let udp = || w.c.kubectl(&format!("exec client -- perl /scripts/ask.pl {ip} 90")).out.trim() == "both";
    let both = |t: bool, u: bool| {
        eventually(&format!("TCP {t}, UDP {u}"), || match (tcp(), udp()) {
            got if got == (t, u) => Ok(()),
            got => Err(got),
        });
    };
    both(true, true);
    let only = |port: &str| {
        w.c.k(&format!(
            r#"patch service both --type=json -p '[{{"op":"replace","path":"/spec/ports","value":[{port}]}}]'"#
        ));
    };
    only(r#"{"name":"t","port":90,"targetPort":9001,"protocol":"TCP"}"#);
    both(true, false);
    only(r#"{"name":"u","port":90,"targetPort":9000,"protocol":"UDP"}"#);
    both(false, true);
}

/// EndpointSlice, single IP, multiple ports; Service, endpoints with multiple ports.
fn slices(w: &World) {
    let ip = w.pod_ip("both");
    w.c.k("exec both -- sh -c 'mkdir -p /tmp/b; echo other >/tmp/b/index.html; busybox httpd -p 9002 -h /tmp/b'");
    let slice = |name: &str, port: u16| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, labels: \
             {{kubernetes.io/service-name: hand}}}}\naddressType: IPv4\nports: [{{name: {name}, port: {port}}}]\nendpoints: \
             [{{addresses: [{ip}]}}]\n"
        )
    };
    w.c.apply(&("apiVersion: v1\nkind: Service\nmetadata: {name: hand}\nspec: {ports: [{name: one, port: 81}, {name: two, port: \
        82}]}\n".to_owned() + &slice("one", 9001) + &slice("two", 9002)));
    for (port, name) in [(81, "both"), (82, "other")] {
        eventually(name, || match w.who(&format!("http://hand:{port}/"), 3) {
            Ok(names) if names == BTreeSet::from([name.to_owned()]) => Ok(()),
            other => Err(other),
        });
    }
}

/// A UDP client that goes on asking a host port follows it from pod to pod. (No row of the sample.)
fn host_ports(w: &World, outside: &Host) {
    scripts(outside);
    let ask = || outside.sh("perl /etc/isopod/ask.pl 10.88.0.1 9100 5555").out.trim().to_owned();
    for pod in ["first", "second"] {
        w.c.apply(&udp_pod(pod, ", hostPort: 9100"));
        w.c.wait_ready(pod);
        eventually(pod, || match ask() {
            name if name == pod => Ok(()),
            other => Err(other),
        });
        w.c.k(&format!("delete pod {pod}"));
    }
}
