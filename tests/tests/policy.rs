//! NetworkPolicies as pods, the node and a machine outside of the cluster see them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use isopod_tests::{Cluster, Host, Net, eventually};

/// Pods that serve 8080 (`http`) and 8081 (`admin`), as NAMESPACE/NAME with the label `app: NAME`.
const PODS: [&str; 4] = ["nx/a", "nx/b", "ny/a", "ny/b"];

struct World {
    c: Cluster,
    outside: Host,
    addresses: BTreeMap<String, String>,
}

fn pod(name: &str, labels: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {labels}}}\nspec:\n  \
         terminationGracePeriodSeconds: 0\n  containers:\n  - name: c\n    image: busybox:1\n    command: [sh, -c, \
         'mkdir -p /www; hostname > /www/index.html; httpd -p 8081 -h /www; exec httpd -f -p 8080 -h /www']\n    ports: \
         [{{name: http, containerPort: 8080}}, {{name: admin, containerPort: 8081}}]\n    readinessProbe: {{httpGet: \
         {{path: /, port: 8080}}, periodSeconds: 1}}\n---\n"
    )
}

impl World {
    fn start(net: &mut Net) -> Self {
        let c = Cluster::start(&net.host("one"));
        let outside = net.host("two");
        let mut all = String::new();
        for namespace in ["nx", "ny"] {
            all += &format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n---\n");
            all += &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: {namespace}}}\nspec: {{selector: \
                 {{app: a}}, type: NodePort, ports: [{{port: 80, targetPort: http, nodePort: {}}}]}}\n---\n",
                if namespace == "nx" { 30_080 } else { 30_081 }
            );
        }
        for name in PODS {
            all += &pod(name, &format!("{{app: {}}}", name.split_once('/').unwrap().1));
        }
        // A namespace may have to get its service account first.
        eventually("pods are made", || c.try_apply(&all));
        let mut world = Self { c, outside, addresses: BTreeMap::new() };
        PODS.iter().for_each(|name| world.learn(name));
        world
    }

    fn learn(&mut self, name: &str) {
        let (namespace, pod) = name.split_once('/').unwrap();
        self.c.wait_ready(&format!("{pod} -n {namespace}"));
        let object = self.c.get(&format!("pod {pod} -n {namespace}"));
        self.addresses.insert(name.into(), object["status"]["podIP"].as_str().unwrap().into());
    }

    /// `nx/b:8080` is a pod's port; anything else is an address as it is.
    fn url(&self, target: &str) -> String {
        let (host, port) = target.rsplit_once(':').unwrap();
        format!("http://{}:{port}/", self.addresses.get(host).map_or(host, String::as_str))
    }

    /// Which of the targets answer, all asked at the same time.
    fn ask(&self, from: &str, targets: &[&str]) -> Result<BTreeMap<String, bool>, String> {
        let program = if from.contains('/') { "timeout 1 wget -q -O-" } else { "curl -s -f -m 1" };
        let one = |t: &&str| format!("({program} {} >/dev/null && echo '{t} yes' || echo '{t} no') &", self.url(t));
        let script = targets.iter().map(one).collect::<Vec<_>>().join("\n") + "\nwait";
        let ran = match from {
            "node" => self.c.host.sh(&script),
            "outside" => self.outside.sh(&script),
            pod => {
                let (namespace, pod) = pod.split_once('/').unwrap();
                let script = script.replace('\'', "\"");
                self.c.kubectl(&format!("exec -n {namespace} {pod} -- sh -c '{script}'"))
            }
        };
        let parse = |line: &str| line.split_once(' ').map(|(target, word)| (target.to_owned(), word == "yes"));
        let answers: BTreeMap<_, _> = ran.out.lines().filter_map(parse).collect();
        if answers.len() == targets.len() { Ok(answers) } else { Err(format!("{ran:?}")) }
    }

    /// Waits until every row, `from -> target yes|no`, holds at the same time.
    #[track_caller]
    fn expect(&self, what: &str, rows: &[&str]) {
        let mut by_source: BTreeMap<&str, Vec<(&str, bool)>> = BTreeMap::new();
        for row in rows {
            let words: Vec<&str> = row.split_whitespace().collect();
            by_source.entry(words[0]).or_default().push((words[2], words[3] == "yes"));
        }
        eventually(what, || {
            for (from, wanted) in &by_source {
                let targets: Vec<&str> = wanted.iter().map(|(t, _)| *t).collect();
                let answers = self.ask(from, &targets)?;
                if let Some((target, want)) = wanted.iter().find(|(t, want)| answers[*t] != *want) {
                    return Err(format!("{from} -> {target}: expected {want}"));
                }
            }
            Ok(())
        });
    }

    /// A policy of namespace nx, alone, and what it comes to.
    #[track_caller]
    fn alone(&self, what: &str, spec: &str, rows: &[&str]) {
        self.c.apply(&policy("p", spec));
        self.expect(what, rows);
        self.c.k("delete networkpolicy -n nx p");
    }
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: nx}}\nspec: {spec}\n---\n"
    )
}

