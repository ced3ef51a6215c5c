//! The skeleton's text, and the kernel's tables against the model's, in network namespaces of the tests' own.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use parking_lot::RwLock;
use proptest::{prelude::*, test_runner::Config as Runs};

use super::{
    element::{Chain, Element, ElementKey, Family, Map, Value},
    kernel::{Error, Kernel, Wanted},
    skeleton::{self, Chains, Settings},
    verify::Difference,
};
use crate::{
    dns::zone::Zone,
    metrics::Metrics,
    model::{
        objects::{Place, Policy, Protocol, Service, ServiceName, Slice},
        plan::LOCAL_BASE,
        shadow::Shadow,
        tests::{service, slice},
    },
    monitor::Heard,
    sync::{Input, Report, Sync},
};

pub(crate) fn settings() -> Settings {
    Settings {
        table: "isopod-test".into(),
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "2001:db8:1::/48".parse().unwrap()],
        pod_links: None,
        masquerade_bit: 14,
        masquerade_all: false,
        dns: vec!["10.96.0.10".parse().unwrap()],
        node_port_addresses: Vec::new(),
        localhost_node_ports: true,
    }
}

/// Runs a closure on a thread in a network namespace of its own, with nothing but a loopback link.
pub(crate) fn in_own_network<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("tests of the data plane need root");
        body()
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[test]
fn golden_skeleton() {
    let chains = Chains { picks: 2, timeouts: vec![60, 10_800] };
    let both = [
        (Family::V4, include_str!("../../testdata/skeleton-ip.nft")),
        (Family::V6, include_str!("../../testdata/skeleton-ip6.nft")),
    ]
    .map(|(family, golden)| (family, golden, skeleton::render(family, &settings(), &chains, &[])));
    if let Ok(dir) = std::env::var("WRITE_GOLDEN") {
        for (family, _, text) in &both {
            std::fs::write(format!("{dir}/skeleton-{}.nft", family.nft()), text).unwrap();
        }
    }
    for (family, golden, text) in both {
        assert!(text == golden, "{family:?}: the text differs; WRITE_GOLDEN=testdata writes it anew:\n{text}");
    }
}

fn wanted(shadow: &Shadow) -> impl Fn(&mut dyn FnMut(Element)) {
    |emit| shadow.elements(emit)
}

fn by_id(elements: impl Fn(&mut dyn FnMut(Element))) -> HashMap<ElementKey, Element> {
    let mut all = HashMap::new();
    elements(&mut |e| {
        all.insert(e.id(), e);
    });
    all
}

/// The kernel has what is wanted, and what leads from numbers to chains, and nothing else.
#[track_caller]
pub(crate) fn kernel_has(kernel: &Kernel, wanted: &Wanted<'_>) {
    let want = by_id(|emit| kernel.with_entries(wanted, emit));
    let have = kernel.dump().unwrap();
    let missing: Vec<_> = want.values().filter(|e| have.get(&e.id()) != Some(e)).collect();
    let extra: Vec<_> = have.values().filter(|e| !want.contains_key(&e.id())).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing {missing:#?}\nextra {extra:#?}");
}

#[track_caller]
fn same(shadow: &Shadow, kernel: &Kernel) {
    kernel_has(kernel, &wanted(shadow));
}

/// A change out of few names and addresses, so that services collide, shrink and change kind often.
#[derive(Clone, Debug)]
enum Change {
    Service { number: u8, shape: u16 },
    Slice { number: u8, half: bool, members: u16, ready: u16 },
    NoService(u8),
    NoSlice(u8, bool),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (0..6u8, any::<u16>()).prop_map(|(number, shape)| Change::Service { number, shape }),
        6 => (0..6u8, any::<bool>(), any::<u16>(), any::<u16>())
            .prop_map(|(number, half, members, ready)| Change::Slice { number, half, members, ready }),
        1 => (0..6u8).prop_map(Change::NoService),
        1 => (0..6u8, any::<bool>()).prop_map(|(n, h)| Change::NoSlice(n, h)),
    ]
}

