//! Chains of Debian's containernetworking-plugins in network namespaces of the tests' own, and plugins that write down
//! what they are asked.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::{
    super::tests::{alone, inside, request, run},
    *,
};

fn network(root: &Path, list: &Value) -> CniNetwork {
    let dir = root.join("etc/cni/net.d");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("10-test.conflist"), list.to_string()).unwrap();
    CniNetwork::start(&Paths::new(root)).unwrap()
}

/// A plugin that writes down its environment and input, and answers as told.
fn fake(root: &Path, name: &str, script: &str) {
    let dir = root.join("opt/cni/bin");
    fs::create_dir_all(&dir).unwrap();
    let text = format!(
        "#!/bin/sh\necho \"{name} $CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_ARGS ns=$(test -e \"$CNI_NETNS\" && echo there) $(cat)\" >> {}/log\n{script}\n",
        root.display()
    );
    fs::write(dir.join(name), text).unwrap();
    fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
}

fn log(root: &Path) -> Vec<String> {
    let text = fs::read_to_string(root.join("log")).unwrap_or_default();
    let _ = fs::remove_file(root.join("log"));
    text.lines().map(str::to_owned).collect()
}

const ADDRESS: &str =
    r#"if [ $CNI_COMMAND = ADD ]; then echo '{"cniVersion":"1.1.0","ips":[{"address":"10.9.0.2/24"}]}'; fi"#;

fn two() -> Value {
    json!({"cniVersion": "1.1.0", "name": "two", "plugins": [
        {"type": "first", "x": 1}, {"type": "second", "capabilities": {"portMappings": true, "bandwidth": true}}]})
}

