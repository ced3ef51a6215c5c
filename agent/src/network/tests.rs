//! The pod network in network namespaces of the tests' own: real links, real packets, no way out.

use std::{
    collections::HashSet,
    future::Future,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use super::{bridge::*, *};
use crate::Paths;

/// Runs a future on a thread with a network and a mount namespace of its own.
pub(super) fn alone<F: Future<Output = ()>>(body: impl FnOnce(PathBuf) -> F + Send + 'static) {
    let thread = std::thread::spawn(|| {
        use nix::{mount::MsFlags, sched::CloneFlags};
        nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .expect("tests of the network need root");
        nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .unwrap();
        run("ip link set lo up");
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body(dir.path().into()));
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

pub(super) fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a closure inside a pinned namespace, on a thread of its own.
pub(super) fn inside<T: Send>(netns: &Path, body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let ns = std::fs::File::open(netns).unwrap();
            nix::sched::setns(&ns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            body()
        });
        thread.join().unwrap()
    })
}

pub(super) fn request(uid: &str) -> PodNetworkRequest {
    PodNetworkRequest {
        uid: uid.into(),
        namespace: "default".into(),
        name: format!("pod-{uid}"),
        host_ports: Vec::new(),
        bandwidth: Bandwidth::default(),
    }
}

/// A server in a pod that answers one connection per expected client with the client's address.
fn serve(status: &PodNetworkStatus, port: u16, clients: usize) -> std::thread::JoinHandle<()> {
    let address = SocketAddr::new(status.ips[0], port);
    let listener = inside(&status.netns, || TcpListener::bind(address).unwrap());
    std::thread::spawn(move || {
        for _ in 0..clients {
            let (mut stream, from) = listener.accept().unwrap();
            stream.write_all(from.ip().to_string().as_bytes()).unwrap();
        }
    })
}

fn ask(to: &str) -> Result<IpAddr, std::io::Error> {
    let mut stream = TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(3))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.parse().unwrap())
}

async fn started(root: &Path) -> BridgeNetwork {
    let network = BridgeNetwork::start(NetworkConfig::new(Paths::new(root))).await.unwrap();
    network.set_pod_cidr(vec!["10.244.3.0/24".parse().unwrap()]);
    let begun = Instant::now();
    while let Some(why) = network.not_ready() {
        assert!(begun.elapsed() < Duration::from_secs(5), "{why}");
        tokio::task::yield_now().await;
    }
    network
}

