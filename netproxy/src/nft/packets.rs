//! Real packets through the real rules, and the tracer's opinion of the same packets.
//!
//! A node with pods `a` and `b` on its bridge, a pod `c` on another node, a client outside of the cluster; all of them
//! network namespaces of the test's own, with no way out.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use super::{
    element::Element,
    kernel::Kernel,
    skeleton::Settings,
    trace::{Fate, Packet, Tracer},
};
use crate::model::{
    objects::{Place, Policy, Protocol, Service, ServiceName, Slice},
    shadow::Shadow,
    tests::{service, slice},
};

const PODS: [(&str, &str); 3] = [("a", "10.244.0.2"), ("b", "10.244.0.3"), ("c", "10.244.1.2")];
const NODE: [&str; 3] = ["192.0.2.1", "10.244.0.1", "198.51.100.1"];
const CLIENT: &str = "192.0.2.2";

fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn sysctl(name: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value).unwrap();
}

/// Runs a closure in a namespace, on a thread of its own; the node is the thread's own.
fn at<T: Send>(place: &str, body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if place != "node" {
                let ns = std::fs::File::open(format!("/run/netns/{place}")).unwrap();
                nix::sched::setns(&ns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            }
            body()
        });
        thread.join().unwrap()
    })
}

/// Builds the network; afterwards the calling thread is the node.
fn build() {
    use nix::{mount::MsFlags, sched::CloneFlags};
    nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("tests of the data plane need root");
    nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    nix::mount::mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    run("ip link set lo up");
    run("ip link add br0 type bridge");
    run("ip addr add 10.244.0.1/24 dev br0");
    run("ip link set br0 up");
    run("ip route add 10.96.0.0/16 dev br0 src 10.244.0.1");
    sysctl("ip_forward", "1");
    sysctl("conf/all/route_localnet", "1");
    sysctl("conf/all/send_redirects", "0");
    // Every refusal is to be seen.
    sysctl("icmp_ratelimit", "0");
    for (name, address) in PODS {
        run(&format!("ip netns add {name}"));
        run(&format!("ip link add v{name} type veth peer name eth0 netns {name}"));
        run(&format!("ip link set v{name} up"));
        run(&format!("ip -n {name} link set lo up"));
        run(&format!("ip -n {name} link set eth0 up"));
        run(&format!("ip -n {name} addr add {address}/32 dev eth0"));
        let gateway = if name == "c" { "198.51.100.1" } else { "10.244.0.1" };
        if name == "c" {
            run("ip addr add 198.51.100.1/24 dev vc");
            run("ip -n c addr add 198.51.100.2/24 dev eth0");
            run("ip route add 10.244.1.0/24 via 198.51.100.2");
            run(&format!("ip -n c route add default via {gateway} src {address}"));
        } else {
            run(&format!("ip link set v{name} master br0"));
            // Where bridges are filtered, a pod's packet to itself never leaves the bridge.
            run(&format!("ip link set v{name} type bridge_slave hairpin on"));
            run(&format!("ip -n {name} route add {gateway} dev eth0"));
            run(&format!("ip -n {name} route add default via {gateway}"));
        }
        serve(name, address.parse().unwrap());
    }
    run("ip netns add client");
    run("ip link add vclient type veth peer name eth0 netns client");
    run("ip addr add 192.0.2.1/24 dev vclient");
    run("ip link set vclient up");
    run("ip -n client link set eth0 up");
    run("ip -n client addr add 192.0.2.2/24 dev eth0");
    run("ip -n client route add default via 192.0.2.1");
}

/// Servers that say who they are and whom they see, on TCP and UDP, until the test's process ends.
fn serve(name: &'static str, address: IpAddr) {
    let (tcp, udp) =
        at(name, || (TcpListener::bind((address, 8080)).unwrap(), UdpSocket::bind((address, 8080)).unwrap()));
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            let from = stream.peer_addr().unwrap().ip();
            let _ = write!(stream, "{name} {from}");
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        loop {
            let (_, from) = udp.recv_from(&mut buffer).unwrap();
            let _ = udp.send_to(format!("{name} {}", from.ip()).as_bytes(), from);
        }
    });
}

/// What one try came to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    Answer(String, IpAddr),
    Refused,
    Silence,
}

fn parse(text: &str) -> Seen {
    let (name, from) = text.split_once(' ').unwrap();
    Seen::Answer(name.into(), from.parse().unwrap())
}