fn make_service(number: u8, shape: u16) -> Service {
    let bit = |n: u16| shape & 1 << n != 0;
    let ip = format!("10.96.1.{number}");
    let ip6 = format!("2001:db8:96::{number}");
    let ips: Vec<&str> = if bit(0) { vec![&ip, &ip6] } else { vec![&ip] };
    let mut ports = vec![("a", 80, if bit(1) { 30_000 + shape % 3 } else { 0 })];
    if bit(2) {
        ports.push(("b", 81, 0));
    }
    let mut made = service("ns", &format!("s{number}"), &ips, &ports);
    if bit(3) {
        // Shared by all: only one can have it.
        made.external_ips = ["192.0.2.1".parse().unwrap()].into();
    }
    if bit(4) {
        made.balancer_ips = [format!("192.0.2.{}", 10 + number).parse().unwrap()].into();
        made.source_ranges = if bit(5) {
            ["10.0.0.0/8".parse().unwrap(), "10.1.0.0/16".parse().unwrap(), "192.0.2.128/25".parse().unwrap()].into()
        } else {
            [].into()
        };
    }
    made.affinity = bit(6).then_some(if bit(7) { 60 } else { 10_800 });
    made.external_policy = if bit(8) { Policy::Local } else { Policy::Cluster };
    made.internal_policy = if bit(9) { Policy::Local } else { Policy::Cluster };
    made.ours = !(bit(10) && bit(11) && bit(12));
    if bit(13) {
        made.ports[0].protocol = Protocol::Udp;
    }
    made
}

fn make_slice(number: u8, half: bool, members: u16, ready: u16) -> Slice {
    let name = ServiceName::new("ns", &format!("s{number}"));
    let base = if half { 100 } else { 0 };
    let list: Vec<(String, &str)> = (0..16)
        .filter(|n| members & 1 << n != 0)
        .map(|n| (format!("10.244.0.{}", base + n), if n % 4 == 0 { "me" } else { "other" }))
        .collect();
    let pairs: Vec<(&str, &str)> = list.iter().map(|(a, n)| (a.as_str(), *n)).collect();
    let mut made = slice(&name, "a", 8080, &pairs);
    made.endpoints.edit(|n, endpoint| {
        if ready & 1 << n != 0 {
            endpoint.ready = false;
            endpoint.terminating = n % 2 == 0;
        }
    });
    made.name = if half { "upper" } else { "lower" }.into();
    if number.is_multiple_of(2) {
        made.ports[0].protocol = if members.is_multiple_of(2) { Protocol::Udp } else { Protocol::Tcp };
    }
    made
}

fn take(shadow: &mut Shadow, change: &Change) {
    let name = |number: &u8| ServiceName::new("ns", &format!("s{number}"));
    match change {
        Change::Service { number, shape } => shadow.set_service(make_service(*number, *shape)),
        Change::Slice { number, half, members, ready } => {
            shadow.set_slice(make_slice(*number, *half, *members, *ready));
        }
        Change::NoService(number) => shadow.remove_service(&name(number)),
        Change::NoSlice(number, half) => shadow.remove_slice(&name(number), if *half { "upper" } else { "lower" }),
    }
}

fn here() -> Place {
    Place { node: "me".into(), zone: None }
}

#[test]
fn kernel_follows_the_model() {
    in_own_network(|| {
        let strategy = proptest::collection::vec((change(), 0..4u8), 1000);
        let mut runner =
            proptest::test_runner::TestRunner::new(Runs { cases: 3, failure_persistence: None, ..Runs::default() });
        let outcome = runner.run(&strategy, |changes| {
            let mut shadow = Shadow::new(here());
            let mut kernel = Kernel::open(settings(), None).unwrap();
            kernel.reconcile(&|_| {}).unwrap();
            for (number, (change, more)) in changes.iter().enumerate() {
                take(&mut shadow, change);
                if *more > 0 {
                    let delta = shadow.flush();
                    kernel.apply(&delta).unwrap_or_else(|e| panic!("change {number} {change:?}: {e:?} {delta:#?}"));
                }
                if number % 100 == 99 {
                    kernel.apply(&shadow.flush()).unwrap();
                    same(&shadow, &kernel);
                }
            }
            kernel.apply(&shadow.flush()).unwrap();
            same(&shadow, &kernel);
            // A new process finds everything as it should be.
            let found = Kernel::open(settings(), None).unwrap().reconcile(&wanted(&shadow)).unwrap();
            prop_assert_eq!(found, Difference { removed: 0, added: 0 });
            Ok(())
        });
        outcome.unwrap();
    });
}

