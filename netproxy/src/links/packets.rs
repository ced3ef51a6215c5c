//! Two nodes with a router between them, in network namespaces of the test's own: their pods reach each other.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use super::*;
use crate::{
    hosts::{at, leave, run, trust_addresses},
    watch::NodeInfo,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// `near` and `far` behind the router, which is the caller; a bridge address on each stands for its pods.
fn build() {
    leave();
    trust_addresses("node");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    for (name, n) in [("near", 1), ("far", 2)] {
        run(&format!("ip netns add {name}"));
        trust_addresses(name);
        run(&format!("ip link add v{name} type veth peer name eth0 netns {name}"));
        run(&format!("ip addr add 192.0.{n}.254/24 dev v{name}"));
        run(&format!("ip link set v{name} up"));
        run(&format!("ip -n {name} addr add 192.0.{n}.1/24 dev eth0"));
        run(&format!("ip -n {name} link set eth0 mtu 1420 up"));
        run(&format!("ip -n {name} link set lo up"));
        run(&format!("ip -n {name} route add default via 192.0.{n}.254"));
        run(&format!("ip -n {name} link add isopod0 type bridge"));
        run(&format!("ip -n {name} addr add 10.244.{n}.1/24 dev isopod0"));
        run(&format!("ip -n {name} link set isopod0 up"));
        run(&format!("ip addr add 2001:db8:{n}::fe/64 dev v{name} nodad"));
        run(&format!("ip -n {name} addr add 2001:db8:{n}::1/64 dev eth0 nodad"));
        run(&format!("ip -n {name} route add default via 2001:db8:{n}::fe"));
        run(&format!("ip -n {name} addr add 2001:db8:244:{n}::1/64 dev isopod0 nodad"));
    }
}

fn addresses(n: u8) -> Vec<IpAddr> {
    vec![IpAddr::from([192, 0, n, 1]), format!("2001:db8:{n}::1").parse().unwrap()]
}

fn nodes() -> Nodes {
    let node = |n: u8| NodeInfo {
        pod_cidrs: vec![format!("10.244.{n}.0/24").parse().unwrap(), format!("2001:db8:244:{n}::/64").parse().unwrap()],
        addresses: addresses(n),
        ..NodeInfo::default()
    };
    Nodes::from([("near".to_owned(), node(1)), ("far".to_owned(), node(2))])
}

fn cluster() -> Vec<IpNet> {
    vec!["10.244.0.0/16".parse().unwrap(), "2001:db8:244::/48".parse().unwrap()]
}

/// Does something with the kernel of a node.
fn with<T: Send>(name: &str, body: impl AsyncFnOnce(Handle) -> T + Send) -> T {
    at(name, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { body(open().unwrap()).await })
    })
}

/// Applies a table of nodes on one of them, which encrypts if it has a key file.
fn try_follow(name: &str, nodes: &Nodes, key: Option<&str>) -> Result<Option<wireguard::Key>, Error> {
    let own = Own {
        name: name.into(),
        addresses: nodes[name].addresses.clone(),
        cluster: cluster(),
        bridge: "isopod0".into(),
        wireguard: key.map(Into::into),
    };
    with(name, async |handle| apply(&handle, &own, nodes).await)
}

fn follow(name: &str, nodes: &Nodes) {
    assert_eq!(try_follow(name, nodes, None).unwrap(), None);
}

/// `near` gets more than a packet from `far` in both families, each as a pod of its node.
fn pods_reach_each_other() {
    for (near, far) in [("10.244.1.1", "10.244.2.1"), ("2001:db8:244:1::1", "2001:db8:244:2::1")] {
        let far: IpAddr = far.parse().unwrap();
        let server = at("far", || TcpListener::bind((far, 80)).unwrap());
        let answers = std::thread::spawn(move || {
            let (mut stream, from) = server.accept().unwrap();
            stream.write_all(&vec![b'x'; 100_000]).unwrap();
            from.ip()
        });
        let got = at("near", || {
            let mut stream = TcpStream::connect_timeout(&(far, 80).into(), PATIENCE).unwrap();
            let mut text = Vec::new();
            stream.read_to_end(&mut text).unwrap();
            text.len()
        });
        assert_eq!(got, 100_000);
        assert_eq!(answers.join().unwrap(), near.parse::<IpAddr>().unwrap(), "pods see the pods' side of a node");
    }
}

#[test]
fn nodes_without_a_common_link_reach_each_others_pods() {
    let test = || {
        build();
        let all = nodes();
        ["near", "far"].iter().for_each(|name| follow(name, &all));
        pods_reach_each_other();
        for (link, mtu) in [("isopod0x", "mtu 1370"), ("isopod0y", "mtu 1350")] {
            let shown = run(&format!("ip -n near link show dev {link}"));
            assert!(shown.contains(mtu), "{shown}");
        }
        // Again: nothing changes. Then the other node leaves, and with it all that was for it.
        let before = run("ip -n near route");
        follow("near", &all);
        assert_eq!(run("ip -n near route"), before);
        assert!(before.contains("10.244.2.0/24 via 10.244.2.1 dev isopod0x"), "{before}");
        let six = run("ip -n near -6 route");
        assert!(six.contains("2001:db8:244:2::/64 via 2001:db8:244:2::1 dev isopod0y"), "{six}");
        let alone: Nodes = all.into_iter().filter(|(name, _)| name == "near").collect();
        follow("near", &alone);
        assert!(!run("ip -n near route").contains("10.244.2"));
        assert!(!run("ip -n near -6 route").contains("244:2"));
        let links = run("ip -n near -o link");
        assert!(!links.contains("isopod0x") && !links.contains("isopod0y"), "{links}");
    };
    std::thread::spawn(test).join().unwrap();
}

