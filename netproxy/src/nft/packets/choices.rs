//! Who is chosen, from where, and who stays: one thing at a time, beside the matrix.

use super::*;

/// Hints of a zone and of a node.
fn hints(zone: Option<&str>, node: Option<&str>) -> Option<std::sync::Arc<Rare>> {
    let list = |name: Option<&str>| name.map(|n| [n.into()].into());
    Some(std::sync::Arc::new(Rare { hostname: None, for_zones: list(zone), for_nodes: list(node) }))
}

/// Which endpoints a service has for its clients: those that terminate when there is nobody else, hints, none at all.
#[test]
fn endpoints_are_chosen_by_their_conditions_and_hints() {
    type Shape = fn(&str, &mut Endpoint);
    type Wanted = Result<&'static [&'static str], Fate>;
    let cases: [(&str, bool, Shape, Wanted, Wanted); 9] = [
        // What it is about, whether external traffic stays here; whom pod `a` and the client outside reach.
        ("all ready", false, |_, _| {}, Ok(&["a", "b", "c"]), Ok(&["a", "b", "c"])),
        (
            "one leaves",
            false,
            |n, e| {
                if n == "a" {
                    (e.ready, e.terminating) = (false, true)
                }
            },
            Ok(&["b", "c"]),
            Ok(&["b", "c"]),
        ),
        (
            "all leave",
            false,
            |_, e| (e.ready, e.terminating) = (false, true),
            Ok(&["a", "b", "c"]),
            Ok(&["a", "b", "c"]),
        ),
        (
            "all leave, one of them serves no more",
            false,
            |n, e| (e.ready, e.terminating, e.serving) = (false, true, n != "a"),
            Ok(&["b", "c"]),
            Ok(&["b", "c"]),
        ),
        ("none is ready", false, |_, e| (e.ready, e.serving) = (false, false), Err(Fate::Refused), Err(Fate::Refused)),
        (
            "those of this node leave, and only they count outside",
            true,
            |n, e| {
                if n != "c" {
                    (e.ready, e.terminating) = (false, true)
                }
            },
            Ok(&["c"]),
            Ok(&["a", "b"]),
        ),
        (
            "hints of zones",
            false,
            |n, e| e.rare = hints(Some(if n == "b" { "z1" } else { "z2" }), None),
            Ok(&["b"]),
            Ok(&["b"]),
        ),
        (
            "one has no hint: all count",
            false,
            |n, e| {
                if n != "b" {
                    e.rare = hints(Some("z1"), None)
                }
            },
            Ok(&["a", "b", "c"]),
            Ok(&["a", "b", "c"]),
        ),
        (
            "hints of nodes before those of zones",
            false,
            |n, e| {
                e.rare = hints(Some("z1"), Some(if n == "a" { "me" } else { "other" }));
            },
            Ok(&["a"]),
            Ok(&["a"]),
        ),
    ];
    let test = move || {
        let mut world = World::new();
        for (number, (_, here_only, shape, ..)) in cases.iter().enumerate() {
            let n = 20 + number as u8;
            let mut made = service("ns", &format!("c{n}"), &[], &[("p", 80, 0)]);
            made.cluster_ips = Family::ALL.map(|f| at_cluster(f, n).parse().unwrap()).into();
            made.external_ips = Family::ALL.map(|f| at_outside(f, n).parse().unwrap()).into();
            made.external_policy = if *here_only { Policy::Local } else { Policy::Cluster };
            world.put_shaped(made, &["a", "b", "c"], *shape);
        }
        world.apply();
        for (number, (what, _, _, pod_sees, client_sees)) in cases.iter().enumerate() {
            for family in Family::ALL {
                let n = 20 + number as u8;
                let inside = real("a", socket(&at_cluster(family, n), 80), Protocol::Tcp);
                let outside = real("client", socket(&at_outside(family, n), 80), Protocol::Tcp);
                for (place, got, wanted) in [("a", inside, pod_sees), ("client", outside, client_sees)] {
                    match (got, wanted) {
                        (Fate::Sent { to, .. }, Ok(names)) => {
                            let names = names.iter().map(|name| socket(pod(name, family), 8080)).collect();
                            assert_eq!(to, names, "{what}, from {place}");
                        }
                        (got, Err(fate)) => assert_eq!(got, *fate, "{what}, from {place}"),
                        (got, wanted) => panic!("{what}, from {place}: {got:?}, not {wanted:?}"),
                    }
                }
            }
        }
    };
    std::thread::spawn(test).join().unwrap();
}

