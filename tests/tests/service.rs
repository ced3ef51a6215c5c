//! Services as pods and the node see them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use isopod_tests::{Cluster, Net, eventually};

fn three_pods(c: &Cluster) {
    c.k("create deployment web --image=web:1 --replicas=3");
    c.k("expose deployment web --port=80 --target-port=8080 --type=NodePort");
    c.k("run client --image=busybox:1 -- sleep 100000");
    c.wait_ready("client");
    c.k("rollout status deployment/web --timeout=60s");
    endpoints(c, 3);
}

fn endpoints(c: &Cluster, n: usize) {
    c.wait_field("endpointslices -l kubernetes.io/service-name=web", ".items[*].endpoints[*].addresses[0]", |list| {
        list.split_whitespace().count() == n
    });
}

/// Who answered, counted.
fn answers(text: &str) -> BTreeMap<String, u32> {
    let mut count = BTreeMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        *count.entry(line.trim().to_owned()).or_default() += 1;
    }
    count
}

#[test]
fn traffic_reaches_every_pod_from_everywhere() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    three_pods(&c);
    let service = c.get("service web");
    let ip = service["spec"]["clusterIP"].as_str().unwrap();
    let node_port = service["spec"]["ports"][0]["nodePort"].as_i64().unwrap();
    let from_pod =
        answers(&c.k(&format!("exec client -- sh -c 'for i in $(seq 90); do wget -q -O- http://{ip}/; done'")));
    assert_eq!(from_pod.len(), 3, "{from_pod:?}");
    assert!(from_pod.values().all(|n| *n >= 10), "{from_pod:?}");
    let loop_ = |url: &str| c.host.must(&format!("for i in $(seq 60); do curl -s -m 5 {url}; done"));
    let from_node = answers(&loop_(&format!("http://{ip}/")));
    assert_eq!(from_node.len(), 3, "{from_node:?}");
    for address in [c.host.address.as_str(), "127.0.0.1"] {
        let answered = answers(&loop_(&format!("http://{address}:{node_port}/")));
        assert_eq!(answered.len(), 3, "{address}: {answered:?}");
    }
    for name in ["web", "web.default", "web.default.svc.cluster.local"] {
        let by_name = c.k(&format!("exec client -- wget -q -O- http://{name}/"));
        assert!(by_name.starts_with("web-"), "{name}: {by_name}");
    }
}

/// How often a TCP handshake had to be repeated, in text from `/proc/net/netstat`.
fn repeated_handshakes(netstat: &str) -> u64 {
    let mut lines = netstat.lines().filter(|l| l.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split_whitespace().position(|n| n == "TCPSynRetrans").unwrap();
    values.split_whitespace().nth(place).unwrap().parse().unwrap()
}

/// Clients that ask all the time, on the node and in a pod, see a Service follow its scaling: what is gone refuses for a
/// moment, then is not asked any more. Nobody waits for a pod that is gone: no request takes two seconds, and handshakes
/// are not repeated (but for a packet that a busy machine loses).
#[test]
fn a_service_follows_scaling_and_nobody_hangs() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    three_pods(&c);
    let ip = c.get("service web")["spec"]["clusterIP"].as_str().unwrap().to_owned();
    let counters = || {
        let pod = c.k("exec client -- cat /proc/net/netstat");
        (repeated_handshakes(&c.host.must("cat /proc/net/netstat")), repeated_handshakes(&pod))
    };
    // Every line: how the request ended, and who answered.
    let node = format!("while [ ! -e /run/enough ]; do out=$(curl -s -m 2 http://{ip}/); echo \"$? $out\"; done");
    let pod = format!(
        "while [ ! -e /enough ]; do out=$(timeout 2 wget -q -O- http://{ip}/ 2> /dev/null); echo \"$? $out\"; done"
    );
    let before = counters();
    let mut clients = [
        c.host.spawn("node-client.log", "sh", &["-c", &node]),
        c.host.spawn(
            "pod-client.log",
            "sh",
            &["-c", &format!("KUBECONFIG=/etc/isopod/kubeconfig kubectl exec client -- sh -c '{pod}'")],
        ),
    ];
    let logs = ["node-client.log", "pod-client.log"].map(|name| c.host.disk().join(name));
    let read = |log: &std::path::Path| std::fs::read_to_string(log).unwrap_or_default();
    // Whom both clients reach from now on, once `settled` requests agree about it.
    let only = |what: &str, want: usize| {
        for log in &logs {
            let mut from = read(log).len();
            eventually(&format!("{what}: {}", log.display()), || {
                let text = read(log);
                let lines: Vec<&str> = text[from..].lines().collect();
                let asked = &lines[..lines.len().saturating_sub(1)];
                let failed = asked.iter().rposition(|l| !l.starts_with("0 web-"));
                let asked = &asked[failed.map_or(0, |n| n + 1)..];
                let names: BTreeMap<&str, usize> = asked.iter().map(|l| (&l[2..], 1)).collect();
                if names.len() > want {
                    from = text.len();
                }
                if asked.len() >= 60 && names.len() == want { Ok(()) } else { Err(lines.join("\n")) }
            });
        }
    };
    only("three pods answer", 3);
    for replicas in [1, 3, 2, 4] {
        let marks = logs.each_ref().map(|log| read(log).len());
        c.k(&format!("scale deployment web --replicas={replicas}"));
        endpoints(&c, replicas);
        only(&format!("{replicas} pods answer"), replicas);
        for (log, mark) in logs.iter().zip(marks) {
            let text = read(log);
            let failed: Vec<&str> = text[mark..].lines().filter(|l| !l.starts_with("0 web-")).collect();
            println!(
                "{}: {replicas} replicas, {} of {} refused",
                log.display(),
                failed.len(),
                text[mark..].lines().count()
            );
            // curl: 7, refused; 18, 52 and 56, the pod ended in the middle of a request. 28 would be a client that hung.
            // wget: 1, any of them; 143 would be a client that hung.
            let ended = |l: &&str| ["7 ", "18 ", "52 ", "56 ", "1 "].iter().any(|code| l.starts_with(code));
            assert!(failed.iter().all(ended), "{failed:?}");
        }
    }
    c.host.must("touch /run/enough");
    c.k("exec client -- touch /enough");
    for client in &mut clients {
        client.wait().unwrap();
    }
    let after = counters();
    let repeated = (after.0 - before.0, after.1 - before.1);
    println!("repeated handshakes on the node and in the pod: {repeated:?}");
    assert!(repeated.0 <= 1 && repeated.1 <= 1, "handshakes repeated: {repeated:?}");
}

