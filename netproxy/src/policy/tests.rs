//! Policies against a plain reading of the specification, and against the kernel.

use std::collections::HashSet;

use k8s_openapi::api::networking::v1::NetworkPolicy;
use proptest::{prelude::*, test_runner::Config as Runs};
use serde_json::{Value as Json, json};

use super::{Direction, model::Policies, objects::*};
use crate::{
    model::{objects::Protocol, shadow::Delta, shadow::cancel_out},
    nft::{
        element::{Element, Family, Map},
        kernel::Kernel,
        tests as nft,
        trace::Tracer,
    },
};

/// A policy from the fields of its `spec`.
pub(crate) fn policy(namespace: &str, name: &str, spec: Json) -> Policy {
    let object: NetworkPolicy =
        serde_json::from_value(json!({ "metadata": { "namespace": namespace, "name": name }, "spec": spec })).unwrap();
    Policy::parse(&object).unwrap()
}

/// A pod with labels `key=value` and named ports.
pub(crate) fn pod(name: &str, node: &str, address: &str, labels: &[(&str, &str)], ports: &[(&str, u16)]) -> Pod {
    let (namespace, name) = name.split_once('/').unwrap();
    Pod {
        name: Name::new(namespace, name),
        node: node.into(),
        addresses: address.split(',').map(|a| a.parse().unwrap()).collect(),
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ports: ports.iter().map(|(n, p)| ((*n).into(), Protocol::Tcp, *p)).collect(),
    }
}