/// What a load balancer outside hears at a service's health check port: how many endpoints this node has, in the words of
/// the fact table.
#[test]
fn health_check_ports_tell_what_is_here() {
    use crate::{health, sync::Report};
    const PORT: u16 = 32_100;
    let facts: serde_json::Value = serde_json::from_str(include_str!("../../../testdata/kube-proxy.json")).unwrap();
    let test = move || {
        let mut world = World::new();
        let (report, watched) = tokio::sync::watch::channel(Report::default());
        let (_nodes, nodes) = tokio::sync::watch::channel(Default::default());
        let metrics = std::sync::Arc::new(crate::metrics::Metrics::new());
        let config = serde_json::Value::Null;
        let checks = health::Health { node: "me".into(), report: watched, nodes, metrics, config };
        let stop = tokio_util::sync::CancellationToken::new();
        let ended = stop.clone();
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(health::run(checks, Vec::new(), ended));
        });
        let mut made = service("ns", "checked", &[], &[("p", 80, 30_002)]);
        made.cluster_ips = Family::ALL.map(|f| at_cluster(f, 1).parse().unwrap()).into();
        (made.external_policy, made.health_check_node_port) = (Policy::Local, PORT);
        // Endpoints, and how many ready ones are here: one that terminates has traffic still, but is not to get more.
        let cases: [(&[&str], bool, usize); 5] =
            [(&["c"], false, 0), (&["a", "c"], false, 1), (&["a", "b"], false, 2), (&["b"], true, 0), (&[], false, 0)];
        for (endpoints, leaving, count) in cases {
            let shape = |_: &str, e: &mut Endpoint| (e.ready, e.terminating) = (false, true);
            world.put_shaped(made.clone(), endpoints, if leaving { shape } else { |_, _| {} });
            world.apply();
            report.send_replace(Report { health_checks: world.shadow.health_checks(), ..Report::default() });
            for family in Family::ALL {
                let to = socket(NODE[3 * family.index()], PORT);
                let heard = || {
                    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(1)).ok()?;
                    stream.write_all(b"GET /any HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
                    std::io::read_to_string(stream).ok()
                };
                // The server hears of a change a moment later.
                let weight = format!("x-load-balancing-endpoint-weight: {count}\r\n");
                let deadline = std::time::Instant::now() + Duration::from_secs(5);
                let text = loop {
                    let text = at("client", heard).unwrap_or_default();
                    if text.contains(&weight) || std::time::Instant::now() > deadline {
                        break text;
                    }
                };
                assert!(text.contains(&weight), "{endpoints:?} {family:?}: {text}");
                let code = if count > 0 { "HTTP/1.1 200 OK" } else { "HTTP/1.1 503 Service Unavailable" };
                assert!(text.starts_with(code), "{endpoints:?} {family:?}: {text}");
                let body: serde_json::Value = serde_json::from_str(text.split("\r\n\r\n").nth(1).unwrap()).unwrap();
                let mut shape = facts["serviceHealthCheckNodePort"]["response"].clone();
                shape["service"] = serde_json::json!({ "namespace": "ns", "name": "checked" });
                shape["localEndpoints"] = count.into();
                assert_eq!(body, shape);
            }
        }
        // The service goes, and its port.
        report.send_replace(Report::default());
        let to = socket(NODE[0], PORT);
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while at("client", || TcpStream::connect_timeout(&to, Duration::from_millis(250)).is_ok()) {
            assert!(std::time::Instant::now() < deadline, "still served");
        }
        stop.cancel();
        server.join().unwrap();
    };
    std::thread::spawn(test).join().unwrap();
}

/// Node ports at some of the node's addresses only, and not at 127.0.0.1.
#[test]
fn node_ports_are_where_they_are_wanted() {
    let test = || {
        build();
        let chosen = vec!["192.0.2.0/24".parse().unwrap(), "2001:db8:c0::/64".parse().unwrap()];
        let settings = Settings { node_port_addresses: chosen, localhost_node_ports: false, ..own_settings() };
        let mut world = World::with(settings);
        let mut made = service("ns", "s", &[], &[("p", 80, 30_002)]);
        made.cluster_ips = Family::ALL.map(|f| at_cluster(f, 1).parse().unwrap()).into();
        world.put(made, &["b"]);
        world.apply();
        for (from, to, reached) in [
            ("client", NODE[0], true),
            ("client", NODE[3], true),
            ("a", NODE[0], true),
            ("a", NODE[1], false),
            ("a", NODE[4], false),
            ("node", NODE[0], true),
            ("node", NODE[1], false),
            ("node", "127.0.0.1", false),
        ] {
            let got = real(from, socket(to, 30_002), Protocol::Tcp);
            assert_eq!(matches!(got, Fate::Sent { .. }), reached, "{from} -> {to}: {got:?}");
        }
    };
    std::thread::spawn(test).join().unwrap();
}