#[test]
fn a_chain_is_run_by_the_specification() {
    alone(|root: PathBuf| async move {
        fake(&root, "first", ADDRESS);
        fake(
            &root,
            "second",
            "[ $CNI_COMMAND != ADD ] || echo '{\"cniVersion\":\"1.1.0\",\"ips\":[{\"address\":\"10.9.0.2/24\"}],\"dns\":{}}'",
        );
        let network = network(&root, &two());
        assert_eq!(network.not_ready(), None);
        assert_eq!(log(&root).iter().map(|l| l.split(' ').nth(1).unwrap()).collect::<Vec<_>>(), ["STATUS", "STATUS"]);
        let mut pod = request("u1");
        pod.host_ports = vec![HostPort { host_ip: None, host_port: 8080, container_port: 80, protocol: Protocol::Udp }];
        pod.bandwidth.egress = Some(1_000_000);
        let status = network.setup(pod.clone()).await.unwrap();
        assert_eq!(status.ips, ["10.9.0.2".parse::<IpAddr>().unwrap()]);
        let lines = log(&root);
        let args = "K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-u1;K8S_POD_INFRA_CONTAINER_ID=u1;K8S_POD_UID=u1";
        assert!(lines[0].starts_with(&format!("first ADD u1 eth0 IgnoreUnknown=1;{args} ns=there {{")), "{}", lines[0]);
        assert!(lines[0].contains(r#""x":1"#) && !lines[0].contains("prevResult"), "{}", lines[0]);
        for part in [
            r#""prevResult":{"cniVersion":"1.1.0","ips":[{"address":"10.9.0.2/24"}]}"#,
            r#""portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"udp"}]"#,
            r#""bandwidth":{"egressRate":1000000,"egressBurst":2147483647}"#,
        ] {
            assert!(lines[1].contains(part), "{part}: {}", lines[1]);
        }
        // The administrator changes the file; a new agent checks the pod, and removes it as it was made.
        let mut other = two();
        other["name"] = json!("other");
        let again = super::tests::network(&root, &other);
        assert_eq!(again.setup(pod).await.unwrap(), status);
        let lines = log(&root);
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("first CHECK u1") && lines[0].contains(r#""dns":{}"#), "{}", lines[0]);
        again.reconcile(&["u1".to_owned()]).await.unwrap();
        let valid = r#""cni.dev/valid-attachments":[{"containerID":"u1","ifname":"eth0"}]"#;
        let lines = log(&root);
        assert!(lines.len() == 2 && lines.iter().all(|l| l.contains(" GC ") && l.contains(valid)), "{lines:?}");
        again.teardown("u1").await.unwrap();
        let lines = log(&root);
        assert!(lines[0].starts_with("second DEL u1") && lines[1].starts_with("first DEL u1"), "{lines:?}");
        assert!(lines.iter().all(|l| l.contains(r#""name":"two""#) && l.contains(r#""prevResult""#)), "{lines:?}");
        assert!(!status.netns.exists());
        again.teardown("u1").await.unwrap();
        assert!(log(&root).is_empty(), "a pod that is gone has no plugins to run");
    });
}

#[test]
fn failures_are_told_in_upstreams_words_and_leave_nothing() {
    alone(|root: PathBuf| async move {
        fake(&root, "first", ADDRESS);
        fake(
            &root,
            "second",
            r#"[ $CNI_COMMAND != ADD ] || { echo '{"code": 11, "msg": "no more", "details": "pool is dry"}'; exit 1; }"#,
        );
        let network = network(&root, &two());
        let error = network.setup(request("u1")).await.unwrap_err();
        assert_eq!(error.0, "plugin type=\"second\" name=\"two\" failed (add): no more; pool is dry");
        let commands: Vec<String> =
            log(&root).iter().map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(commands, ["first ADD", "second ADD", "second DEL", "first DEL"]);
        assert_eq!(fs::read_dir(root.join("run/isopod/netns")).unwrap().count(), 0);
        fs::remove_file(root.join("opt/cni/bin/second")).unwrap();
        let error = network.setup(request("u2")).await.unwrap_err().0;
        assert!(error.contains("failed to find plugin \"second\" in path ["), "{error}");
        // What cannot be removed stays known: it is tried again.
        fake(&root, "second", "[ $CNI_COMMAND != DEL ] || { echo broken >&2; exit 3; }");
        network.setup(request("u2")).await.expect("a plugin that was missing is there now");
        network.setup(request("u3")).await.unwrap();
        let error = network.teardown("u3").await.unwrap_err().0;
        assert!(error.contains("failed (delete): netplugin failed: broken (exit status: 3)"), "{error}");
        fake(&root, "second", "");
        let again = CniNetwork::start(&Paths::new(&root)).unwrap();
        again.reconcile(&[]).await.unwrap();
        assert_eq!(fs::read_dir(root.join("run/isopod/netns")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(root.join("var/lib/isopod/network/cni")).unwrap().count(), 0);
    });
}

/// Debian's bridge, host-local, portmap and bandwidth plugins make a network that packets pass.
#[test]
fn debians_plugins_make_a_network() {
    if !Path::new("/usr/lib/cni/bridge").exists() {
        panic!("apt-get install containernetworking-plugins");
    }
    alone(|root: PathBuf| async move {
        // host-local keeps its leases where it is told; portmap wants a place of its own.
        let list = json!({"cniVersion": "1.0.0", "name": "debian", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
             "ipam": {"type": "host-local", "dataDir": root.join("leases"), "ranges": [[{"subnet": "10.22.0.0/24"}]],
                      "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "bandwidth", "capabilities": {"bandwidth": true}}]});
        let network = network(&root, &list);
        let (one, two) = (network.setup(request("u1")).await.unwrap(), network.setup(request("u2")).await.unwrap());
        assert_ne!(one.ips, two.ips);
        let to = std::net::SocketAddr::new(two.ips[0], 80);
        let _server = inside(&two.netns, || std::net::TcpListener::bind(to).unwrap());
        inside(&one.netns, || std::net::TcpStream::connect_timeout(&to, std::time::Duration::from_secs(3)).unwrap());
        assert_eq!(network.setup(request("u1")).await.unwrap(), one, "CHECK by real plugins");
        for uid in ["u1", "u2"] {
            network.teardown(uid).await.unwrap();
        }
        let leases: Vec<_> =
            fs::read_dir(root.join("leases/debian")).unwrap().flatten().map(|e| e.file_name()).collect();
        assert!(leases.iter().all(|l| !l.to_string_lossy().starts_with("10.22")), "{leases:?}");
        assert!(!run("ip link").contains("veth"), "no link is left");
    });
}
