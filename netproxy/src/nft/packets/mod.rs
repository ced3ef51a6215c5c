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
mod sctp;

use super::{
    element::{Element, Family},
    kernel::Kernel,
    skeleton::Settings,
    trace::{Fate, Packet, Tracer},
};
use crate::hosts::{at, leave, run, trust_addresses};
use crate::model::{
    objects::{Endpoint, Place, Policy, Protocol, Rare, Service, ServiceName, Slice},
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
/// So long nothing means silence.
const PATIENCE: Duration = Duration::from_millis(400);
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
    trust_addresses("node");
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
        trust_addresses(name);
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
    match TcpStream::connect_timeout(&to, PATIENCE) {
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
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
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
            made.endpoints.edit(|_, endpoint| {
                let name = PODS.iter().find(|(_, a)| a[family.index()] == endpoint.address.to_string()).unwrap().0;
                shape(name, endpoint);
            });
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
    real_of(from, to, protocol, 3)
}

/// The same, with tries enough that one of so many backends is missed once in millions.
fn real_of(from: &str, to: SocketAddr, protocol: Protocol, backends: usize) -> Fate {
    let own = source(from, to);
    let seen: BTreeSet<Seen> = at(from, || {
        let tries = |n| {
            (0..n).map(|_| match protocol {
                Protocol::Udp => udp(&UdpSocket::bind(any(to)).unwrap(), to),
                Protocol::Sctp => sctp::ask(to),
                Protocol::Tcp => tcp(to),
            })
        };
        let first = tries(1).next().unwrap();
        if matches!(first, Seen::Answer(..)) {
            std::iter::once(first).chain(tries([8, 8, 24, 40][backends.min(3)])).collect()
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

fn both(at: fn(Family, u8) -> String, n: u8) -> Box<[IpAddr]> {
    Family::ALL.map(|f| at(f, n).parse::<IpAddr>().unwrap()).into()
}

/// Every kind of service, with every policy, with endpoints in every place, in both families. Node ports are `30_000 + n`.
fn product() -> Vec<(Service, &'static [&'static str])> {
    const PLACES: [&[&str]; 5] = [&[], &["a"], &["c"], &["b", "c"], &["a", "b", "c"]];
    let policies = [Policy::Cluster, Policy::Local];
    let mut all = Vec::new();
    for kind in ["ClusterIP", "NodePort", "external IP", "LoadBalancer"] {
        for (internal, external) in policies.iter().flat_map(|i| policies.iter().map(move |e| (*i, *e))) {
            if kind == "ClusterIP" && external == Policy::Local {
                continue;
            }
            for place in PLACES {
                let n = 20 + u8::try_from(all.len()).unwrap();
                let node_port = if kind == "NodePort" { 30_000 + u16::from(n) } else { 0 };
                let mut made = service("ns", &format!("p{n}"), &[], &[("p", 80, node_port)]);
                made.cluster_ips = both(at_cluster, n);
                match kind {
                    "external IP" => made.external_ips = both(at_outside, n),
                    "LoadBalancer" => made.balancer_ips = both(at_outside, n),
                    _ => {}
                }
                (made.internal_policy, made.external_policy) = (internal, external);
                all.push((made, place));
            }
        }
    }
    assert_eq!(all.len(), (2 + 3 * 4) * PLACES.len());
    all
}

/// What is not in the product: several addresses at once, and source ranges.
fn services() -> Vec<(Service, &'static [&'static str])> {
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

/// Where a service can be asked for: its addresses, its node port at the node's address, and at 127.0.0.1.
fn targets(service: &Service, family: Family) -> Vec<SocketAddr> {
    let addresses = [&service.cluster_ips, &service.external_ips, &service.balancer_ips];
    let own = addresses.into_iter().flatten().filter(|a| Family::of(a) == family);
    let mut all: Vec<SocketAddr> = own.map(|a| SocketAddr::new(*a, 80)).collect();
    if service.ports[0].node_port != 0 {
        let nodes = [NODE[3 * family.index()], "127.0.0.1"];
        all.extend(
            nodes[..if family == Family::V4 { 2 } else { 1 }].iter().map(|a| socket(a, service.ports[0].node_port)),
        );
    }
    all
}

/// Why a place cannot ask for a target, if it cannot.
fn pointless(from: &str, to: SocketAddr) -> Option<&'static str> {
    let text = to.ip().to_string();
    let outside = ["203.0.113.", "2001:db8:cb:"].iter().any(|net| text.starts_with(net));
    match from {
        "node" if outside => Some("the node has no route to external addresses, which its own packets need"),
        "c" if to.port() < 30_000 => Some("what a pod of another node sends to services is that node's to translate"),
        from if from != "node" && to.ip().is_loopback() => Some("127.0.0.1 is the node's alone"),
        _ => None,
    }
}

/// Every service by every address from every place, by real packets and by the tracer: both must agree, none is skipped but
/// for a reason that is counted.
fn matrix(protocol: Protocol, family: Family) {
    let mut world = World::new();
    if protocol == Protocol::Sctp {
        PODS.iter().for_each(|(name, addresses)| sctp::serve(name, addresses[family.index()].parse().unwrap()));
    }
    let mut asked = vec![socket(&at_cluster(family, 1), 81)];
    for (mut service, endpoints) in services().into_iter().chain(product()) {
        service.ports[0].protocol = protocol;
        asked.extend(targets(&service, family));
        world.put(service, endpoints);
    }
    world.apply();
    let cluster = vec!["10.244.0.0/16".parse().unwrap(), "2001:db8:1::/48".parse().unwrap()];
    let tracer = Tracer::new(family, &world.elements(), cluster, NODE.iter().map(|a| a.parse().unwrap()).collect());
    let places = ["a", "b", "c", "node", "client"];
    let all = asked.iter().flat_map(|to| places.map(|from| (from, *to)));
    let (cases, left): (Vec<_>, Vec<_>) = all.partition(|(from, to)| pointless(from, *to).is_none());
    let judge = |(from, to): &(&str, SocketAddr)| {
        let expected = tracer.trace(&Packet { from: source(from, *to), to: *to, protocol });
        let backends = if let Fate::Sent { to, .. } = &expected { to.len() } else { 0 };
        let got = real_of(from, *to, protocol, backends);
        (got != expected).then(|| format!("{from} -> {to}: real {got:?}, model {expected:?}"))
    };
    let judge = &judge;
    // Silence takes its time: the places wait at once. In a place it is one after the other, for an error of SCTP's reaches
    // every raw socket there.
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let own = |place| cases.iter().filter(move |(from, _)| *from == place);
        let threads = places.map(|place| scope.spawn(move || own(place).filter_map(judge).collect::<Vec<_>>()));
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    assert!(wrong.is_empty(), "{} of {}\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    let mut reasons = std::collections::BTreeMap::<_, usize>::new();
    left.iter().for_each(|(from, to)| *reasons.entry(pointless(from, *to).unwrap()).or_default() += 1);
    println!("{protocol:?} {family:?}: {} cases, real packets as the model has them; {reasons:?}", cases.len());
    assert!(cases.len() >= 450, "only {} cases", cases.len());
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

#[test]
fn sctp_matrix() {
    std::thread::spawn(|| matrix(Protocol::Sctp, Family::V4)).join().unwrap();
}

#[test]
fn sctp_matrix_of_ipv6() {
    std::thread::spawn(|| matrix(Protocol::Sctp, Family::V6)).join().unwrap();
}