const OPEN: [&str; 6] = [
    "ny/a -> nx/a:8080 yes",
    "nx/b -> nx/a:8081 yes",
    "nx/a -> ny/a:8080 yes",
    "node -> nx/a:8080 yes",
    "outside -> 10.88.0.1:30080 yes",
    "nx/a -> a.nx:80 yes",
];

#[test]
fn policies_decide_who_gets_in() {
    let mut net = Net::new();
    let w = World::start(&mut net);
    w.expect("without policies everybody reaches everybody", &OPEN);
    w.alone(
        "default deny",
        "{podSelector: {}}",
        &[
            "ny/a -> nx/a:8080 no",
            "nx/b -> nx/a:8080 no",
            "ny/a -> a.nx:80 no",
            "outside -> 10.88.0.1:30080 no",
            "outside -> 10.88.0.1:30081 yes",
            "nx/a -> ny/a:8080 yes",
            // Itself, also by its Service; probes come from the node.
            "nx/a -> nx/a:8080 yes",
            "nx/a -> a.nx:80 yes",
            "node -> nx/a:8080 yes",
        ],
    );
    w.expect("a policy that is gone does nothing any more", &OPEN);
    w.alone("an empty rule lets everybody in", "{podSelector: {}, ingress: [{}]}", &OPEN);
    w.alone(
        "only the pods it selects are isolated",
        "{podSelector: {matchLabels: {app: a}}}",
        &["ny/a -> nx/a:8080 no", "ny/a -> nx/b:8080 yes"],
    );
    w.alone(
        "pods of its own namespace",
        "{podSelector: {matchLabels: {app: a}}, ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}",
        &[
            "nx/b -> nx/a:8080 yes",
            "nx/b -> nx/a:8081 yes",
            "nx/b -> a.nx:80 yes",
            "ny/b -> nx/a:8080 no",
            "outside -> 10.88.0.1:30080 no",
        ],
    );
    w.alone(
        "a namespace",
        "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ny}}}]}]}",
        &["ny/a -> nx/a:8080 yes", "ny/b -> nx/b:8081 yes", "nx/b -> nx/a:8080 no"],
    );
    w.alone("pods of a namespace", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ny}}, podSelector: {matchExpressions: [{key: app, operator: In, values: [b]}]}}]}]}", &[
        "ny/b -> nx/a:8080 yes",
        "ny/a -> nx/a:8080 no",
        "nx/b -> nx/a:8080 no",
    ]);
    w.alone("one peer or the other", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ny}}}, {podSelector: {matchLabels: {app: b}}}]}]}", &[
        "ny/a -> nx/a:8080 yes",
        "nx/b -> nx/a:8080 yes",
        "nx/a -> nx/b:8080 no",
    ]);
    w.alone(
        "one port",
        "{podSelector: {}, ingress: [{ports: [{port: 8081}]}]}",
        &["ny/a -> nx/a:8081 yes", "ny/a -> nx/a:8080 no", "outside -> 10.88.0.1:30080 no"],
    );
    w.alone(
        "a named port",
        "{podSelector: {}, ingress: [{ports: [{port: http}]}]}",
        &["ny/a -> nx/a:8080 yes", "ny/a -> nx/a:8081 no", "outside -> 10.88.0.1:30080 yes"],
    );
    w.alone(
        "a range of ports for some",
        "{podSelector: {}, ingress: [{from: [{podSelector: {}}], ports: [{port: 8081, endPort: 9000}]}]}",
        &["nx/b -> nx/a:8081 yes", "nx/b -> nx/a:8080 no", "ny/a -> nx/a:8081 no"],
    );
    let hole = format!(
        "{{podSelector: {{}}, ingress: [{{from: [{{ipBlock: {{cidr: 10.244.0.0/16, except: [{}/32]}}}}]}}]}}",
        w.addresses["ny/a"]
    );
    w.alone(
        "a block with a hole",
        &hole,
        &["ny/b -> nx/a:8080 yes", "ny/a -> nx/a:8080 no", "outside -> 10.88.0.1:30080 no"],
    );
    let block = "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.88.0.2/32}}], ports: [{port: 8080}]}]}";
    w.alone("a machine outside", block, &["outside -> 10.88.0.1:30080 yes", "ny/a -> nx/a:8080 no"]);
}