#[test]
fn what_a_new_process_finds_is_corrected() {
    in_own_network(|| {
        let mut shadow = Shadow::new(here());
        for number in 0..6 {
            shadow.set_service(make_service(number, 0x3ff));
            shadow.set_slice(make_slice(number, false, 0xffff, 0));
        }
        shadow.flush();
        let mut first = Kernel::open(settings(), None).unwrap();
        first.reconcile(&wanted(&shadow)).unwrap();
        same(&shadow, &first);
        shadow.remove_service(&ServiceName::new("ns", "s1"));
        shadow.set_slice(make_slice(0, false, 0x00ff, 0));
        shadow.flush();
        let mut second = Kernel::open(settings(), None).unwrap();
        let difference = second.reconcile(&wanted(&shadow)).unwrap();
        assert!(difference.removed > 0);
        same(&shadow, &second);
        second.destroy().unwrap();
        assert!(second.dump().unwrap().is_empty());
        second.destroy().unwrap();
    });
}

#[test]
fn a_table_of_another_shape_is_replaced_with_its_elements() {
    in_own_network(|| {
        let old = "table ip isopod-test { map services { type ipv4_addr : verdict; }; chain pick_1 { }; }";
        let mut child = std::process::Command::new("nft").arg(old).spawn().unwrap();
        assert!(child.wait().unwrap().success());
        let mut shadow = Shadow::new(here());
        for number in 0..6 {
            shadow.set_service(make_service(number, 0x3f9 | u16::from(number) << 1));
            shadow.set_slice(make_slice(number, false, 0xffff, 0));
        }
        shadow.flush();
        let mut kernel = Kernel::open(settings(), None).unwrap();
        let difference = kernel.reconcile(&wanted(&shadow)).unwrap();
        assert_eq!(difference, Difference { removed: 0, added: 0 }, "elements come with the table");
        same(&shadow, &kernel);
    });
}

#[test]
fn edits_by_others_are_repaired() {
    in_own_network(|| {
        let mut shadow = Shadow::new(here());
        shadow.set_service(make_service(1, 0x1ff));
        shadow.set_slice(make_slice(1, false, 0xffff, 0));
        shadow.flush();
        let all = wanted(&shadow);
        let mut kernel = Kernel::open(settings(), None).unwrap();
        kernel.reconcile(&all).unwrap();
        for edit in [
            "flush map ip isopod-test endpoints",
            "flush chain ip isopod-test nat",
            "flush ruleset",
            "add element ip isopod-test services { 1.2.3.4 . tcp . 5 : 0x01000001 }",
            "flush map ip isopod-test nat_chains",
            "flush chain ip isopod-test to_service",
            "delete element ip isopod-test services { 10.96.1.1 . tcp . 80 }",
        ] {
            let status = std::process::Command::new("nft").arg(edit).status().unwrap();
            assert!(status.success(), "{edit}");
            kernel.verify(&Heard::everything(), &all).unwrap();
            same(&shadow, &kernel);
            // nft reads back what it did not write.
            let rules =
                std::process::Command::new("nft").args(["list", "table", "ip", "isopod-test"]).output().unwrap();
            let key = "ip daddr . meta l4proto . th dport";
            let find = format!("meta mark set {key} map @services meta mark set meta mark meta mark vmap @nat_chains");
            for line in ["jump to_service", &find] {
                assert!(String::from_utf8_lossy(&rules.stdout).contains(line), "{edit}: {line}: {rules:?}");
            }
        }
        assert_eq!(kernel.verify(&Heard::everything(), &all).unwrap(), Difference { removed: 0, added: 0 });
    });
}