fn tcp(to: SocketAddr) -> Seen {
    match TcpStream::connect_timeout(&to, Duration::from_millis(250)) {
        Ok(mut stream) => {
            let mut text = String::new();
            match stream.read_to_string(&mut text) {
                Ok(_) => parse(&text),
                Err(_) => Seen::Refused,
            }
        }
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => Seen::Refused,
        Err(_) => Seen::Silence,
    }
}

fn udp(socket: &UdpSocket, to: SocketAddr) -> Seen {
    let mut buffer = [0; 64];
    socket.set_read_timeout(Some(Duration::from_millis(250))).unwrap();
    let sent = socket.connect(to).and_then(|()| socket.send(b"?"));
    let answer = match sent {
        // What the node's own rules refuse fails at once; the ICMP error tells it from a drop.
        Err(e) if e.kind() != ErrorKind::PermissionDenied => Err(e),
        _ => socket.recv(&mut buffer),
    };
    match answer {
        Ok(len) => parse(std::str::from_utf8(&buffer[..len]).unwrap()),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => Seen::Refused,
        Err(_) => Seen::Silence,
    }
}

struct World {
    shadow: Shadow,
    kernel: Kernel,
}

impl World {
    fn new() -> Self {
        build();
        let settings = Settings {
            table: "isopod-test".into(),
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            dns: Vec::new(),
            node_port_addresses: Vec::new(),
            localhost_node_ports: true,
        };
        let mut kernel = Kernel::open(settings).unwrap();
        kernel.reconcile(&[]).unwrap();
        Self { shadow: Shadow::new(Place { node: "me".into(), zone: None }), kernel }
    }

    fn put(&mut self, service: Service, endpoints: &[&str]) {
        let slice = members(&service.name, endpoints, service.ports[0].protocol);
        self.shadow.set_service(service);
        self.shadow.set_slice(slice);
    }

    fn apply(&mut self) {
        let delta = self.shadow.flush();
        self.kernel.apply(&delta).unwrap();
        if !delta.stale.is_empty() {
            crate::conntrack::forget(&delta.stale).unwrap();
        }
    }

    fn elements(&self) -> Vec<Element> {
        let mut all = Vec::new();
        self.shadow.elements(&mut |e| all.push(e));
        all
    }
}

fn members(name: &ServiceName, endpoints: &[&str], protocol: Protocol) -> Slice {
    let node = |n: &str| if n == "c" { "other" } else { "me" };
    let pairs: Vec<(&str, &str)> =
        PODS.iter().filter(|(n, _)| endpoints.contains(n)).map(|(n, address)| (*address, node(n))).collect();
    let mut made = slice(name, "p", 8080, &pairs);
    made.ports[0].protocol = protocol;
    made
}

fn source(from: &str, to: &str) -> IpAddr {
    match from {
        "client" => CLIENT,
        "node" if to.starts_with("127") => "127.0.0.1",
        "node" if to.starts_with("10.96") => "10.244.0.1",
        "node" => "192.0.2.1",
        pod => PODS.iter().find(|(n, _)| *n == pod).unwrap().1,
    }
    .parse()
    .unwrap()
}

/// Who answers, and whether the client's address is the one the server sees; from real packets.
fn real(from: &str, to: SocketAddr, protocol: Protocol) -> Fate {
    let own = source(from, &to.to_string());
    let seen: BTreeSet<Seen> = at(from, || {
        let tries = |n| {
            (0..n).map(|_| match protocol {
                Protocol::Udp => udp(&UdpSocket::bind("0.0.0.0:0").unwrap(), to),
                _ => tcp(to),
            })
        };
        let first = tries(1).next().unwrap();
        // Enough that a backend of three is missed once in millions.
        if matches!(first, Seen::Answer(..)) {
            std::iter::once(first).chain(tries(40)).collect()
        } else {
            [first].into()
        }
    });
    match seen.first().unwrap() {
        Seen::Silence => return Fate::Dropped,
        Seen::Refused => return Fate::Refused,
        Seen::Answer(..) => {}
    }
    let mut to = BTreeSet::new();
    let mut masqueraded = true;
    for one in &seen {
        let Seen::Answer(name, source) = one else { panic!("{from}: {seen:?}") };
        let address = PODS.iter().find(|(n, _)| n == name).unwrap().1;
        to.insert(SocketAddr::new(address.parse().unwrap(), 8080));
        // A pod that reaches itself is masqueraded whatever the rule; the others tell the rule.
        if name != from {
            masqueraded &= *source != own;
        }
    }
    Fate::Sent { to, masqueraded }
}