/// Pods told by their links instead of their addresses, and everything masqueraded: other rules, the same service.
#[test]
fn other_settings_change_who_is_masqueraded() {
    let test = || {
        build();
        let to = socket(&at_cluster(Family::V4, 1), 80);
        let by_link = Settings { pod_links: Some("br*".into()), ..own_settings() };
        let all = Settings { masquerade_all: true, masquerade_bit: 5, ..own_settings() };
        let of_node = Settings { cluster_cidrs: vec!["10.244.0.0/24".parse().unwrap()], ..own_settings() };
        let settings = [(own_settings(), false), (by_link, false), (of_node, false), (all, true)];
        for (settings, pods_masqueraded) in settings {
            let mut world = World::with(settings.clone());
            let mut made = service("ns", "s", &[], &[("p", 80, 0)]);
            made.cluster_ips = Family::ALL.map(|f| at_cluster(f, 1).parse().unwrap()).into();
            world.put(made, &["b"]);
            world.apply();
            for (from, masqueraded) in [("a", pods_masqueraded), ("client", true)] {
                let Fate::Sent { masqueraded: got, .. } = real(from, to, Protocol::Tcp) else { panic!("{from}") };
                assert_eq!(got, masqueraded, "{from} with {settings:?}");
            }
        }
    };
    std::thread::spawn(test).join().unwrap();
}

