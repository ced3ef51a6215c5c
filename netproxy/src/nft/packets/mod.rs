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

mod choices;

use super::{
    element::{Element, Family},
    kernel::Kernel,
    skeleton::Settings,
    trace::{Fate, Packet, Tracer},
};
use crate::hosts::{at, leave, run};
use crate::model::{
    objects::{Endpoint, Place, Policy, Protocol, Service, ServiceName, Slice},
    shadow::Shadow,
    tests::{service, slice},
};

/// Name and address in either family.
const PODS: [(&str, [&str; 2]); 3] = [
    ("a", ["10.244.0.2", "2001:db8:1::2"]),
    ("b", ["10.244.0.3", "2001:db8:1::3"]),
    ("c", ["10.244.1.2", "2001:db8:1:1::2"]),
];
const NODE: [&str; 6] =
    ["192.0.2.1", "10.244.0.1", "198.51.100.1", "2001:db8:c0::1", "2001:db8:1::1", "2001:db8:c6::1"];
const CLIENT: [&str; 2] = ["192.0.2.2", "2001:db8:c0::2"];

fn pod(name: &str, family: Family) -> &'static str {
    PODS.iter().find(|(n, _)| *n == name).unwrap().1[family.index()]
}

/// A cluster address, an external address, the node's own towards its client, as text for a URL.
fn at_cluster(family: Family, n: u8) -> String {
    [format!("10.96.0.{n}"), format!("2001:db8:96::{n:x}")][family.index()].clone()
}

fn at_outside(family: Family, n: u8) -> String {
    [format!("203.0.113.{n}"), format!("2001:db8:cb::{n:x}")][family.index()].clone()
}

fn socket(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

fn sysctl(name: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{name}"), value).unwrap();
}

/// Builds the network; afterwards the calling thread is the node.
fn build() {
    leave();
    // Addresses are good at once: until a link's own is, a node asks for no neighbour of it.
    sysctl("ipv6/conf/default/accept_dad", "0");
    sysctl("ipv6/conf/all/accept_dad", "0");
    run("ip link set lo up");
    run("ip link add br0 type bridge");
    run("ip addr add 10.244.0.1/24 dev br0");
    run("ip addr add 2001:db8:1::1/64 dev br0 nodad");
    run("ip link set br0 up");
    run("ip route add 10.96.0.0/16 dev br0 src 10.244.0.1");
    run("ip route add 2001:db8:96::/48 dev br0 src 2001:db8:1::1");
    sysctl("ipv4/ip_forward", "1");
    sysctl("ipv6/conf/all/forwarding", "1");
    sysctl("ipv4/conf/all/route_localnet", "1");
    sysctl("ipv4/conf/all/send_redirects", "0");
    // Every refusal is to be seen.
    sysctl("ipv4/icmp_ratelimit", "0");
    sysctl("ipv6/icmp/ratelimit", "0");
    for (name, [address, six]) in PODS {
        run(&format!("ip netns add {name}"));
        at(name, || sysctl("ipv6/conf/default/accept_dad", "0"));
        run(&format!("ip link add v{name} type veth peer name eth0 netns {name}"));
        run(&format!("ip link set v{name} up"));
        run(&format!("ip -n {name} link set lo up"));
        run(&format!("ip -n {name} link set eth0 up"));
        run(&format!("ip -n {name} addr add {address}/32 dev eth0"));
        run(&format!("ip -n {name} addr add {six}/128 dev eth0 nodad"));
        let gateway = if name == "c" { "198.51.100.1" } else { "10.244.0.1" };
        if name == "c" {
            run("ip addr add 198.51.100.1/24 dev vc");
            run("ip -n c addr add 198.51.100.2/24 dev eth0");
            run("ip route add 10.244.1.0/24 via 198.51.100.2");
            run(&format!("ip -n c route add default via {gateway} src {address}"));
            run("ip addr add 2001:db8:c6::1/64 dev vc nodad");
            run("ip -n c addr add 2001:db8:c6::2/64 dev eth0 nodad");
            run("ip route add 2001:db8:1:1::/64 via 2001:db8:c6::2");
            run(&format!("ip -n c route add default via 2001:db8:c6::1 src {six}"));
        } else {
            run(&format!("ip link set v{name} master br0"));
            // Where bridges are filtered, a pod's packet to itself never leaves the bridge.
            run(&format!("ip link set v{name} type bridge_slave hairpin on"));
            run(&format!("ip -n {name} route add {gateway} dev eth0"));
            run(&format!("ip -n {name} route add default via {gateway}"));
            run(&format!("ip -n {name} route add 2001:db8:1::1 dev eth0"));
            run(&format!("ip -n {name} route add default via 2001:db8:1::1"));
        }
        serve(name, address.parse().unwrap());
        serve(name, six.parse().unwrap());
    }
    run("ip netns add client");
    run("ip link add vclient type veth peer name eth0 netns client");
    run("ip addr add 192.0.2.1/24 dev vclient");
    run("ip link set vclient up");
    run("ip -n client link set eth0 up");
    run("ip -n client addr add 192.0.2.2/24 dev eth0");
    run("ip -n client route add default via 192.0.2.1");
    run("ip addr add 2001:db8:c0::1/64 dev vclient nodad");
    run("ip -n client addr add 2001:db8:c0::2/64 dev eth0 nodad");
    run("ip -n client route add default via 2001:db8:c0::1");
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

/// The tests' settings, without the address of a DNS that is not there.
fn own_settings() -> Settings {
    Settings { dns: Vec::new(), ..super::tests::settings() }
}

/// A socket of SCTP's that works as TCP's do; `None` where the kernel has no SCTP.
fn sctp_socket(family: Family) -> Option<std::os::fd::OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
    let family = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp).ok()
}