/// Twenty services by their cluster addresses, node ports and an external address, with so many endpoints that chains of
/// all sizes are left and gone to; some have endpoints of this node only.
fn cut_model(shadow: &mut Shadow, second: bool) {
    for n in 0..20u8 {
        let (ip, six) = (format!("10.96.1.{n}"), format!("2001:db8:96::{n:x}"));
        let mut made = service("ns", &format!("s{n}"), &[&ip, &six], &[("a", 80, 30_000 + u16::from(n))]);
        made.external_ips = [format!("192.0.2.{n}").parse().unwrap()].into();
        (made.internal_policy, made.external_policy) = match n % 3 {
            0 => (Policy::Local, Policy::Cluster),
            1 => (Policy::Cluster, Policy::Local),
            _ => (Policy::Cluster, Policy::Cluster),
        };
        let (first, count) = if second { (3, n * 5 % 11 + 1) } else { (0, n * 7 % 13 + 1) };
        let members: Vec<String> = (first..first + count).map(|e| format!("10.244.{n}.{e}")).collect();
        let pairs: Vec<(&str, &str)> = members.iter().map(|a| (a.as_str(), "me")).collect();
        shadow.set_slice(slice(&made.name, "a", 8080, &pairs));
        shadow.set_service(made);
    }
}

/// Every frontend in the kernel leads to as many endpoints as its chain picks from, all of its own service. Returns how
/// many there are.
#[track_caller]
fn whole(kernel: &Kernel) -> usize {
    let all = kernel.dump().unwrap();
    let maps = [
        (Map::Services, Map::Endpoints),
        (Map::ExternalCluster, Map::Endpoints),
        (Map::ExternalLocal, Map::Endpoints),
        (Map::NodePorts, Map::NodePortEndpoints),
        (Map::NodePortCluster, Map::NodePortEndpoints),
        (Map::NodePortLocal, Map::NodePortEndpoints),
    ];
    let mut seen = 0;
    for element in all.values().filter(|e| maps.iter().any(|(map, _)| *map == e.map)) {
        let Value::Goto(chain) = element.value else { panic!("{element:?}") };
        let endpoints = maps.iter().find(|(map, _)| *map == element.map).unwrap().1;
        let (base, count) = match chain {
            Chain::Pick(n) | Chain::MasqueradePick(n) | Chain::NodePortPick(n) => (0, n),
            Chain::LocalPick(n) | Chain::NodePortLocalPick(n) => (LOCAL_BASE, n),
            _ => continue,
        };
        // The number of the service: the last byte of its address, or of its port.
        let bytes = element.key.bytes();
        let own = match (bytes.len(), element.family) {
            (8, _) => (u16::from_be_bytes([bytes[4], bytes[5]]) - 30_000) as u8,
            (_, Family::V4) => bytes[3],
            (_, Family::V6) => bytes[15],
        };
        for index in base..base + count {
            let id = (element.family, endpoints, element.key.index(index), None);
            let Some(Element { value: Value::Backend(to), .. }) = all.get(&id) else {
                panic!("{element:?} has no endpoint {index}")
            };
            assert_eq!(to.bytes()[2], own, "{element:?} leads to another service's {to:?}");
        }
        seen += 1;
    }
    seen
}