fn local(mut made: Service) -> Service {
    made.external_policy = Policy::Local;
    made
}

fn services() -> Vec<(Service, &'static [&'static str])> {
    let plain = |n: u8, node_port| service("ns", &format!("s{n}"), &[&format!("10.96.0.{n}")], &[("p", 80, node_port)]);
    let outside = |n: u8, node_port| {
        let mut made = plain(n, node_port);
        made.external_ips = [IpAddr::from([203, 0, 113, n])].into();
        made
    };
    let balancer = |n: u8, range: &str| {
        let mut made = plain(n, 0);
        made.balancer_ips = [IpAddr::from([203, 0, 113, n])].into();
        made.source_ranges = [range.parse().unwrap(), "10.250.0.0/16".parse().unwrap()].into();
        made
    };
    let mut inner = plain(4, 0);
    inner.internal_policy = Policy::Local;
    let mut inner_none = plain(8, 0);
    inner_none.internal_policy = Policy::Local;
    vec![
        (plain(1, 0), &["a", "b", "c"]),
        (outside(2, 30_002), &["b", "c"]),
        (local(outside(3, 30_003)), &["a", "c"]),
        (inner, &["b", "c"]),
        (outside(5, 30_005), &[]),
        (local(outside(6, 30_006)), &["c"]),
        (inner_none, &["c"]),
        (balancer(7, "192.0.2.0/25"), &["a", "b"]),
        (balancer(9, "198.18.0.0/24"), &["a", "b"]),
    ]
}

