//! Addresses of a pool, announced by one node of two to a client that is neither.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, process::Command, time::Duration};

use isopod_tests::{Cluster, Net, eventually, eventually_within, host::binaries};

#[test]
fn an_address_of_the_pool_moves_when_its_node_dies() {
    let mut net = Net::new();
    let (one, two, client) = (net.host("one"), net.host("two"), net.host("three"));
    let c = Cluster::start(&one);
    Cluster::install_images(&two);
    let isopod = binaries().join("isopod");
    let isopod = isopod.to_str().unwrap();
    let token = c.isopod(&["token"]).ok().unwrap();
    two.run(isopod, &["join", token.trim().strip_prefix("isopod join ").unwrap()]).ok().unwrap();
    // A lease ends when nobody renews it for so long.
    two.must("echo 'nodeLeaseDurationSeconds: 8' >> /etc/isopod/config.yaml");
    let mut agent = two.spawn("agent.out", isopod, &["agent"]);
    c.wait_field("node two", ".status.conditions[?(@.type==\"Ready\")].status", |s| s == "True");
    let pod = |node: &str| {
        c.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web-{node}, labels: {{app: web}}}}\nspec:\n  nodeName: {node}\n  \
             containers: [{{name: c, image: 'web:1'}}]\n"
        ));
        c.wait_ready(&format!("web-{node}"));
    };
    pod("two");
    let service = |name: &str, more: &str| {
        c.apply(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, selector: {{app: web}}, \
             externalTrafficPolicy: Local, ports: [{{port: 80, targetPort: 8080}}]{more}}}\n"
        ));
    };
    let ingress = |name: &str, want: &str| {
        c.wait_field(&format!("service {name}"), ".status.loadBalancer.ingress[*].ip", |ip| ip == want);
    };
    let pool = |text: &str| {
        c.apply(&format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: load-balancer, namespace: kube-system}}\ndata: {{addresses: '{text}'}}\n"
        ));
    };
    let answers = |ip: &str, pod: &str| {
        let ran = client.sh(&format!("curl -s -m 1 http://{ip}/"));
        if ran.out.trim() == pod { Ok(()) } else { Err(ran) }
    };
    // Nodes' addresses, until there is a pool; then one of those. Only a node with an endpoint may announce.
    service("web", "");
    ingress("web", &two.address);
    pool("10.88.0.200-10.88.0.201, nonsense");
    pool("10.88.0.200-10.88.0.201");
    ingress("web", "10.88.0.200");
    eventually("a client on the link reaches the pod", || answers("10.88.0.200", "web-two"));
    let announcer = ".status.conditions[?(@.type==\"isopod.dev/Announced\")].message";
    c.wait_field("service web", announcer, |m| m == "by node two");
    // The client's own address, not the node's.
    assert!(c.k("logs web-two").contains(&client.address), "{}", c.k("logs web-two"));
    // Another one gets the next address, or the one it asks for; a third finds none.
    service("asks", ", loadBalancerIP: 10.88.0.201");
    ingress("asks", "10.88.0.201");
    service("waits", "");
    eventually("why it has no address", || {
        let events = c.k("get events --field-selector involvedObject.name=waits");
        if events.contains("no IPv4 address of the pool is left") { Ok(()) } else { Err(events) }
    });
    c.k("delete service asks");
    ingress("waits", "10.88.0.201");
    eventually("it is on that node's link, and on no other", || {
        let (here, there) = (two.must("ip -o addr show dev eth0"), one.must("ip -o addr"));
        if here.contains("10.88.0.200/32") && !there.contains("10.88.0.200") { Ok(()) } else { Err((here, there)) }
    });
    // The node dies, and the other, which has an endpoint now, replaces it when its lease is over.
    pod("one");
    let init = fs::read_to_string(two.disk().with_file_name("pid")).unwrap();
    assert!(Command::new("kill").args(["-KILL", init.trim()]).status().unwrap().success());
    agent.wait().unwrap();
    eventually_within(Duration::from_secs(60), "the other node answers", || answers("10.88.0.200", "web-one"));
    c.wait_field("service web", announcer, |m| m == "by node one");
    // No endpoint, no announcement; and nothing stays.
    c.k("delete pod web-one --wait=false --grace-period=0");
    eventually("nobody announces", || {
        let held = one.must("ip -o addr show dev eth0");
        if held.contains("10.88.0.200") { Err(held) } else { Ok(()) }
    });
    pod("one");
    eventually("it answers again", || answers("10.88.0.200", "web-one"));
    c.isopod(&["down"]).ok().unwrap();
    let held = one.must("ip -o addr");
    assert!(!held.contains("10.88.0.20"), "{held}");
}
