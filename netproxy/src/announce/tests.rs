//! Two nodes and a client on one link, in network namespaces of the test's own: who announces is reached.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
};

use serde_json::json;

use super::*;
use crate::{
    hosts::{at, leave, run as shell, trust_addresses},
    links,
};

fn service(name: &str, node: &str, ips: &[&str]) -> Service {
    let ingress: Vec<_> = ips.iter().map(|ip| json!({ "ip": ip })).collect();
    let condition = json!({ "type": announcement::CONDITION, "status": "True", "reason": "Elected",
        "message": announcement::message(node), "lastTransitionTime": "2026-01-01T00:00:00Z" });
    let object = json!({ "metadata": { "namespace": "ns", "name": name }, "spec": { "type": "LoadBalancer" },
        "status": { "loadBalancer": { "ingress": ingress }, "conditions": [condition] } });
    serde_json::from_value(object).unwrap()
}

#[test]
fn only_services_this_node_is_chosen_for_are_announced() {
    use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
    let (mut chosen, wanted) = Chosen::new("one");
    let now = || wanted.borrow().clone().map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>());
    chosen.see(&Init);
    chosen.see(&InitApply(service("a", "one", &["192.0.2.7", "2001:db8::7"])));
    chosen.see(&InitApply(service("b", "two", &["192.0.2.8"])));
    assert_eq!(now(), None, "not before all are known");
    chosen.see(&InitDone);
    assert_eq!(now().unwrap(), ["192.0.2.7", "2001:db8::7"]);
    chosen.see(&Apply(service("b", "one", &["192.0.2.8"])));
    chosen.see(&Apply(service("a", "two", &["192.0.2.7"])));
    assert_eq!(now().unwrap(), ["192.0.2.8"]);
    chosen.see(&Delete(service("b", "one", &["192.0.2.8"])));
    assert_eq!(now().unwrap(), [""; 0]);
}

const ADDRESSES: [&str; 2] = ["192.0.2.200", "2001:db8::200"];

fn wanted() -> BTreeSet<IpAddr> {
    ADDRESSES.iter().map(|a| a.parse().unwrap()).collect()
}

/// Runs with the kernel of a node.
fn on<T: Send>(node: &str, body: impl AsyncFnOnce(Handle) -> T + Send) -> T {
    at(node, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { body(links::open().unwrap()).await })
    })
}

/// Announces what is wanted, and tells of it once.
fn announce(node: &str, wanted: &BTreeSet<IpAddr>, seconds: u64) {
    let own = [IpAddr::from([192, 0, 2, 1])];
    on(node, async |handle| {
        let until = Some(Instant::now() + Duration::from_secs(seconds));
        let mut announcer = Announcer::default();
        announcer.apply(&handle, &own, wanted, until).await.unwrap();
        tokio::task::yield_now().await;
        for address in wanted {
            frames::send(link(&present(&handle).await.unwrap(), &own, *address).unwrap(), *address).unwrap();
        }
    });
}

/// Who answers the client at each of the addresses.
fn answers(seconds: u64) -> Vec<Option<String>> {
    let ask = |address: &&str| {
        let to = SocketAddr::new(address.parse().unwrap(), 80);
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(seconds)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(seconds))).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).ok().map(|_| text)
    };
    at("client", || ADDRESSES.iter().map(ask).collect())
}

#[test]
fn the_node_that_announces_is_reached_until_its_lease_ends() {
    let test = || {
        leave();
        shell("ip link add br0 type bridge");
        shell("ip link set br0 up");
        for (name, n) in [("one", 1), ("two", 2), ("client", 3)] {
            shell(&format!("ip netns add {name}"));
            trust_addresses(name);
            shell(&format!("ip link add v{name} type veth peer name eth0 netns {name}"));
            shell(&format!("ip link set v{name} master br0 up"));
            shell(&format!("ip -n {name} link set lo up"));
            shell(&format!("ip -n {name} link set eth0 up"));
            shell(&format!("ip -n {name} addr add 192.0.2.{n}/24 dev eth0"));
            shell(&format!("ip -n {name} addr add 2001:db8::{n}/64 dev eth0 nodad"));
        }
        for name in ["one", "two"] {
            // Of both families.
            let listener = at(name, || TcpListener::bind("[::]:80").unwrap());
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let _ = stream.write_all(name.as_bytes());
                }
            });
        }
        let all = |name: &str| vec![Some(name.to_owned()); 2];
        announce("one", &wanted(), 600);
        assert_eq!(answers(5), all("one"));
        // It dies, and the other takes over: at once, though the client still knows the first one's hardware address.
        shell("ip link set vone down");
        announce("two", &wanted(), 600);
        assert_eq!(answers(5), all("two"));
        // Another process takes the addresses back, and leaves everything else.
        shell("ip link set vone up");
        announce("two", &BTreeSet::new(), 600);
        announce("one", &wanted(), 600);
        assert_eq!(answers(5), all("one"));
        let shown = shell("ip -n two -o addr show dev eth0");
        assert!(!shown.contains(".200") && shown.contains("192.0.2.2/24"), "{shown}");
        // Nobody renews the lease any more.
        announce("one", &wanted(), 2);
        let started = Instant::now();
        while shell("ip -n one -o addr show dev eth0").contains("200/") {
            assert!(started.elapsed() < Duration::from_secs(20), "the addresses stay");
            std::thread::sleep(Duration::from_millis(100));
        }
        announce("one", &wanted(), 600);
        on("one", async |handle| cleanup(&handle).await.unwrap());
        let shown = shell("ip -n one -o addr show dev eth0");
        assert!(!shown.contains("200/") && shown.contains("192.0.2.1/24"), "{shown}");
    };
    std::thread::spawn(test).join().unwrap();
}