/// Every service from every place, by real packets and by the tracer: both must agree, none is skipped.
fn matrix(protocol: Protocol) {
    let mut world = World::new();
    for (mut service, endpoints) in services() {
        service.ports[0].protocol = protocol;
        world.put(service, endpoints);
    }
    world.apply();
    let cluster = vec!["10.244.0.0/16".parse().unwrap()];
    let tracer = Tracer::new(&world.elements(), cluster, NODE.iter().map(|a| a.parse().unwrap()).collect());
    let mut targets: Vec<String> = (1..=9).map(|n| format!("10.96.0.{n}:80")).collect();
    targets.extend([2, 3, 5, 6, 7, 9].map(|n| format!("203.0.113.{n}:80")));
    targets.extend([30_002, 30_003, 30_005, 30_006].map(|p| format!("192.0.2.1:{p}")));
    targets.extend([30_002, 30_005].map(|p| format!("127.0.0.1:{p}")));
    targets.push("10.96.0.1:81".into());
    let mut wrong = Vec::new();
    for target in &targets {
        for from in ["a", "node", "client"] {
            if target.starts_with("127") && from != "node" {
                continue;
            }
            // The node has no route to external addresses: for its own packets they need one.
            if from == "node" && target.starts_with("203") {
                continue;
            }
            let to: SocketAddr = target.parse().unwrap();
            let expected = tracer.trace(&Packet { from: source(from, target), to, protocol });
            let got = real(from, to, protocol);
            if got != expected {
                wrong.push(format!("{from} -> {target}: real {got:?}, model {expected:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn tcp_matrix() {
    std::thread::spawn(|| matrix(Protocol::Tcp)).join().unwrap();
}

#[test]
fn udp_matrix() {
    std::thread::spawn(|| matrix(Protocol::Udp)).join().unwrap();
}

/// Chains for many endpoints are loaded when first needed: they must be as good as the first ones, for UDP as well.
#[test]
fn many_endpoints_are_all_reached() {
    let test = || {
        let mut world = World::new();
        let mut ports = Vec::new();
        let udp_server = |n: u16| at("a", || UdpSocket::bind((PODS[0].1, 9000 + n)).unwrap());
        let mut made = service("ns", "many", &["10.96.0.9"], &[("p", 80, 0)]);
        made.ports[0].protocol = Protocol::Udp;
        let mut wide = Vec::new();
        for n in 0..40 {
            ports.push(udp_server(n));
            let mut part = members(&made.name, &["a"], Protocol::Udp);
            part.name = format!("s{n}").into();
            part.ports[0].port = 9000 + n;
            wide.push(part);
        }
        world.shadow.set_service(made);
        wide.into_iter().for_each(|part| world.shadow.set_slice(part));
        world.apply();
        at("client", || {
            for _ in 0..600 {
                UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"?", "10.96.0.9:80").unwrap();
            }
        });
        let mut buffer = [0; 8];
        for (n, socket) in ports.iter().enumerate() {
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            assert!(socket.recv(&mut buffer).is_ok(), "endpoint {n} got nothing");
        }
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn clients_stick_to_their_endpoint_until_it_goes() {
    let test = || {
        let mut world = World::new();
        let mut sticky = service("ns", "sticky", &["10.96.0.9"], &[("p", 80, 30_009)]);
        sticky.affinity = Some(10_800);
        let name = sticky.name.clone();
        world.put(sticky.clone(), &["a", "b", "c"]);
        world.apply();
        for target in ["10.96.0.9:80", "192.0.2.1:30009"] {
            world.shadow.set_slice(members(&name, &["a", "b", "c"], Protocol::Tcp));
            world.apply();
            let to: SocketAddr = target.parse().unwrap();
            let ask = || {
                let seen: BTreeSet<String> = at("client", || {
                    (0..20)
                        .map(|_| tcp(to))
                        .map(|s| if let Seen::Answer(n, _) = s { n } else { panic!("{s:?}") })
                        .collect()
                });
                assert_eq!(seen.len(), 1, "{target}: {seen:?}");
                seen.into_iter().next().unwrap()
            };
            let first = ask();
            let rest: Vec<&str> = ["a", "b", "c"].into_iter().filter(|n| *n != first).collect();
            world.shadow.set_slice(members(&name, &rest, Protocol::Tcp));
            world.apply();
            let second = ask();
            assert!(rest.contains(&second.as_str()));
            // The first one is back: clients stay where they are.
            world.shadow.set_slice(members(&name, &["a", "b", "c"], Protocol::Tcp));
            world.apply();
            assert_eq!(ask(), second);
        }
        // A new process keeps what clients are remembered.
        let before = String::from_utf8(
            Command::new("nft").args(["list", "map", "ip", "isopod-test", "affinity"]).output().unwrap().stdout,
        );
        assert!(before.unwrap().contains("192.0.2.2"));
        let mut again = Kernel::open(Settings {
            table: "isopod-test".into(),
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            dns: Vec::new(),
            node_port_addresses: Vec::new(),
            localhost_node_ports: true,
        })
        .unwrap();
        again.reconcile(&world.elements()).unwrap();
        let after = String::from_utf8(
            Command::new("nft").args(["list", "map", "ip", "isopod-test", "affinity"]).output().unwrap().stdout,
        );
        assert!(after.unwrap().contains("192.0.2.2"));
        // No affinity any more: spread again.
        sticky.affinity = None;
        world.put(sticky, &["a", "b", "c"]);
        world.apply();
        let to = "10.96.0.9:80".parse().unwrap();
        let seen: BTreeSet<Seen> = at("client", || (0..40).map(|_| tcp(to)).collect());
        assert_eq!(seen.len(), 3, "{seen:?}");
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn udp_flows_move_when_their_endpoint_goes() {
    let test = || {
        let mut world = World::new();
        let mut made = service("ns", "udp", &["10.96.0.9"], &[("p", 80, 0)]);
        made.ports[0].protocol = Protocol::Udp;
        let name = made.name.clone();
        world.put(made, &["a"]);
        world.apply();
        // One socket: to conntrack one flow.
        let socket = at("client", || UdpSocket::bind("0.0.0.0:0").unwrap());
        let to = "10.96.0.9:80".parse().unwrap();
        let who = |s: Seen| match s {
            Seen::Answer(name, _) => name,
            other => format!("{other:?}"),
        };
        assert_eq!(who(udp(&socket, to)), "a");
        world.shadow.set_slice(members(&name, &["a", "b"], Protocol::Udp));
        world.apply();
        assert_eq!(who(udp(&socket, to)), "a", "a flow to a live endpoint stays");
        world.shadow.set_slice(members(&name, &["b"], Protocol::Udp));
        world.apply();
        assert_eq!(who(udp(&socket, to)), "b", "a flow to a dead endpoint moves");
    };
    std::thread::spawn(test).join().unwrap();
}