#[test]
fn a_service_without_endpoints_refuses_at_once() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.k("create service clusterip empty --tcp=80:80");
    let ip = c.get("service empty")["spec"]["clusterIP"].as_str().unwrap().to_owned();
    eventually("connection refused", || {
        let ran = c.host.sh(&format!("curl -s -m 5 http://{ip}/"));
        // 7: refused; 28 would be a timeout.
        if ran.code == 7 { Ok(()) } else { Err(ran) }
    });
}

#[test]
fn readiness_decides_who_gets_traffic() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  replicas: 2\n  selector: {matchLabels: {app: web}}\n  \
         template:\n    metadata: {labels: {app: web}}\n    spec:\n      containers:\n      - name: web\n        image: web:1\n        \
         readinessProbe: {exec: {command: [test, '!', -e, /tmp/down]}, periodSeconds: 1, failureThreshold: 1}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}\n",
    );
    c.k("rollout status deployment/web --timeout=60s");
    let pods = c.k("get pods -l app=web -o jsonpath='{.items[*].metadata.name}'");
    let first = pods.split_whitespace().next().unwrap().to_owned();
    c.k(&format!("exec {first} -- touch /tmp/down"));
    c.wait_field(&format!("pod {first}"), ".status.containerStatuses[0].ready", |ready| ready == "false");
    let ip = c.get("service web")["spec"]["clusterIP"].as_str().unwrap().to_owned();
    eventually("the unready pod gets nothing", || {
        let text = c.host.must(&format!("for i in $(seq 20); do curl -s -m 5 http://{ip}/; done"));
        if text.contains(&first) { Err(text) } else { Ok(()) }
    });
    c.k(&format!("exec {first} -- rm /tmp/down"));
    eventually("the pod is back", || {
        let text = c.host.must(&format!("for i in $(seq 20); do curl -s -m 5 http://{ip}/; done"));
        if text.contains(&first) { Ok(()) } else { Err(text) }
    });
    let events = c.k("get events --field-selector reason=Unhealthy");
    assert!(events.contains("Readiness probe failed"), "{events}");
}

#[test]
fn clients_stick_and_names_resolve_under_load() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: sticky}\nspec: {selector: {app: web}, sessionAffinity: ClientIP, \
         ports: [{port: 80, targetPort: 8080}]}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: mapped}\nspec:\n  containers: [{name: c, image: 'web:1', ports: \
         [{containerPort: 8080, hostPort: 8088}]}]\n",
    );
    three_pods(&c);
    c.wait_ready("mapped");
    let sticky = "exec client -- sh -c 'for i in $(seq 30); do wget -q -O- http://sticky/; done'";
    eventually("one pod answers one client", || {
        let text = c.k(sticky);
        let answered = answers(&text);
        if answered.len() == 1 && answered.values().all(|n| *n == 30) { Ok(()) } else { Err(text) }
    });
    let mapped = format!("http://{}:8088/", c.host.address);
    assert_eq!(c.host.must(&format!("curl -s -m 5 {mapped}")).trim(), "mapped");
    assert_eq!(c.host.must("curl -s -m 5 http://127.0.0.1:8088/").trim(), "mapped");
    assert_eq!(c.k(&format!("exec client -- wget -q -O- {mapped}")).trim(), "mapped");
    let load = answers(&c.k("exec client -- sh -c 'for i in $(seq 8); do (for j in $(seq 50); do \
         nslookup web.default.svc.cluster.local >/dev/null 2>&1 && echo ok || echo lost; done) & done; wait'"));
    assert_eq!(load, BTreeMap::from([("ok".to_owned(), 400)]));
}