#[test]
fn policies_decide_who_gets_out_and_follow_changes() {
    let mut net = Net::new();
    let mut w = World::start(&mut net);
    w.alone(
        "no way out",
        "{podSelector: {}, policyTypes: [Egress]}",
        &[
            "nx/a -> ny/a:8080 no",
            "nx/a -> nx/b:8080 no",
            // In, with the answers out.
            "ny/a -> nx/a:8080 yes",
            "outside -> 10.88.0.1:30080 yes",
            "node -> nx/a:8080 yes",
        ],
    );
    w.alone("out to some pods, by whatever way", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}, podSelector: {matchLabels: {app: a}}}], ports: [{port: http}]}]}", &[
        "nx/b -> ny/a:8080 yes",
        "nx/b -> a.ny:80 yes",
        "nx/b -> nx/a:8080 yes",
        "nx/b -> ny/a:8081 no",
        "nx/b -> ny/b:8080 no",
    ]);
    let block = format!(
        "{{podSelector: {{}}, policyTypes: [Egress], egress: [{{to: [{{ipBlock: {{cidr: {}/32}}}}]}}]}}",
        w.addresses["ny/b"]
    );
    w.alone("out to an address", &block, &["nx/a -> ny/b:8081 yes", "nx/a -> ny/a:8080 no"]);
    w.alone("both ways", "{podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}", &[
        "nx/b -> nx/a:8080 yes",
        "nx/a -> nx/b:8080 no",
        "ny/a -> nx/a:8080 no",
        "nx/b -> ny/a:8080 yes",
    ]);
    // Policies add up.
    w.c.apply(&(policy("deny", "{podSelector: {}}")
        + &policy("friends", "{podSelector: {matchLabels: {app: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {friend: 'yes'}}}]}, {from: [{podSelector: {matchLabels: {role: client}}}]}]}")));
    let closed = ["ny/a -> nx/a:8080 no", "nx/b -> nx/a:8080 no"];
    w.expect("nobody is a friend yet", &closed);
    w.c.k("label namespace ny friend=yes");
    w.expect(
        "a namespace becomes a friend",
        &["ny/a -> nx/a:8080 yes", "nx/b -> nx/a:8080 no", "ny/a -> nx/b:8080 no"],
    );
    w.c.k("label pod -n nx b role=client");
    w.expect("a pod becomes a client", &["ny/a -> nx/a:8080 yes", "nx/b -> nx/a:8080 yes"]);
    w.c.k("label namespace ny friend-");
    w.c.k("label pod -n nx b role-");
    w.expect("no friends any more", &closed);
    w.c.k("label pod -n nx a app=other --overwrite");
    w.expect("a pod is another one's now", &["ny/a -> nx/a:8080 no"]);
    // Pods that come later.
    w.c.apply(&(pod("nx/late", "{role: client}") + &pod("nx/new", "{app: a}")));
    w.learn("nx/late");
    w.learn("nx/new");
    w.expect(
        "new pods are known",
        &["nx/late -> nx/new:8080 yes", "ny/a -> nx/new:8080 no", "nx/late -> nx/b:8080 no"],
    );
    // A policy that is changed.
    w.c.apply(&policy("friends", "{podSelector: {}, ingress: [{}]}"));
    w.expect("open again", &["ny/a -> nx/a:8080 yes", "ny/a -> nx/new:8080 yes", "nx/b -> nx/a:8081 yes"]);
    w.c.apply(&policy("friends", "{podSelector: {}, ingress: []}"));
    w.expect("closed again", &["ny/a -> nx/a:8080 no", "ny/a -> nx/new:8080 no", "nx/b -> nx/a:8081 no"]);
    // Nothing is forgotten when the agent starts again.
    w.c.kill_agent();
    w.c.up();
    w.expect("closed after a restart", &["ny/a -> nx/a:8080 no", "nx/b -> nx/a:8081 no", "ny/a -> ny/b:8080 yes"]);
    w.c.k("delete networkpolicy -n nx --all");
    w.expect("open without policies", &["ny/a -> nx/a:8080 yes", "nx/b -> nx/a:8081 yes"]);
}