pub(crate) fn labels(list: &[(&str, &str)]) -> Labels {
    list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// Two namespaces, and pods of two apps in each on both nodes.
pub(crate) fn world() -> Policies {
    let mut all = Policies::new("me");
    all.set_namespace("one".into(), labels(&[("team", "red")]));
    all.set_namespace("two".into(), labels(&[("team", "blue")]));
    for (name, node, address, app) in [
        ("one/web", "me", "10.244.0.2,2001:db8:1::2", "web"),
        ("one/db", "me", "10.244.0.3,2001:db8:1::3", "db"),
        ("one/far", "other", "10.244.1.2,2001:db8:1:1::2", "web"),
        ("two/web", "me", "10.244.0.4,2001:db8:1::4", "web"),
        ("two/far", "other", "10.244.1.4,2001:db8:1:1::4", "db"),
    ] {
        all.set_pod(pod(name, node, address, &[("app", app)], &[("http", if app == "web" { 8080 } else { 5432 })]));
    }
    all
}

fn elements(all: &Policies) -> Vec<Element> {
    let mut list = Vec::new();
    all.elements(&mut |e| list.push(e));
    list
}

fn flush(all: &mut Policies) -> Delta {
    let mut delta = Delta::default();
    all.flush(&mut delta.removed, &mut delta.added);
    cancel_out(&mut delta);
    delta
}

/// Whether a packet passes, by the elements.
fn passes(all: &Policies, from: &str, to: &str, protocol: Protocol) -> bool {
    let from = from.parse().unwrap();
    let tracer = Tracer::new(Family::of(&from), &elements(all), Vec::new(), Vec::new());
    let to = to.parse().unwrap();
    [Direction::Egress, Direction::Ingress].iter().all(|way| tracer.permits(*way, from, to, protocol))
}

#[test]
#[allow(clippy::type_complexity, reason = "a table of cases")]
fn what_the_api_says_happens() {
    let web = "10.244.0.2";
    let (db, far, two) = ("10.244.0.3", "10.244.1.2", "10.244.0.4");
    let tcp = Protocol::Tcp;
    // Spec, then: from, to, whether it passes.
    let cases: &[(&str, Json, &[(&str, &str, bool)])] = &[
        (
            "default deny",
            json!({ "podSelector": {} }),
            &[
                (db, "10.244.0.2:80", false),
                ("192.0.2.9", "10.244.0.2:80", false),
                (web, "10.244.0.2:80", true),
                (web, "10.244.0.4:80", true),
            ],
        ),
        (
            "no egress",
            json!({ "podSelector": {}, "policyTypes": ["Egress"] }),
            &[(web, "10.244.0.4:80", false), (web, "192.0.2.9:80", false), (two, "10.244.0.2:80", true)],
        ),
        (
            "empty rule: everybody",
            json!({ "podSelector": {}, "ingress": [{}] }),
            &[(two, "10.244.0.2:80", true), ("192.0.2.9", "10.244.0.2:1", true)],
        ),
        (
            "only one pod is meant",
            json!({ "podSelector": { "matchLabels": { "app": "db" } } }),
            &[(web, "10.244.0.3:80", false), (two, "10.244.0.2:80", true)],
        ),
        (
            "pods of the same namespace",
            json!({ "podSelector": { "matchLabels": { "app": "db" } },
                "ingress": [{ "from": [{ "podSelector": { "matchLabels": { "app": "web" } } }] }] }),
            &[
                (web, "10.244.0.3:5432", true),
                (far, "10.244.0.3:9", true),
                (two, "10.244.0.3:5432", false),
                ("10.244.1.4", "10.244.0.3:5432", false),
            ],
        ),
        (
            "a namespace",
            json!({ "podSelector": {}, "ingress": [{ "from": [
                { "namespaceSelector": { "matchLabels": { "team": "blue" } } }] }] }),
            &[(two, "10.244.0.2:1", true), ("10.244.1.4", "10.244.0.2:1", true), (db, "10.244.0.2:1", false)],
        ),
        (
            "pods of a namespace: both must fit",
            json!({ "podSelector": {}, "ingress": [{ "from": [
                { "namespaceSelector": { "matchLabels": { "team": "blue" } },
                  "podSelector": { "matchExpressions": [{ "key": "app", "operator": "NotIn", "values": ["web"] }] } }] }] }),
            &[(two, "10.244.0.2:1", false), ("10.244.1.4", "10.244.0.2:1", true), (db, "10.244.0.2:1", false)],
        ),
        (
            "two peers: either",
            json!({ "podSelector": {}, "ingress": [{ "from": [
                { "namespaceSelector": { "matchLabels": { "team": "blue" } } },
                { "podSelector": { "matchLabels": { "app": "db" } } }] }] }),
            &[(two, "10.244.0.2:1", true), (db, "10.244.0.2:1", true), (far, "10.244.0.2:1", false)],
        ),
        (
            "a port",
            json!({ "podSelector": {}, "ingress": [{ "ports": [{ "port": 80 }] }] }),
            &[(two, "10.244.0.2:80", true), ("192.0.2.9", "10.244.0.2:80", true), (two, "10.244.0.2:81", false)],
        ),
        (
            "a port of a protocol without number",
            json!({ "podSelector": {}, "ingress": [{ "ports": [{ "protocol": "UDP" }] }] }),
            &[(two, "10.244.0.2:80", false)],
        ),
        (
            "a range of ports for a pod",
            json!({ "podSelector": {}, "ingress": [{ "from": [{ "podSelector": {} }],
                "ports": [{ "port": 80, "endPort": 90 }, { "port": 85, "endPort": 95 }] }] }),
            &[
                (db, "10.244.0.2:80", true),
                (db, "10.244.0.2:95", true),
                (db, "10.244.0.2:96", false),
                (two, "10.244.0.2:85", false),
            ],
        ),
        (
            "a named port is the receiver's",
            json!({ "podSelector": {}, "ingress": [{ "ports": [{ "port": "http" }] }] }),
            &[(two, "10.244.0.2:8080", true), (two, "10.244.0.3:5432", true), (two, "10.244.0.3:8080", false)],
        ),
        (
            "a named port on the way out",
            json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [{ "ports": [{ "port": "http" }] }] }),
            &[
                (web, "10.244.0.3:5432", true),
                (web, "10.244.0.3:8080", false),
                (web, "10.244.1.2:8080", true),
                (web, "192.0.2.9:8080", false),
            ],
        ),
        (
            "a block with a hole",
            json!({ "podSelector": {}, "ingress": [{ "from": [{ "ipBlock": {
                "cidr": "192.0.2.0/24", "except": ["192.0.2.128/25", "192.0.2.7/32"] } }] }] }),
            &[
                ("192.0.2.1", "10.244.0.2:80", true),
                ("192.0.2.7", "10.244.0.2:80", false),
                ("192.0.2.200", "10.244.0.2:80", false),
                ("198.51.100.1", "10.244.0.2:80", false),
            ],
        ),
        (
            "a block on the way out, on some ports",
            json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [
                { "to": [{ "ipBlock": { "cidr": "10.244.0.0/16" } }], "ports": [{ "port": 80 }] },
                { "to": [{ "ipBlock": { "cidr": "10.0.0.0/8" } }], "ports": [{ "port": 70, "endPort": 80 }] }] }),
            &[
                (web, "10.244.0.4:80", true),
                (web, "10.9.9.9:75", true),
                (web, "10.9.9.9:81", false),
                (web, "192.0.2.9:80", false),
            ],
        ),
        (
            "both families",
            json!({ "podSelector": {}, "ingress": [{ "from": [{ "ipBlock": { "cidr": "2001:db8:9::/48" } },
                { "podSelector": { "matchLabels": { "app": "db" } } }] }] }),
            &[
                ("2001:db8:9::1", "[2001:db8:1::2]:80", true),
                ("2001:db8:8::1", "[2001:db8:1::2]:80", false),
                ("2001:db8:1::3", "[2001:db8:1::2]:80", true),
                ("10.244.0.3", "10.244.0.2:80", true),
                ("192.0.2.9", "10.244.0.2:80", false),
            ],
        ),
    ];
    for (what, spec, expected) in cases {
        let mut all = world();
        all.set_policy(policy("one", "p", spec.clone()));
        flush(&mut all);
        for (from, to, want) in *expected {
            assert_eq!(passes(&all, from, to, tcp), *want, "{what}: {from} -> {to}");
        }
    }
}