/// Wherever a process is killed between two transactions, what leads anywhere leads to whole services, and nothing that was
/// there has gone.
#[test]
fn a_change_that_is_cut_off_leaves_services_whole() {
    type Way = fn(&mut Kernel, &mut Shadow) -> Result<(), Error>;
    let again: Way = |kernel, shadow| {
        shadow.catch_up();
        kernel.reconcile(&wanted(shadow)).map(drop)
    };
    let ways: [(&str, bool, Way); 3] = [
        ("a first load", false, again),
        ("a change", true, |kernel, shadow| kernel.apply(&shadow.flush())),
        ("a new process", true, again),
    ];
    for (what, loaded, way) in ways {
        in_own_network(move || {
            let mut shadow = Shadow::new(here());
            let mut kernel = Kernel::open(settings(), None).unwrap();
            if loaded {
                cut_model(&mut shadow, false);
                again(&mut kernel, &mut shadow).unwrap();
            }
            let (before, cuts) = (whole(&kernel), Arc::new(AtomicUsize::new(0)));
            let count = cuts.clone();
            // Some four elements at a time.
            kernel.transaction_max = 200;
            kernel.after = Some(Box::new(move |kernel| {
                let now = whole(kernel);
                let cut = count.fetch_add(1, Ordering::SeqCst);
                assert!(now >= before, "{what}, after transaction {cut}: {before} -> {now}");
            }));
            cut_model(&mut shadow, true);
            way(&mut kernel, &mut shadow).unwrap();
            kernel.after = None;
            same(&shadow, &kernel);
            let cuts = cuts.load(Ordering::SeqCst);
            assert!(cuts > 80, "{what}: only {cuts} places to cut");
        });
    }
}

/// What others did not touch is not read.
#[test]
fn only_what_was_touched_is_compared() {
    in_own_network(|| {
        let mut shadow = Shadow::new(here());
        cut_model(&mut shadow, false);
        shadow.catch_up();
        let all = wanted(&shadow);
        let mut kernel = Kernel::open(settings(), None).unwrap();
        kernel.reconcile(&all).unwrap();
        let nft = |edit: &str| assert!(std::process::Command::new("nft").arg(edit).status().unwrap().success());
        nft("flush map ip isopod-test services");
        nft("delete element ip isopod-test cluster_ips { 10.96.1.1 }");
        assert_eq!(kernel.verify(&Heard::of(&[Map::Endpoints]), &all).unwrap(), Difference { removed: 0, added: 0 });
        assert_eq!(kernel.verify(&Heard::of(&[Map::Services]), &all).unwrap(), Difference { removed: 0, added: 40 });
        // As many elements as there should be, but not the same.
        nft("add element ip isopod-test cluster_ips { 10.96.9.9 }");
        assert_eq!(kernel.verify(&Heard::of(&[Map::ClusterIps]), &all).unwrap(), Difference { removed: 1, added: 1 });
        // Rules are loaded again beside elements that are as they were.
        nft("flush table ip isopod-test");
        assert_eq!(kernel.verify(&Heard::of(&[]), &all).unwrap(), Difference { removed: 0, added: 0 });
        same(&shadow, &kernel);
    });
}

/// nft reads back the rules it cannot write, as what they do.
#[test]
fn raw_rules_read_back() {
    in_own_network(|| {
        Kernel::open(settings(), None).unwrap().reconcile(&|_| {}).unwrap();
        for family in Family::ALL {
            let ip = family.nft();
            let list = ["list", "table", ip, "isopod-test"];
            let output = std::process::Command::new("nft").args(list).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let port = "meta l4proto . th dport";
            let (daddr, original) = (format!("{ip} daddr . "), format!("ct original {ip} daddr . "));
            let then = "meta mark set meta mark meta mark vmap";
            for (chain, address, port, map, chains) in [
                ("to_service", &*daddr, port, "services", "nat_chains"),
                ("to_nodeport", "", port, "nodeports", "nat_chains"),
                ("to_ext_cluster", &daddr, port, "ext_cluster", "pick_chains"),
                ("to_ext_local", &daddr, port, "ext_local", "pick_chains"),
                ("to_np_cluster", "", port, "np_cluster", "pick_chains"),
                ("to_np_local", "", port, "np_local", "pick_chains"),
                ("refuse_service", &daddr, port, "unavailable", "filter_chains"),
                ("refuse_nodeport", "", port, "np_unavailable", "filter_chains"),
                ("remember_service", &original, "meta l4proto . ct original proto-dst", "affine", "filter_chains"),
                ("remember_nodeport", "", "meta l4proto . ct original proto-dst", "np_affine", "filter_chains"),
            ] {
                let rule = format!("meta mark set {address}{port} map @{map} {then} @{chains}");
                assert!(text.contains(&format!("\tchain {chain} {{\n\t\t{rule}\n\t}}\n")), "{chain}: {text}");
            }
            let client = format!("ct original {ip} saddr . ct original {ip} daddr");
            let key = format!("{client} . meta l4proto . ct original proto-dst timeout 3h : {ip} daddr . th dport");
            assert!(text.contains(&format!("update @affinity {{ {key} }}")), "{text}");
        }
    });
}