/// A LoadBalancer Service gets the nodes' addresses and answers there, from outside too; the tools say the same.
#[test]
fn load_balancers_work_without_a_cloud() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let outside = net.host("two");
    three_pods(&c);
    let expose = |name: &str, more: &str| {
        c.apply(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, selector: {{app: web}}, \
             ports: [{{port: 8000, targetPort: 8080}}]{more}}}\n"
        ))
    };
    let ingress = |name: &str, want: &str| {
        c.wait_field(&format!("service {name}"), ".status.loadBalancer.ingress[*].ip", |ip| ip == want);
    };
    expose("first", "");
    ingress("first", &c.host.address);
    let url = format!("http://{}:8000/", c.host.address);
    let all_three = || {
        let text = outside.must(&format!("for i in $(seq 60); do curl -s -m 5 {url}; done"));
        if answers(&text).len() == 3 { Ok(()) } else { Err(text) }
    };
    eventually("all pods answer outside", all_three);
    assert!(c.k(&format!("exec client -- timeout 5 wget -q -O- {url}")).starts_with("web-"));
    // The port is taken: the second waits for the first to go.
    expose("second", ", externalTrafficPolicy: Local, loadBalancerSourceRanges: [10.88.0.2/32]");
    eventually("why it has to wait", || {
        let events = c.k("get events --field-selector involvedObject.name=second");
        if events.contains("belongs to Service default/first") { Ok(()) } else { Err(events) }
    });
    ingress("second", "");
    c.k("delete service first");
    ingress("second", &c.host.address);
    eventually("all pods answer again, and see the client", all_three);
    let log = c.k("logs -l app=web --tail=1000");
    assert!(log.contains(&outside.address), "{log}");
    // Sources that are not allowed get no answer.
    c.k("patch service second -p '{\"spec\":{\"loadBalancerSourceRanges\":[\"10.99.0.0/16\"]}}'");
    eventually("no answer", || {
        let ran = outside.sh(&format!("curl -s -m 1 {url}"));
        if ran.code == 28 { Ok(()) } else { Err(ran) }
    });
    let table = c.isopod(&["services", "-n", "default", "-o", "wide"]).ok().unwrap();
    let row = table.lines().find(|l| l.contains(":8000/TCP")).unwrap();
    assert!(row.contains("load balancer") || row.contains("cluster address"), "{table}");
    assert!(table.contains("from 10.99.0.0/16") && table.matches("web-").count() >= 6, "{table}");
    let trace = c.isopod(&["trace", "client", "web:80"]).ok().unwrap();
    assert!(trace.ends_with("gets through to all 3 endpoints\n"), "{trace}");
    let real = c.isopod(&["trace", "client", "web:80", "--packet"]).ok().unwrap();
    for part in ["to_service: goto pick_3", "the kernel chose 10.244.", "answer   came after"] {
        assert!(real.contains(part), "{part}: {real}");
    }
    let trace = c.isopod(&["trace", "nobody", "web:80"]);
    assert_eq!((trace.code, trace.err.lines().count()), (64, 1), "{trace:?}");
    // kube-proxy's places and names.
    let health = c.host.must("curl -s -m 5 http://127.0.0.1:10256/healthz");
    assert!(health.contains("\"nodeEligible\":true"), "{health}");
    c.host.must("curl -s -f -m 5 http://127.0.0.1:10256/livez");
    let metrics = c.host.must("curl -s -f -m 5 http://127.0.0.1:10249/metrics");
    for name in ["network_programming_duration_seconds_bucket", "sync_proxy_rules_service_changes_total"] {
        assert!(metrics.contains(&format!("kubeproxy_{name}")), "{metrics}");
    }
    assert_eq!(c.host.must("curl -s -f -m 5 http://127.0.0.1:10249/proxyMode"), "nftables");
    // Somebody edits our tables: all is as it was within moments.
    let ip = c.get("service web")["spec"]["clusterIP"].as_str().unwrap().to_owned();
    for edit in ["flush map ip isopod services", "flush chain ip isopod nat", "flush ruleset"] {
        c.host.must(&format!("nft {edit}"));
        eventually(edit, || {
            let ran = c.host.sh(&format!("curl -s -m 1 http://{ip}/"));
            if ran.out.starts_with("web-") { Ok(()) } else { Err(ran) }
        });
    }
}