#[test]
fn policies_add_up_and_both_ends_have_a_say() {
    let mut all = world();
    let db = json!({ "matchLabels": { "app": "db" } });
    all.set_policy(policy("one", "deny", json!({ "podSelector": {} })));
    all.set_policy(policy("one", "a", json!({ "podSelector": db, "ingress": [{ "ports": [{ "port": 80 }] }] })));
    all.set_policy(policy("one", "b", json!({ "podSelector": db, "ingress": [{ "ports": [{ "port": 81 }] }] })));
    flush(&mut all);
    let (web, tcp) = ("10.244.0.2", Protocol::Tcp);
    assert!(passes(&all, web, "10.244.0.3:80", tcp) && passes(&all, web, "10.244.0.3:81", tcp));
    assert!(!passes(&all, web, "10.244.0.3:82", tcp));
    all.set_policy(policy("one", "out", json!({ "podSelector": {}, "policyTypes": ["Egress"] })));
    flush(&mut all);
    assert!(!passes(&all, web, "10.244.0.3:80", tcp), "the sender may not");
    assert!(passes(&all, "10.244.0.4", "10.244.0.3:80", tcp));
    for name in ["deny", "a", "b", "out"] {
        all.remove_policy(&Name::new("one", name));
    }
    let delta = flush(&mut all);
    assert!(delta.added.is_empty() && !delta.removed.is_empty());
    assert!(elements(&all).is_empty());
}

