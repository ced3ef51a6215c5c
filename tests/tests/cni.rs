//! Pods on a network that CNI plugins make.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use isopod_tests::{Cluster, Net, eventually};

/// Debian's bridge and host-local plugins, found where Debian has them.
const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "lab", "plugins": [
    {"type": "bridge", "bridge": "lab0", "isGateway": true, "ipam": {"type": "host-local", "dataDir": "/run/leases",
     "ranges": [[{"subnet": "10.244.77.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "bandwidth", "capabilities": {"bandwidth": true}}]}"#;

#[test]
fn plugins_make_the_network_of_pods() {
    let mut net = Net::new();
    let host = net.host("one");
    let file = host.path("/etc/cni/net.d/10-lab.conflist");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, LIST).unwrap();
    let mut c = Cluster::start(&host);
    c.k("run web --image=web:1 --port=8080");
    c.k("expose pod web --port=80 --target-port=8080");
    c.wait_ready("web");
    let ip = |pod: &str| c.get(&format!("pod {pod}"))["status"]["podIP"].as_str().unwrap_or_default().to_owned();
    let web = ip("web");
    assert!(web.starts_with("10.244.77."), "{web}");
    assert!(c.host.must("ip -br link show master lab0").contains("veth"));
    // Through the service, by its name: the proxy and DNS do not mind who made the network.
    c.k("run client --image=busybox:1 -- sleep 100000");
    c.wait_ready("client");
    let answer = c.k("exec client -- wget -q -O- http://web/");
    assert!(answer.starts_with("web"), "{answer}");
    // A new agent knows the pods; what is deleted afterwards gives its address back.
    c.kill_agent();
    c.up();
    assert_eq!(c.get("pod web")["status"]["podIP"], web.as_str());
    c.k("delete pod web --now --wait=true");
    eventually("the address is given back", || {
        let leases = c.host.must("ls /run/leases/lab");
        if leases.contains(&web) { Err(leases) } else { Ok(()) }
    });
    // A plugin that is not there: said in the pod's events.
    std::fs::write(&file, LIST.replace("bandwidth\", \"cap", "nonsense\", \"cap")).unwrap();
    c.k("run late --image=busybox:1 -- sleep 100000");
    eventually("the event says why", || {
        let events = c.k("get events --field-selector involvedObject.name=late -o jsonpath={.items[*].message}");
        let wanted = "plugin type=\"nonsense\" name=\"lab\" failed (add): failed to find plugin \"nonsense\" in path";
        if events.contains(wanted) { Ok(()) } else { Err(events) }
    });
    std::fs::write(&file, LIST).unwrap();
    c.wait_ready("late");
}