/// Chains for many endpoints are loaded when first needed: they must be as good as the first ones, for UDP as well.
#[test]
fn many_endpoints_are_all_reached() {
    let test = || {
        let mut world = World::new();
        let mut ports = Vec::new();
        let udp_server = |n: u16| at("a", || UdpSocket::bind((pod("a", Family::V4), 9000 + n)).unwrap());
        let mut made = service("ns", "many", &["10.96.0.9"], &[("p", 80, 0)]);
        made.ports[0].protocol = Protocol::Udp;
        let mut wide = Vec::new();
        for n in 0..40 {
            ports.push(udp_server(n));
            let mut part = members(&made.name, &["a"], Protocol::Udp, Family::V4);
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
    std::thread::spawn(|| stickiness(Family::V4)).join().unwrap();
}

#[test]
fn ipv6_clients_stick_as_well() {
    std::thread::spawn(|| stickiness(Family::V6)).join().unwrap();
}

fn stickiness(family: Family) {
    {
        let mut world = World::new();
        let mut sticky = service("ns", "sticky", &[&at_cluster(family, 9)], &[("p", 80, 30_009)]);
        // A chain of its own: loaded when it is first needed.
        sticky.affinity = Some(600);
        let members = |name: &ServiceName, list: &[&str], protocol| members(name, list, protocol, family);
        let known = || {
            let list = ["list", "map", family.nft(), "isopod-test", "affinity"];
            let text = String::from_utf8(Command::new("nft").args(list).output().unwrap().stdout).unwrap();
            assert!(text.contains(CLIENT[family.index()]), "{text}");
        };
        let name = sticky.name.clone();
        world.put(sticky.clone(), &["a", "b", "c"]);
        world.apply();
        for to in [socket(&at_cluster(family, 9), 80), socket(NODE[3 * family.index()], 30_009)] {
            world.shadow.set_slice(members(&name, &["a", "b", "c"], Protocol::Tcp));
            world.apply();
            let ask = || {
                let seen: BTreeSet<String> = at("client", || {
                    (0..20)
                        .map(|_| tcp(to))
                        .map(|s| if let Seen::Answer(n, _) = s { n } else { panic!("{s:?}") })
                        .collect()
                });
                assert_eq!(seen.len(), 1, "{to}: {seen:?}");
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
        known();
        let mut again = Kernel::open(own_settings(), None).unwrap();
        again.reconcile(&|emit| world.shadow.elements(emit)).unwrap();
        known();
        // No affinity any more: spread again.
        sticky.affinity = None;
        world.put(sticky, &["a", "b", "c"]);
        world.apply();
        let to = socket(&at_cluster(family, 9), 80);
        let seen: BTreeSet<Seen> = at("client", || (0..40).map(|_| tcp(to)).collect());
        assert_eq!(seen.len(), 3, "{seen:?}");
    }
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
        let members = |name: &ServiceName, list: &[&str], protocol| members(name, list, protocol, Family::V4);
        world.shadow.set_slice(members(&name, &["a", "b"], Protocol::Udp));
        world.apply();
        assert_eq!(who(udp(&socket, to)), "a", "a flow to a live endpoint stays");
        let mut leaving = members(&name, &["a", "b"], Protocol::Udp);
        leaving.endpoints.edit(|n, e| (e.ready, e.terminating) = (n > 0, n == 0));
        world.shadow.set_slice(leaving);
        world.apply();
        assert_eq!(who(udp(&socket, to)), "a", "and to one that leaves, as long as it serves");
        let other = at("client", || UdpSocket::bind("0.0.0.0:0").unwrap());
        assert_eq!(who(udp(&other, to)), "b", "new ones do not");
        world.shadow.set_slice(members(&name, &["b"], Protocol::Udp));
        world.apply();
        assert_eq!(who(udp(&socket, to)), "b", "a flow to a dead endpoint moves");
    };
    std::thread::spawn(test).join().unwrap();
}

/// The flows of a host port: a client that goes on asking follows it to its next pod, and away from the time before.
#[test]
fn udp_flows_of_host_ports_follow_their_pods() {
    let test = || {
        build();
        let family = Family::V4;
        let nft = |text: &str| assert!(Command::new("nft").arg(text).status().unwrap().success(), "{text}");
        nft("add table ip hp; add chain ip hp pre { type nat hook prerouting priority -101; }");
        let lead_to = |name: &str| {
            nft(&format!(
                "flush chain ip hp pre; add rule ip hp pre udp dport 9000 dnat to {}:8080",
                pod(name, family)
            ));
        };
        let socket = at("client", || UdpSocket::bind("0.0.0.0:0").unwrap());
        let to: SocketAddr = "192.0.2.1:9000".parse().unwrap();
        let who = || match udp(&socket, to) {
            Seen::Answer(name, _) => name,
            other => format!("{other:?}"),
        };
        let address = |name| pod(name, family).parse::<IpAddr>().unwrap();
        // The kernel tracks nothing before there is a rule that needs it.
        nft("add rule ip hp pre udp dport 9001 dnat to 10.244.0.2:8080");
        assert_eq!(who(), "Refused", "nobody has the port");
        lead_to("a");
        assert_eq!(who(), "Refused", "the kernel goes on as it began");
        assert_eq!(crate::forget_host_ports(&[address("a")], &[9000]).unwrap(), 1);
        assert_eq!(who(), "a");
        lead_to("b");
        assert_eq!(who(), "a", "the kernel goes on as it began");
        assert_eq!(crate::forget_host_ports(&[address("b")], &[9000]).unwrap(), 0, "another pod's flow");
        assert_eq!(crate::forget_host_ports(&[address("a")], &[9000]).unwrap(), 1);
        assert_eq!(who(), "b");
    };
    std::thread::spawn(test).join().unwrap();
}

/// A counter of the namespace the calling thread is in, from a file with a line of names and a line of values, or several.
fn counter(file: &str, name: &str, radix: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
    let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
    let (names, column) = lines.iter().find_map(|l| Some((l, l.iter().position(|n| *n == name)?))).unwrap();
    // Of files with several tables, only lines of the same one.
    let same = |l: &&Vec<&str>| l.len() == names.len() && (radix == 16 || l[0] == names[0]);
    lines.iter().filter(same).filter_map(|l| u64::from_str_radix(l[column], radix).ok()).sum()
}

/// A first packet that has to be sent again costs a second. Our rules lose none: each that is repeated is one that the
/// kernel's connection tracking (two at once wanted the same translated port) or a listener's full backlog threw away.
#[test]
fn no_first_packet_is_lost_in_the_rules() {
    let test = || {
        let mut world = World::new();
        world.put(service("ns", "s", &[&at_cluster(Family::V4, 1)], &[("p", 80, 30_001)]), &["a", "b", "c"]);
        world.apply();
        let thrown = || {
            let node = ["insert_failed", "drop", "early_drop"].map(|n| counter("stat/nf_conntrack", n, 16));
            let pods = PODS.map(|(pod, _)| at(pod, || counter("netstat", "ListenDrops", 10)));
            (node, pods)
        };
        let repeated = |place| at(place, || counter("netstat", "TCPSynRetrans", 10));
        let (before, mut connections) = (thrown(), 0);
        for (place, to) in [("client", socket(NODE[0], 30_001)), ("a", socket(&at_cluster(Family::V4, 1), 80))] {
            // Few enough that translated ports are not those of connections just ended: see docs/ARCHITECTURE.md.
            let count = || {
                for _ in 0..1000 {
                    TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap();
                }
                1000
            };
            connections += at(place, || {
                std::thread::scope(|scope| {
                    let threads: Vec<_> = (0..4).map(|_| scope.spawn(count)).collect();
                    threads.into_iter().map(|t| t.join().unwrap()).sum::<usize>()
                })
            });
        }
        let (after, repeated) = (thrown(), repeated("client") + repeated("a"));
        println!("{connections} connections, {repeated} first packets repeated; thrown away {before:?} -> {after:?}");
        let sum = |(node, pods): ([u64; 3], [u64; 3])| node.iter().chain(&pods).sum::<u64>();
        assert!(connections == 8000 && repeated <= sum(after) - sum(before), "{repeated}: {before:?} -> {after:?}");
    };
    std::thread::spawn(test).join().unwrap();
}