/// Rows of upstream's own suite that are about one thing each: what it is about, policies, and who passes by what protocol.
#[test]
#[allow(clippy::type_complexity, reason = "a table of cases")]
fn rows_of_upstreams_suite() {
    use Protocol::{Sctp, Tcp, Udp};
    let (web, db, two) = ("10.244.0.2", "10.244.0.3", "10.244.0.4");
    let cases: &[(&str, &[Json], &[(&str, &str, Protocol, bool)])] = &[
        (
            "a port of SCTP is none of TCP",
            &[json!({ "podSelector": {}, "ingress": [{ "ports": [{ "protocol": "SCTP", "port": 80 }] }] })],
            &[
                (two, "10.244.0.2:80", Sctp, true),
                (two, "10.244.0.2:80", Tcp, false),
                (two, "10.244.0.2:80", Udp, false),
            ],
        ),
        (
            "ports of UDP, one and a range",
            &[json!({ "podSelector": {}, "ingress": [{ "ports": [
                { "protocol": "UDP", "port": 80 }, { "protocol": "UDP", "port": 90, "endPort": 95 }] }] })],
            &[
                (two, "10.244.0.2:80", Udp, true),
                (two, "10.244.0.2:93", Udp, true),
                (two, "10.244.0.2:93", Tcp, false),
                (two, "10.244.0.2:96", Udp, false),
            ],
        ),
        (
            "a hole that another block fills",
            &[
                json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [{ "to": [{ "ipBlock": {
                    "cidr": "10.244.0.0/24", "except": ["10.244.0.3/32", "10.244.0.4/32"] } }] }] }),
                json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [{ "to": [{ "ipBlock": {
                    "cidr": "10.244.0.3/32" } }] }] }),
            ],
            &[(web, "10.244.0.3:1", Tcp, true), (web, "10.244.0.4:1", Tcp, false), (web, "10.244.0.9:1", Tcp, true)],
        ),
        (
            "egress is the client's to deny, whatever the server lets in",
            &[
                json!({ "podSelector": { "matchLabels": { "app": "web" } }, "policyTypes": ["Egress"] }),
                json!({ "podSelector": { "matchLabels": { "app": "db" } }, "ingress": [{}] }),
            ],
            &[(web, "10.244.0.3:80", Tcp, false), (two, "10.244.0.3:80", Tcp, true), (db, "10.244.0.4:80", Tcp, true)],
        ),
        (
            "every namespace, and those without a label",
            &[json!({ "podSelector": { "matchLabels": { "app": "web" } }, "ingress": [{ "from": [
                { "namespaceSelector": { "matchExpressions": [{ "key": "team", "operator": "DoesNotExist" }] } },
                { "namespaceSelector": {}, "podSelector": { "matchLabels": { "app": "db" } } }] }] })],
            &[
                (db, "10.244.0.2:80", Tcp, true),
                ("10.244.1.4", "10.244.0.2:80", Tcp, true),
                (two, "10.244.0.2:80", Tcp, false),
            ],
        ),
        (
            "several rules, each with ports of its own",
            &[json!({ "podSelector": { "matchLabels": { "app": "web" } }, "ingress": [
                { "from": [{ "podSelector": { "matchLabels": { "app": "db" } } }], "ports": [{ "port": 80 }] },
                { "from": [{ "namespaceSelector": { "matchLabels": { "team": "blue" } } }], "ports": [{ "port": "http" }] }] })],
            &[
                (db, "10.244.0.2:80", Tcp, true),
                (db, "10.244.0.2:8080", Tcp, false),
                (two, "10.244.0.2:8080", Tcp, true),
                (two, "10.244.0.2:80", Tcp, false),
            ],
        ),
    ];
    for (what, specs, expected) in cases {
        let mut all = world();
        for (number, spec) in specs.iter().enumerate() {
            all.set_policy(policy("one", &format!("p{number}"), spec.clone()));
        }
        flush(&mut all);
        for (from, to, protocol, want) in *expected {
            assert_eq!(passes(&all, from, to, *protocol), *want, "{what}: {from} -> {to} {protocol:?}");
        }
    }
}

