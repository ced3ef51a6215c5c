//! Two nodes with a router between them, in network namespaces of the test's own: their pods reach each other.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use super::*;
use crate::{
    hosts::{at, leave, run},
    watch::NodeInfo,
};

/// `near` and `far` behind the router, which is the caller; a bridge address on each stands for its pods.
fn build() {
    leave();
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    for (name, n) in [("near", 1), ("far", 2)] {
        run(&format!("ip netns add {name}"));
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

/// Applies a table of nodes on one of them.
fn follow(name: &str, nodes: &Nodes) {
    let n = if name == "near" { 1 } else { 2 };
    let own = Own {
        name: name.into(),
        addresses: addresses(n),
        cluster: vec!["10.244.0.0/16".parse().unwrap(), "2001:db8:244::/48".parse().unwrap()],
        bridge: "isopod0".into(),
    };
    at(name, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { apply(&open().unwrap(), &own, nodes).await.unwrap() });
    });
}

#[test]
fn nodes_without_a_common_link_reach_each_others_pods() {
    let test = || {
        build();
        let all = nodes();
        ["near", "far"].iter().for_each(|name| follow(name, &all));
        for (near, far) in [("10.244.1.1", "10.244.2.1"), ("2001:db8:244:1::1", "2001:db8:244:2::1")] {
            let far: IpAddr = far.parse().unwrap();
            let server = at("far", || TcpListener::bind((far, 80)).unwrap());
            let answers = std::thread::spawn(move || {
                let (mut stream, from) = server.accept().unwrap();
                // More than a packet, in both directions of the way.
                stream.write_all(&vec![b'x'; 100_000]).unwrap();
                from.ip()
            });
            let got = at("near", || {
                let mut stream = TcpStream::connect_timeout(&(far, 80).into(), Duration::from_secs(3)).unwrap();
                let mut text = Vec::new();
                stream.read_to_end(&mut text).unwrap();
                text.len()
            });
            assert_eq!(got, 100_000);
            assert_eq!(answers.join().unwrap(), near.parse::<IpAddr>().unwrap(), "pods see the pods' side of a node");
        }
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