/// Packets the router has seen: those of WireGuard, and all others but its own and neighbours' talk.
fn seen() -> (u64, u64) {
    let shown = run("nft list table inet wire");
    let count = |name: &str| -> u64 {
        let text = shown.split(&format!("counter {name} {{")).nth(1).unwrap();
        text.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (count("hidden"), count("open"))
}

/// What a node does that is to encrypt and cannot: it says why, and nothing goes in the clear.
fn without_wireguard(all: &Nodes, key: &str) {
    follow("near", all);
    let error = try_follow("near", all, Some(key)).unwrap_err().to_string();
    assert!(error.contains("no WireGuard") && error.contains("CONFIG_WIREGUARD"), "{error}");
    for command in ["ip -n near route", "ip -n near -6 route"] {
        let routes = run(command);
        assert!(
            routes.contains("unreachable 10.244.0.0/16") || routes.contains("unreachable 2001:db8:244::/48"),
            "{routes}"
        );
        assert!(!routes.contains("10.244.2") && !routes.contains("244:2"), "{routes}");
    }
    at("near", || TcpStream::connect_timeout(&"10.244.2.1:80".parse().unwrap(), PATIENCE).unwrap_err());
    // Encryption is not wanted any more.
    follow("near", all);
    let routes = run("ip -n near route");
    assert!(routes.contains("10.244.2.0/24 via") && !routes.contains("unreachable"), "{routes}");
}

/// With WireGuard in the kernel all packets between pods are in it; without, the node says so. `ISOPOD_TEST_WIREGUARD` is
/// set where the first has to be tested.
#[test]
fn chosen_encryption_hides_all_between_nodes() {
    let test = || {
        build();
        let keys = tempfile::tempdir().unwrap();
        let file = |name: &str| keys.path().join(name).to_str().unwrap().to_owned();
        let mut all = nodes();
        let there =
            std::process::Command::new("ip").args(["link", "add", "probe", "type", "wireguard"]).output().unwrap();
        if !there.status.success() {
            assert!(std::env::var_os("ISOPOD_TEST_WIREGUARD").is_none(), "{there:?}");
            return without_wireguard(&all, &file("near"));
        }
        run("ip link delete probe");
        run(
            "nft add table inet wire { counter hidden {}; counter open {}; chain forward { type filter hook forward priority 0; \
             udp dport 51820 udp sport 51820 counter name hidden accept; counter name open; }; }",
        );
        // From host routes, which go. Nothing is reached before both have told their keys.
        follow("near", &all);
        for name in ["near", "far"] {
            let key = try_follow(name, &all, Some(&file(name))).unwrap();
            assert!(key.is_some());
            all.get_mut(name).unwrap().wireguard = key;
        }
        let refused =
            at("near", || TcpStream::connect_timeout(&"10.244.2.1:80".parse().unwrap(), PATIENCE).unwrap_err());
        assert_ne!(refused.kind(), std::io::ErrorKind::TimedOut, "{refused}");
        let both = |all: &Nodes| {
            for name in ["near", "far"] {
                assert_eq!(try_follow(name, all, Some(&file(name))).unwrap(), all[name].wireguard, "the key stays");
            }
        };
        both(&all);
        pods_reach_each_other();
        let (hidden, open) = seen();
        assert!(hidden > 100 && open == 0, "{hidden} packets of WireGuard, {open} others");
        let links = run("ip -n near link show dev isopod0w");
        assert!(links.contains("mtu 1340"), "1420, 80 less: {links}");
        assert!(!run("ip -n near -o link").contains("isopod0x"), "no VXLAN");
        let device = |name: &str| with(name, async |_| wireguard::Device::open("isopod0w").unwrap().get().unwrap());
        // Again: nothing changes, sessions stay.
        let before = device("near");
        both(&all);
        assert_eq!(device("near"), before);
        assert_eq!(before.1.len(), 1);
        // A node with another key (a disk of its own) is another peer, and is reached as soon as both know.
        std::fs::remove_file(file("far")).unwrap();
        let key = try_follow("far", &all, Some(&file("far"))).unwrap();
        assert_ne!(key, all["far"].wireguard);
        all.get_mut("far").unwrap().wireguard = key;
        both(&all);
        assert_eq!(device("near").1.len(), 1);
        pods_reach_each_other();
        // It gets another address.
        run("ip -n far addr del 192.0.2.1/24 dev eth0");
        run("ip -n far addr add 192.0.2.7/24 dev eth0");
        run("ip -n far route add default via 192.0.2.254");
        all.get_mut("far").unwrap().addresses[0] = [192, 0, 2, 7].into();
        both(&all);
        pods_reach_each_other();
        assert_eq!(seen().1, 0);
        // It leaves; and this node's network ends.
        let alone: Nodes = all.into_iter().filter(|(name, _)| name == "near").collect();
        try_follow("near", &alone, Some(&file("near"))).unwrap();
        assert!(device("near").1.is_empty());
        with("near", async |handle| remove_routes(&handle, &cluster(), "isopod0").await.unwrap());
        let left = run("ip -n near -o link") + &run("ip -n near route") + &run("ip -n near -6 route");
        assert!(!left.contains("isopod0w") && !left.contains("10.244.0.0/16") && !left.contains("244::/48"), "{left}");
    };
    std::thread::spawn(test).join().unwrap();
}