#[test]
fn a_change_is_as_small_as_it_can_be() {
    let mut all = world();
    let from = json!([{ "namespaceSelector": { "matchLabels": { "team": "blue" } } }]);
    all.set_policy(policy(
        "one",
        "p",
        json!({ "podSelector": {}, "ingress": [{ "from": from, "ports": [{ "port": 80 }] }] }),
    ));
    flush(&mut all);
    // One more client, on another node: one element per pod of ours and family.
    all.set_pod(pod("two/new", "other", "10.244.1.9", &[], &[]));
    let delta = flush(&mut all);
    assert_eq!((delta.removed.len(), delta.added.len()), (0, 2));
    assert!(delta.added.iter().all(|e| e.map == Map::IngressPeerPort));
    // A pod nobody speaks of: none.
    all.set_pod(pod("one/quiet", "other", "10.244.1.10", &[("app", "quiet")], &[]));
    assert!(flush(&mut all).is_empty());
    // Its namespace changes sides.
    all.set_namespace("two".into(), labels(&[("team", "green")]));
    let delta = flush(&mut all);
    assert_eq!((delta.removed.len(), delta.added.len()), (2 * 5, 0));
}

#[test]
fn a_pod_that_takes_over_an_address_is_guarded_too() {
    let mut all = world();
    all.set_policy(policy("one", "deny", json!({ "podSelector": {} })));
    flush(&mut all);
    // The new one is told of before the old one's end.
    all.set_pod(pod("one/next", "me", "10.244.0.2", &[], &[]));
    flush(&mut all);
    all.remove_pod(&Name::new("one", "web"));
    flush(&mut all);
    assert!(!passes(&all, "10.244.0.4", "10.244.0.2:80", Protocol::Tcp));
    all.remove_pod(&Name::new("one", "next"));
    flush(&mut all);
    assert!(passes(&all, "10.244.0.4", "10.244.0.2:80", Protocol::Tcp));
}

/// Random pods, policies and namespaces.
#[derive(Clone, Debug)]
enum Change {
    Pod(u8, u16),
    NoPod(u8),
    Policy(u8, u32),
    NoPolicy(u8),
    Namespace(u8, u8),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0..24u8, any::<u16>()).prop_map(|(n, s)| Change::Pod(n, s)),
        1 => (0..24u8).prop_map(Change::NoPod),
        3 => (0..6u8, any::<u32>()).prop_map(|(n, s)| Change::Policy(n, s)),
        1 => (0..6u8).prop_map(Change::NoPolicy),
        1 => (0..3u8, 0..3u8).prop_map(|(n, t)| Change::Namespace(n, t)),
    ]
}

fn random_rule(bits: u32) -> Json {
    let app = json!({ "matchLabels": { "app": format!("a{}", bits >> 3 & 3) } });
    let team = json!({ "matchLabels": { "team": format!("t{}", bits >> 5 & 1) } });
    let peers = match bits & 7 {
        0 => json!([]),
        1 => json!([{ "podSelector": app }]),
        2 => json!([{ "namespaceSelector": team }]),
        3 => json!([{ "namespaceSelector": team, "podSelector": app }]),
        4 => json!([{ "ipBlock": { "cidr": "10.244.0.0/16", "except": ["10.244.0.0/29", "10.244.1.0/28"] } }]),
        5 => json!([{ "ipBlock": { "cidr": "10.244.0.0/20" } }, { "podSelector": app }]),
        6 => json!([{ "ipBlock": { "cidr": "2001:db8::/32", "except": ["2001:db8:1::/48"] } }]),
        _ => json!([{ "podSelector": {} }, { "namespaceSelector": team }]),
    };
    let ports = match bits >> 6 & 7 {
        0 => json!([]),
        1 => json!([{ "port": 80 }]),
        2 => json!([{ "port": 80, "endPort": 90 }]),
        3 => json!([{ "port": 85, "endPort": 100 }, { "protocol": "UDP", "port": 80 }]),
        4 => json!([{ "port": "http" }]),
        5 => json!([{ "protocol": "UDP" }]),
        6 => json!([{ "protocol": "SCTP", "port": 80 }, { "port": "http" }, { "port": 90, "endPort": 91 }]),
        _ => json!([{ "port": 1, "endPort": 65535 }]),
    };
    json!({ "from": peers.clone(), "to": peers, "ports": ports })
}