/// The sizes of the goals, with room for a slow machine and an unoptimized build.
#[test]
fn a_full_load_and_one_change_are_quick() {
    in_own_network(|| {
        let (report, _watch) = tokio::sync::watch::channel(Report::default());
        let zone = Arc::new(RwLock::new(Zone::new("cluster.local")));
        let mut sync = Sync::new(here(), (settings(), None), zone, Arc::new(Metrics::new()), report);
        let name = |n: usize| ServiceName::new("load", &format!("s{n}"));
        let endpoints = |n: usize, count: usize| {
            let list: Vec<String> =
                (0..count).map(|e| format!("10.244.{}.{}", (n * 10 + e) / 250 % 250, (n * 10 + e) % 250)).collect();
            let pairs: Vec<(&str, &str)> = list.iter().map(|a| (a.as_str(), "other")).collect();
            Box::new(slice(&name(n), "a", 80, &pairs))
        };
        sync.take(Input::ServicesBegin);
        sync.take(Input::SlicesBegin);
        for n in 0..5000 {
            let ip = format!("10.96.{}.{}", n / 250, n % 250);
            sync.take(Input::Service(Box::new(service("load", &format!("s{n}"), &[&ip], &[("a", 80, 0)]))));
            sync.take(Input::Slice(endpoints(n, 10)));
        }
        sync.take(Input::ServicesEnd);
        sync.take(Input::SlicesEnd);
        let started = Instant::now();
        sync.settle();
        let full = started.elapsed();
        let mut changes = Vec::new();
        for n in 0..100 {
            let started = Instant::now();
            sync.take(Input::Slice(endpoints(n * 37, 10 + 1 - 2 * (n % 2))));
            sync.settle();
            changes.push(started.elapsed());
        }
        changes.sort();
        println!("full sync of 5,000 x 10: {full:?}; one change: median {:?}, worst {:?}", changes[50], changes[99]);
        assert!(full.as_secs_f64() < 4.0, "full sync took {full:?}");
        assert!(changes[50].as_secs_f64() < 0.02, "one change took {:?}", changes[50]);
    });
}

#[test]
fn deltas_are_minimal() {
    let mut shadow = Shadow::new(here());
    let name = ServiceName::new("ns", "web");
    shadow.set_service(service("ns", "web", &["10.96.0.9"], &[("a", 80, 0)]));
    shadow.set_slice(slice(&name, "a", 80, &[("10.244.1.1", "x"), ("10.244.1.2", "x"), ("10.244.1.3", "x")]));
    assert_eq!(shadow.flush().added.len(), 1 + 3 + 1, "service, endpoints, cluster address");
    // The last endpoint takes the first one's place; the count changes.
    shadow.set_slice(slice(&name, "a", 80, &[("10.244.1.2", "x"), ("10.244.1.3", "x")]));
    let delta = shadow.flush();
    assert_eq!((delta.removed.len(), delta.added.len()), (3, 2));
    shadow.set_slice(slice(&name, "a", 80, &[("10.244.1.2", "x"), ("10.244.1.3", "x"), ("10.244.1.4", "x")]));
    let delta = shadow.flush();
    assert_eq!((delta.removed.len(), delta.added.len()), (1, 2));
    assert!(shadow.flush().is_empty());
    shadow.remove_service(&name);
    let delta = shadow.flush();
    assert_eq!((delta.removed.len(), delta.added.len()), (5, 0));
    let mut left = HashSet::new();
    shadow.elements(&mut |e| {
        left.insert(e);
    });
    assert!(left.is_empty());
}