/// Waits until the pool is full, as it is between the starts of pods on an idle node.
async fn idle(network: &BridgeNetwork) {
    let begun = Instant::now();
    while !network.is_idle() {
        assert!(begun.elapsed() < Duration::from_secs(5), "the pool does not fill");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn links() -> HashSet<String> {
    run("ip -o link").lines().filter_map(|l| Some(l.split(": ").nth(1)?.split('@').next()?.to_owned())).collect()
}

#[test]
fn pods_reach_each_other_and_the_node() {
    alone(|root| async move {
        let network = started(&root).await;
        let (a, b) = (network.setup(request("a")).await.unwrap(), network.setup(request("b")).await.unwrap());
        assert_ne!(a.ips, b.ips);
        let server = serve(&b, 8080, 2);
        let target = format!("{}:8080", b.ips[0]);
        assert_eq!(inside(&a.netns, || ask(&target)).unwrap(), a.ips[0]);
        assert_eq!(ask(&target).unwrap(), "10.244.3.1".parse::<IpAddr>().unwrap());
        server.join().unwrap();
        // Service addresses lead somewhere even though there is no default route.
        assert!(run("ip route get 10.96.0.1").contains("10.244.3.1"));
        // The same again: nothing new.
        assert_eq!(network.setup(request("a")).await.unwrap(), a);
    });
}

#[test]
fn pods_that_are_gone_refuse_at_once() {
    alone(|root| async move {
        let network = BridgeNetwork::start(NetworkConfig::new(Paths::new(&root))).await.unwrap();
        // So few addresses that they are soon given out again.
        network.set_pod_cidr(vec!["10.244.3.0/28".parse().unwrap()]);
        while network.not_ready().is_some() {
            tokio::task::yield_now().await;
        }
        let (client, web) =
            (network.setup(request("client")).await.unwrap(), network.setup(request("w")).await.unwrap());
        let target = SocketAddr::new(web.ips[0], 8080);
        // Whoever knew the pod keeps its hardware address for a while: without a refusal packets go nowhere.
        let server = serve(&web, 8080, 2);
        inside(&client.netns, || ask(&target.to_string())).unwrap();
        ask(&target.to_string()).unwrap();
        server.join().unwrap();
        network.teardown("w").await.unwrap();
        let try_it = || TcpStream::connect_timeout(&target, Duration::from_millis(900)).unwrap_err().kind();
        assert_eq!(inside(&client.netns, try_it), std::io::ErrorKind::ConnectionRefused);
        assert_eq!(try_it(), std::io::ErrorKind::ConnectionRefused);
        let mut reused = false;
        for n in 0..30 {
            let uid = format!("p{n}");
            let pod = network.setup(request(&uid)).await.unwrap();
            reused |= pod.ips == web.ips;
            let server = serve(&pod, 80, 1);
            inside(&client.netns, || ask(&format!("{}:80", pod.ips[0]))).unwrap();
            server.join().unwrap();
            network.teardown(&uid).await.unwrap();
        }
        assert!(reused, "the address was never given out again");
    });
}

#[test]
fn packets_are_as_large_as_those_of_the_node() {
    alone(|root| async move {
        run("ip link add node0 mtu 1400 type veth peer name node1 mtu 1400");
        run("ip addr add 192.0.2.1/24 dev node0");
        run("ip link set node0 up");
        let at = |n: u8| NetworkConfig {
            node_ip: Some(IpAddr::from([192, 0, 2, n])),
            ..NetworkConfig::new(Paths::new(root.join(n.to_string())))
        };
        for (n, mtu) in [(1, "mtu 1400"), (2, "mtu 1500")] {
            let network = BridgeNetwork::start(at(n)).await.unwrap();
            network.set_pod_cidr(vec!["10.244.3.0/24".parse().unwrap()]);
            while network.not_ready().is_some() {
                tokio::task::yield_now().await;
            }
            let pod = network.setup(request("a")).await.unwrap();
            let link = inside(&pod.netns, || run("ip link show dev eth0"));
            assert!(link.contains(mtu), "{n}: {link}");
        }
    });
}

#[test]
fn bandwidth_is_limited_both_ways() {
    alone(|root| async move {
        let network = started(&root).await;
        let client = network.setup(request("client")).await.unwrap();
        // How long a megabyte takes from one to the other.
        let transfer = |from: &PodNetworkStatus, to: &PodNetworkStatus| {
            let address = SocketAddr::new(to.ips[0], 9000);
            let listener = inside(&to.netns, || TcpListener::bind(address).unwrap());
            let reader = std::thread::spawn(move || {
                let mut bytes = Vec::new();
                listener.accept().unwrap().0.read_to_end(&mut bytes).unwrap();
                assert_eq!(bytes.len(), 1 << 20);
            });
            let begun = Instant::now();
            inside(&from.netns, || TcpStream::connect(address).unwrap().write_all(&vec![0; 1 << 20]).unwrap());
            reader.join().unwrap();
            begun.elapsed()
        };
        // Eight megabits per second: a megabyte in about a second, less what the bucket holds at first.
        let limited =
            |uid: &str, ingress, egress| PodNetworkRequest { bandwidth: Bandwidth { ingress, egress }, ..request(uid) };
        let inward = network.setup(limited("in", Some(8_000_000), None)).await.unwrap();
        let outward = network.setup(limited("out", None, Some(8_000_000))).await.unwrap();
        let slow = Duration::from_millis(700);
        assert!(transfer(&client, &inward) > slow, "to the pod");
        assert!(transfer(&inward, &client) < slow, "from the pod it is not limited");
        assert!(transfer(&outward, &client) > slow, "from the pod");
        assert!(transfer(&client, &outward) < slow, "to the pod it is not limited");
    });
}

#[test]
fn host_ports_work_from_everywhere() {
    alone(|root| async move {
        run("ip link add node0 type veth peer name node1");
        run("ip addr add 192.0.2.1/24 dev node0");
        run("ip link set node0 up");
        let network = started(&root).await;
        let mut wanted = request("web");
        wanted.host_ports =
            vec![HostPort { host_ip: None, host_port: 8000, container_port: 80, protocol: Protocol::Tcp }];
        let web = network.setup(wanted).await.unwrap();
        let client = network.setup(request("client")).await.unwrap();
        let server = serve(&web, 80, 4);
        assert_eq!(ask("127.0.0.1:8000").unwrap(), "10.244.3.1".parse::<IpAddr>().unwrap());
        ask("192.0.2.1:8000").unwrap();
        assert_eq!(inside(&client.netns, || ask("192.0.2.1:8000")).unwrap(), client.ips[0]);
        // Itself, through the node.
        inside(&web.netns, || ask("192.0.2.1:8000")).unwrap();
        server.join().unwrap();
        // Somebody flushes everything: a moment later all is there again.
        run("nft flush ruleset");
        let server = serve(&web, 80, 1);
        let begun = Instant::now();
        while ask("192.0.2.1:8000").is_err() {
            assert!(begun.elapsed() < Duration::from_secs(5), "host ports do not come back");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server.join().unwrap();
        network.teardown("web").await.unwrap();
        assert!(ask("192.0.2.1:8000").is_err());
        // The node's own loopback services are no pod's business.
        let _loopback = TcpListener::bind("127.0.0.1:9000").unwrap();
        let sneak = inside(&client.netns, || {
            run("ip route add 127.0.0.5/32 via 10.244.3.1 dev eth0 table local");
            TcpStream::connect_timeout(&"127.0.0.5:9000".parse().unwrap(), Duration::from_millis(200)).is_ok()
        });
        assert!(!sneak);
    });
}

/// Docker and ufw drop what they do not know, by iptables: pods get through all the same, also after a reload, to each other and
/// to what they need of their node, and to nothing else there; and nothing of ours is left in the end.
#[test]
fn pods_pass_other_peoples_firewalls() {
    alone(|root| async move {
        let chains = ["FORWARD", "INPUT"];
        run("iptables -N DOCKER-USER");
        run("iptables -A FORWARD -j DOCKER-USER");
        run("iptables -A INPUT -i lo -j ACCEPT");
        chains.iter().for_each(|chain| drop(run(&format!("iptables -P {chain} DROP"))));
        let before = run("iptables -S");
        let network = started(&root).await;
        let (a, b) = (network.setup(request("a")).await.unwrap(), network.setup(request("b")).await.unwrap());
        let target = SocketAddr::new(b.ips[0], 8080);
        let [node, service, dns] =
            ["10.244.3.1:9000", "10.96.0.1:443", "10.96.0.10:53"].map(|a| a.parse::<SocketAddr>().unwrap());
        // What the service proxy does: translate to the API server of this node, answer DNS.
        run(
            "nft add table ip t { chain c { type nat hook prerouting priority -100; ip daddr 10.96.0.1 tcp dport 443 dnat to 10.244.3.1:9000; }; }",
        );
        run("ip addr add 10.96.0.10/32 dev lo");
        let _pod = inside(&b.netns, || TcpListener::bind(target).unwrap());
        let _servers = [node, dns].map(|at| TcpListener::bind(at).unwrap());
        let reach = |to| inside(&a.netns, || TcpStream::connect_timeout(&to, Duration::from_millis(100)).is_ok());
        let all = || {
            reach(target)
                && reach(service)
                && reach(dns)
                && TcpStream::connect_timeout(&target, Duration::from_millis(100)).is_ok()
        };
        for reload in ["iptables -S", "iptables -F", "iptables -P FORWARD DROP"] {
            run(reload);
            let begun = Instant::now();
            while !all() {
                assert!(begun.elapsed() < Duration::from_secs(5), "{reload}: {}", run("iptables -S"));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert!(run("iptables -S").matches("isopod-").count() == 5, "{reload}: {}", run("iptables -S"));
            assert!(!reach(node), "{reload}: nobody said that pods may reach this: {}", run("iptables -S"));
        }
        // What has become open since is left as well.
        chains.iter().for_each(|chain| drop(run(&format!("iptables -P {chain} ACCEPT"))));
        run("iptables -A FORWARD -j DOCKER-USER");
        run("iptables -A INPUT -i lo -j ACCEPT");
        drop(network);
        BridgeNetwork::cleanup_all(&NetworkConfig::new(Paths::new(&root))).await.unwrap();
        assert_eq!(run("iptables -S"), before.replace("DROP", "ACCEPT"));
    });
}

/// The kernel is slower when anybody listens: while much is loaded nobody does, and what happened meanwhile is seen afterwards.
#[test]
fn nobody_listens_while_much_is_loaded() {
    alone(|root| async move {
        let loading = tokio::sync::watch::Sender::new(false);
        let config = NetworkConfig { loading: loading.subscribe(), ..NetworkConfig::new(Paths::new(&root)) };
        let network = BridgeNetwork::start(config).await.unwrap();
        network.set_pod_cidr(vec!["10.244.3.0/24".parse().unwrap()]);
        // Netfilter's sockets in the group of nftables' news, by the kernel's own list.
        let listeners = || {
            let text = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
            let listens = |line: &&str| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                fields[1] == "12" && u32::from_str_radix(fields[3], 16).unwrap() & 1 << 6 != 0
            };
            text.lines().skip(1).filter(listens).count()
        };
        let until = async |what: &str, there: &dyn Fn() -> bool| {
            let begun = Instant::now();
            while !there() {
                assert!(begun.elapsed() < Duration::from_secs(5), "{what}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let tables = || run("nft list tables");
        until("the table is there", &|| tables().contains("hostports") && listeners() == 1).await;
        loading.send_replace(true);
        until("nobody listens", &|| listeners() == 0).await;
        run("nft flush ruleset");
        loading.send_replace(false);
        until("the table is back", &|| tables().contains("hostports") && listeners() == 1).await;
    });
}

#[test]
fn a_new_process_takes_over_and_removes_strays() {
    alone(|root| async move {
        let (kept, gone) = {
            let network = started(&root).await;
            let pods = (network.setup(request("kept")).await.unwrap(), network.setup(request("gone")).await.unwrap());
            // A process that ends makes no more namespaces; this one would go on under the same names.
            idle(&network).await;
            pods
        };
        let network = BridgeNetwork::start(NetworkConfig::new(Paths::new(&root))).await.unwrap();
        assert_eq!(network.not_ready(), None, "ranges are remembered");
        network.reconcile(&["kept".into()]).await.unwrap();
        assert!(!gone.netns.exists());
        assert_eq!(network.setup(request("kept")).await.unwrap(), kept);
        let mut seen = HashSet::from([kept.ips[0]]);
        for n in 0..12 {
            let status = network.setup(request(&format!("p{n}"))).await.unwrap();
            assert!(seen.insert(status.ips[0]), "{status:?} has an address twice");
        }
        // Its namespace vanished, as by a reboot: the pod gets a whole new network.
        nix::mount::umount2(&kept.netns, nix::mount::MntFlags::MNT_DETACH).unwrap();
        let again = network.setup(request("kept")).await.unwrap();
        let seen = inside(&again.netns, || run("ip -4 -o addr show dev eth0"));
        assert!(seen.contains(&again.ips[0].to_string()), "{seen}");
    });
}

#[test]
fn cleaning_up_leaves_nothing() {
    alone(|root| async move {
        let before = (links(), run("nft list ruleset"), run("ip route"));
        let config = NetworkConfig::new(Paths::new(&root));
        {
            let network = started(&root).await;
            for n in 0..6 {
                network.setup(request(&format!("p{n}"))).await.unwrap();
            }
            idle(&network).await;
            assert!(links().len() > before.0.len() + 6);
        }
        let begun = Instant::now();
        BridgeNetwork::cleanup_all(&config).await.unwrap();
        // The kernel takes namespaces apart in its own time.
        while links() != before.0 {
            assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", links());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!((run("nft list ruleset"), run("ip route")), (before.1, before.2));
        let mounts = std::fs::read_to_string("/proc/thread-self/mounts").unwrap();
        assert!(!mounts.contains(root.to_str().unwrap()), "{mounts}");
        BridgeNetwork::cleanup_all(&config).await.unwrap();
    });
}

/// Together the links of pods that end, and no other.
#[test]
fn many_leave_at_once() {
    alone(|root| async move {
        let network = started(&root).await;
        idle(&network).await;
        let mut pods = Vec::new();
        for n in 0..9 {
            pods.push(network.setup(request(&format!("p{n}"))).await.unwrap());
        }
        idle(&network).await;
        let before = links().len();
        let kept = pods.pop().unwrap();
        // The sixth is not there any more when its turn comes.
        let names = (0..8).map(|n| format!("p{n}")).collect::<Vec<_>>();
        let record = root.join("var/lib/isopod/network/pods/p5.json");
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
        run(&format!("ip link delete {}", record["link"].as_str().unwrap()));
        let all = futures::future::join_all(names.iter().map(|uid| network.teardown(uid))).await;
        all.into_iter().for_each(Result::unwrap);
        assert_eq!(links().len(), before - 8);
        let server = serve(&kept, 8080, 1);
        ask(&SocketAddr::new(kept.ips[0], 8080).to_string()).unwrap();
        server.join().unwrap();
        assert!(pods.iter().all(|pod| !pod.netns.exists()));
    });
}

#[test]
fn without_a_range_it_says_so() {
    alone(|root| async move {
        let network = BridgeNetwork::start(NetworkConfig::new(Paths::new(&root))).await.unwrap();
        let error = network.setup(request("a")).await.unwrap_err();
        assert_eq!(network.not_ready(), Some(error.0));
    });
}

#[test]
fn a_prepared_pod_starts_quickly() {
    alone(|root| async move {
        let network = started(&root).await;
        let mut times = Vec::new();
        for n in 0..10 {
            idle(&network).await;
            let begun = Instant::now();
            network.setup(request(&format!("p{n}"))).await.unwrap();
            times.push(begun.elapsed());
        }
        times.sort();
        println!("setup: median {:?}, worst {:?}", times[5], times[9]);
        assert!(times[5] < Duration::from_millis(20), "{times:?}");
    });
}
