//! Two machines, one cluster.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, process::Stdio};

use isopod_tests::{Cluster, Host, Net, eventually, host::binaries};

/// Gives the second node certificates whose life is nearly over, signed with the cluster's key; returns those.
fn aged(one: &Host, two: &Host) -> [String; 2] {
    for file in ["ca.crt", "ca.key"] {
        fs::copy(one.path(&format!("/etc/isopod/pki/{file}")), two.path(&format!("/var/lib/{file}"))).unwrap();
    }
    two.must(
        "cd /var/lib; printf 'subjectAltName=DNS:two,IP:10.88.0.2,IP:127.0.0.1\n' > ext; touch index; echo 77 > serial; \
         printf '[ca]\ndefault_ca=c\n[c]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\n\
         policy=p\nunique_subject=no\n[p]\norganizationName=supplied\ncommonName=supplied\n' > ca.cnf; \
         openssl ecparam -genkey -name prime256v1 -noout | openssl pkcs8 -topk8 -nocrypt > k; \
         openssl req -new -key k -subj '/O=system:nodes/CN=system:node:two' > r; \
         openssl ca -batch -config ca.cnf -cert ca.crt -keyfile ca.key -in r -notext -extfile ext \
             -startdate $(date -u -d '-20 days' +%Y%m%d%H%M%SZ) -enddate $(date -u -d '+1 hour' +%Y%m%d%H%M%SZ) > c; \
         cp k /etc/isopod/pki/kubelet.key; cp c /etc/isopod/pki/kubelet.crt; \
         sed -i \"s|client-certificate-data:.*|client-certificate-data: $(base64 -w0 c)|; \
                 s|client-key-data:.*|client-key-data: $(base64 -w0 k)|\" /etc/isopod/agent.conf",
    );
    certificates(two)
}

/// What the node shows and serves with.
fn certificates(two: &Host) -> [String; 2] {
    ["sed -n 's/.*client-certificate-data: //p' /etc/isopod/agent.conf", "cat /etc/isopod/pki/kubelet.crt"]
        .map(|script| two.must(script))
}

#[test]
fn two_nodes_share_pods_and_services() {
    let mut net = Net::new();
    let (one, two) = (net.host("one"), net.host("two"));
    let c = Cluster::start(&one);
    Cluster::install_images(&two);
    let join = c.isopod(&["token"]).ok().unwrap();
    let token = join.trim().strip_prefix("isopod join ").unwrap();
    let isopod = binaries().join("isopod");
    two.run(isopod.to_str().unwrap(), &["join", token]).ok().unwrap();
    let first = aged(&one, &two);
    let log = fs::File::create(two.disk().join("agent.out")).unwrap();
    let mut agent =
        two.command(isopod.to_str().unwrap()).arg("agent").stdin(Stdio::null()).stderr(log).spawn().unwrap();
    c.wait_field("node two", ".status.conditions[?(@.type==\"Ready\")].status", |s| s == "True");
    for node in ["one", "two"] {
        c.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-{node}, labels: {{app: web}}}}\nspec:\n  nodeName: {node}\n  \
             containers: [{{name: c, image: 'web:1'}}]\n"
        ));
    }
    c.wait_ready("web-one");
    c.wait_ready("web-two");
    c.k("expose pod web-one --name=web --port=80 --target-port=8080 --selector=app=web");
    for (from, to) in [("web-one", "web-two"), ("web-two", "web-one")] {
        let ip = c.get(&format!("pod {to}"))["status"]["podIP"].as_str().unwrap().to_owned();
        eventually(&format!("{from} reaches {to}"), || {
            let ran = c.kubectl(&format!("exec {from} -- timeout 3 wget -q -O- http://{ip}:8080/"));
            if ran.out.trim() == to { Ok(()) } else { Err(ran) }
        });
        eventually(&format!("the service reaches both from {from}"), || {
            let ran = c.kubectl(&format!(
                "exec {from} -- sh -c 'for i in $(seq 40); do timeout 3 wget -q -O- http://web/; done'"
            ));
            if ran.out.contains("web-one") && ran.out.contains("web-two") { Ok(()) } else { Err(ran) }
        });
    }
    c.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: local}\nspec: {selector: {app: web}, type: NodePort, \
         externalTrafficPolicy: Local, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}\n",
    );
    for (from, to, pod) in [(&one, &two, "web-two"), (&two, &one, "web-one")] {
        let url = format!("http://{}:30080/", to.address);
        eventually(&format!("{pod} alone answers on its node's port"), || {
            let ran = from.sh(&format!("for i in $(seq 10); do curl -s -m 3 {url}; done"));
            if ran.out.lines().count() == 10 && ran.out.lines().all(|l| l == pod) { Ok(()) } else { Err(ran) }
        });
        // The client's own address, not the node's.
        let log = c.k(&format!("logs {pod}"));
        assert!(log.contains(&from.address), "{log}");
    }
    eventually("both certificates are renewed", || {
        let now = certificates(&two);
        if now.iter().zip(&first).all(|(now, first)| now != first) { Ok(()) } else { Err(now) }
    });
    let served =
        two.must("echo | openssl s_client -connect 127.0.0.1:10250 2>/dev/null | openssl x509 -noout -enddate");
    let year = two.must("openssl x509 -noout -enddate < /etc/isopod/pki/kubelet.crt");
    assert_eq!(served, year, "the running server has taken the new one");
    assert_eq!(c.k("exec web-two -- hostname").trim(), "web-two");
    assert!(c.k("logs web-two").contains("started web-two"));
    two.must("kill -9 $(cat /run/isopod/agent.lock)");
    agent.wait().unwrap();
    encryption_without_wireguard(&c, &two);
}

/// On a kernel with WireGuard this is for `make test-vm`.
fn encryption_without_wireguard(c: &Cluster, two: &Host) {
    if two.sh("ip link add probe type wireguard").code == 0 {
        return two.must("ip link delete probe").clear();
    }
    two.must("sed -i 's/podEncryption: none/podEncryption: wireguard/' /etc/isopod/cluster.yaml");
    let mut agent = two.spawn("encrypting.out", binaries().join("isopod").to_str().unwrap(), &["agent"]);
    eventually("the administrator is told", || {
        let events = c.k("get events -A --field-selector involvedObject.name=two,reason=PodEncryptionFailed");
        if events.contains("this kernel has no WireGuard") { Ok(()) } else { Err(events) }
    });
    let routes = two.must("ip route");
    assert!(routes.contains("unreachable 10.244.0.0/16"), "nothing goes in the clear: {routes}");
    let ip = c.get("pod web-two")["status"]["podIP"].as_str().unwrap().to_owned();
    assert_eq!(two.must(&format!("curl -s -m 5 http://{ip}:8080/")).trim(), "web-two", "its own pods are reached");
    two.must("kill -9 $(cat /run/isopod/agent.lock)");
    agent.wait().unwrap();
}