fn serve_sctp(name: &'static str, address: IpAddr) {
    use nix::sys::socket::{Backlog, SockaddrStorage, bind, listen};
    let listener = at(name, || {
        let socket = sctp_socket(Family::of(&address)).unwrap();
        let to = SockaddrStorage::from(SocketAddr::new(address, 8080));
        bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &to).unwrap();
        listen(&socket, Backlog::new(64).unwrap()).unwrap();
        TcpListener::from(socket)
    });
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let from = stream.peer_addr().unwrap().ip();
            let _ = write!(stream, "{name} {from}");
        }
    });
}

fn sctp(to: SocketAddr) -> Seen {
    use nix::sys::{
        socket::{SockaddrStorage, connect, setsockopt, sockopt},
        time::TimeVal,
    };
    let socket = sctp_socket(Family::of(&to.ip())).unwrap();
    let patience = TimeVal::new(0, 250_000);
    setsockopt(&socket, sockopt::SendTimeout, &patience).unwrap();
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience).unwrap();
    match connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(to)) {
        Ok(()) => {
            let mut buffer = [0; 64];
            match TcpStream::from(socket).read(&mut buffer) {
                Ok(len) => parse(std::str::from_utf8(&buffer[..len]).unwrap()),
                Err(_) => Seen::Silence,
            }
        }
        Err(nix::Error::ECONNREFUSED) => Seen::Refused,
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
        Self::with(own_settings())
    }

    fn with(settings: Settings) -> Self {
        let mut kernel = Kernel::open(settings, None).unwrap();
        kernel.reconcile(&|_| {}).unwrap();
        Self { shadow: Shadow::new(Place { node: "me".into(), zone: Some("z1".into()) }), kernel }
    }

    fn put(&mut self, service: Service, endpoints: &[&str]) {
        self.put_shaped(service, endpoints, |_, _| {});
    }

    /// As `put`; `shape` sees every endpoint with its pod's name.
    fn put_shaped(&mut self, service: Service, endpoints: &[&str], shape: fn(&str, &mut Endpoint)) {
        for family in Family::ALL {
            let mut made = members(&service.name, endpoints, service.ports[0].protocol, family);
            for endpoint in &mut made.endpoints {
                let name = PODS.iter().find(|(_, a)| a[family.index()] == endpoint.address.to_string()).unwrap().0;
                shape(name, endpoint);
            }
            self.shadow.set_slice(made);
        }
        self.shadow.set_service(service);
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

fn members(name: &ServiceName, endpoints: &[&str], protocol: Protocol, family: Family) -> Slice {
    let node = |n: &str| if n == "c" { "other" } else { "me" };
    let chosen = PODS.iter().filter(|(n, _)| endpoints.contains(n));
    let pairs: Vec<(&str, &str)> = chosen.map(|(n, addresses)| (addresses[family.index()], node(n))).collect();
    let mut made = slice(name, "p", 8080, &pairs);
    made.name = family.nft().into();
    made.ports[0].protocol = protocol;
    made
}

fn source(from: &str, to: SocketAddr) -> IpAddr {
    let family = Family::of(&to.ip());
    let in_services = |n: &str| n.parse::<ipnet::IpNet>().unwrap().contains(&to.ip());
    match from {
        "client" => CLIENT[family.index()],
        "node" if to.ip().is_loopback() => "127.0.0.1",
        "node" if in_services("10.96.0.0/16") => "10.244.0.1",
        "node" if in_services("2001:db8:96::/48") => "2001:db8:1::1",
        "node" => NODE[3 * family.index()],
        name => pod(name, family),
    }
    .parse()
    .unwrap()
}

/// Any address of the target's family.
fn any(to: SocketAddr) -> SocketAddr {
    if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap()
}

/// Who answers, and whether the client's address is the one the server sees; from real packets.
fn real(from: &str, to: SocketAddr, protocol: Protocol) -> Fate {
    let own = source(from, to);
    let seen: BTreeSet<Seen> = at(from, || {
        let tries = |n| {
            (0..n).map(|_| match protocol {
                Protocol::Udp => udp(&UdpSocket::bind(any(to)).unwrap(), to),
                Protocol::Sctp => sctp(to),
                Protocol::Tcp => tcp(to),
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
        to.insert(socket(pod(name, Family::of(&own)), 8080));
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

/// Every kind of service with its endpoints, in both families. Node ports are `30_000 + n`.
fn services() -> Vec<(Service, &'static [&'static str])> {
    let both = |at: fn(Family, u8) -> String, n| -> Box<[IpAddr]> {
        Family::ALL.map(|f| at(f, n).parse::<IpAddr>().unwrap()).into()
    };
    let plain = |n: u8, node_port| {
        let mut made = service("ns", &format!("s{n}"), &[], &[("p", 80, node_port)]);
        made.cluster_ips = both(at_cluster, n);
        made
    };
    let outside = |n: u8, node_port| {
        let mut made = plain(n, node_port);
        made.external_ips = both(at_outside, n);
        made
    };
    let balancer = |n: u8, ranges: [&str; 4]| {
        let mut made = plain(n, 0);
        made.balancer_ips = both(at_outside, n);
        made.source_ranges = ranges.map(|r| r.parse::<ipnet::IpNet>().unwrap()).into();
        made
    };
    let inner = |n: u8| {
        let mut made = plain(n, 0);
        made.internal_policy = Policy::Local;
        made
    };
    vec![
        (plain(1, 0), &["a", "b", "c"]),
        (outside(2, 30_002), &["b", "c"]),
        (local(outside(3, 30_003)), &["a", "c"]),
        (inner(4), &["b", "c"]),
        (outside(5, 30_005), &[]),
        (local(outside(6, 30_006)), &["c"]),
        (inner(8), &["c"]),
        (balancer(7, ["192.0.2.0/25", "10.250.0.0/16", "2001:db8:c0::/64", "2001:db8:250::/48"]), &["a", "b"]),
        (balancer(9, ["198.18.0.0/24", "10.250.0.0/16", "2001:db8:198::/48", "2001:db8:250::/48"]), &["a", "b"]),
        (local(balancer(10, ["0.0.0.0/0", "10.250.0.0/16", "::/0", "2001:db8:250::/48"])), &["a", "c"]),
    ]
}

/// Every service by every address from every place, by real packets and by the tracer: both must agree, none is skipped.
fn matrix(protocol: Protocol, family: Family) {
    let mut world = World::new();
    if protocol == Protocol::Sctp {
        PODS.iter().for_each(|(name, addresses)| serve_sctp(name, addresses[family.index()].parse().unwrap()));
    }
    for (mut service, endpoints) in services() {
        service.ports[0].protocol = protocol;
        world.put(service, endpoints);
    }
    world.apply();
    let cluster = vec!["10.244.0.0/16".parse().unwrap(), "2001:db8:1::/48".parse().unwrap()];
    let tracer = Tracer::new(family, &world.elements(), cluster, NODE.iter().map(|a| a.parse().unwrap()).collect());
    let mut targets: Vec<SocketAddr> = (1..=10).map(|n| socket(&at_cluster(family, n), 80)).collect();
    targets.extend([2, 3, 5, 6, 7, 9, 10].map(|n| socket(&at_outside(family, n), 80)));
    targets.extend([30_002, 30_003, 30_005, 30_006].map(|p| socket(NODE[3 * family.index()], p)));
    if family == Family::V4 {
        targets.extend([30_002, 30_005].map(|p| socket("127.0.0.1", p)));
    }
    targets.push(socket(&at_cluster(family, 1), 81));
    let (mut wrong, mut tried) = (Vec::new(), 0);
    for to in targets {
        for from in ["a", "b", "c", "node", "client"] {
            // 127.0.0.1 is the node's alone; and it has no route to external addresses, which its own packets need. A pod
            // of another node comes here for node ports: what it sends to services is that node's to translate.
            let outside = (0..=10).any(|n| socket(&at_outside(family, n), 80) == to);
            let other_nodes = to.port() < 30_000;
            if to.ip().is_loopback() && from != "node" || outside && from == "node" || other_nodes && from == "c" {
                continue;
            }
            tried += 1;
            let expected = tracer.trace(&Packet { from: source(from, to), to, protocol });
            let got = real(from, to, protocol);
            if got != expected {
                wrong.push(format!("{from} -> {to}: real {got:?}, model {expected:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {tried}\n{}", wrong.len(), wrong.join("\n"));
    println!("{protocol:?} {family:?}: {tried} cases, real packets as the model has them");
    assert!(tried >= 77, "only {tried} cases");
}

#[test]
fn tcp_matrix() {
    std::thread::spawn(|| matrix(Protocol::Tcp, Family::V4)).join().unwrap();
}

#[test]
fn udp_matrix() {
    std::thread::spawn(|| matrix(Protocol::Udp, Family::V4)).join().unwrap();
}

#[test]
fn tcp_matrix_of_ipv6() {
    std::thread::spawn(|| matrix(Protocol::Tcp, Family::V6)).join().unwrap();
}

#[test]
fn udp_matrix_of_ipv6() {
    std::thread::spawn(|| matrix(Protocol::Udp, Family::V6)).join().unwrap();
}

/// Where the kernel has SCTP; elsewhere it is said that these rows were not run.
#[test]
fn sctp_matrix() {
    for family in Family::ALL {
        if sctp_socket(family).is_none() {
            println!(
                "SCTP {family:?}: NOT RUN, this kernel has no SCTP; its map elements differ from TCP's by a number"
            );
            continue;
        }
        std::thread::spawn(move || matrix(Protocol::Sctp, family)).join().unwrap();
    }
}