fn take(all: &mut Policies, change: &Change) {
    let pod_name = |n: &u8| format!("n{}/p{n}", n % 3);
    match change {
        Change::Pod(n, bits) => {
            // Few addresses on our node: pods come and go with the same ones.
            let node = if n % 2 == 0 { "me" } else { "other" };
            let address = if n % 2 == 0 {
                format!("10.244.0.{},2001:db8:1::{}", bits % 8 + 2, bits % 8 + 2)
            } else {
                format!("10.244.1.{}", n + 2)
            };
            let (app, port) = (format!("a{}", bits >> 4 & 3), 80 + (bits >> 6 & 3));
            all.set_pod(pod(&pod_name(n), node, &address, &[("app", &app)], &[("http", port)]));
        }
        Change::NoPod(n) => {
            let name = pod_name(n);
            let (namespace, name) = name.split_once('/').unwrap();
            all.remove_pod(&Name::new(namespace, name));
        }
        Change::Policy(n, bits) => {
            let rules = vec![random_rule(*bits >> 4), random_rule(*bits >> 14)];
            let pods = if bits & 1 == 0 { json!({}) } else { json!({ "matchLabels": { "app": "a1" } }) };
            let types = [json!(["Ingress"]), json!(["Egress"]), json!(["Ingress", "Egress"])];
            let spec = json!({ "podSelector": pods, "policyTypes": types[(*bits >> 1) as usize % 3],
                "ingress": rules, "egress": rules });
            all.set_policy(policy(&format!("n{}", n % 3), &format!("p{n}"), spec));
        }
        Change::NoPolicy(n) => all.remove_policy(&Name::new(&format!("n{}", n % 3), &format!("p{n}"))),
        Change::Namespace(n, team) => {
            all.set_namespace(format!("n{n}").into(), labels(&[("team", &format!("t{team}"))]));
        }
    }
}

#[test]
fn the_kernel_follows_random_policies() {
    nft::in_own_network(|| {
        let strategy = proptest::collection::vec((change(), any::<bool>()), 1000);
        let runs = Runs { cases: 3, failure_persistence: None, ..Runs::default() };
        let outcome = proptest::test_runner::TestRunner::new(runs).run(&strategy, |changes| {
            let mut all = Policies::new("me");
            let mut kernel = Kernel::open(nft::settings(), None).unwrap();
            kernel.reconcile(&|_| {}).unwrap();
            for (number, (change, wait)) in changes.iter().enumerate() {
                take(&mut all, change);
                if *wait && number + 1 < changes.len() {
                    continue;
                }
                let delta = flush(&mut all);
                kernel.apply(&delta).unwrap_or_else(|e| panic!("change {number} {change:?}: {e:?} {delta:#?}"));
                if number % 50 == 49 {
                    same(&all, &kernel);
                }
            }
            kernel.apply(&flush(&mut all)).unwrap();
            same(&all, &kernel);
            // What grew bit by bit is what a new process would make at once.
            let mut fresh = Policies::new("me");
            changes.iter().for_each(|(change, _)| take(&mut fresh, change));
            flush(&mut fresh);
            let set = |p: &Policies| elements(p).into_iter().collect::<HashSet<_>>();
            prop_assert_eq!(set(&all), set(&fresh));
            Ok(())
        });
        outcome.unwrap();
    });
}

#[track_caller]
fn same(all: &Policies, kernel: &Kernel) {
    crate::nft::tests::kernel_has(kernel, &|emit| all.elements(emit));
}

#[test]
fn what_cannot_be_read_lets_nothing_through() {
    let mut all = world();
    all.set_policy(policy(
        "one",
        "p",
        json!({ "podSelector": {}, "ingress": [
        { "from": [{ "ipBlock": { "cidr": "nonsense" } }] }, { "ports": [{ "port": 90, "endPort": 80 }] }] }),
    ));
    flush(&mut all);
    assert!(!passes(&all, "192.0.2.9", "10.244.0.2:85", Protocol::Tcp));
    assert!(passes(&all, "10.244.0.2", "10.244.0.2:85", Protocol::Tcp), "itself");
}
