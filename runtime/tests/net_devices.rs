//! `linux.netDevices`, from a network namespace that stands in for the host's.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::process::Output;

use common::{Bundle, possible, text};
use serde_json::json;

/// Makes a veth `v0` with addresses and a peer `v1`, both in a namespace of their own, and goes on there.
const SETUP: &str = "set -e
ip link set lo up
ip link add v0 type veth peer name v1
ip link set v0 mtu 1400 alias wired
ip address add 10.9.8.7/24 broadcast 10.9.8.255 dev v0
ip address add 10.9.8.8/24 dev v0
ip address add 169.254.3.3/16 scope link dev v0
ip address add fd00:9::7/64 dev v0 nodad
ip address add 10.9.8.9/24 dev v0 valid_lft 1000 preferred_lft 1000
ip link set v0 up
ip link set v1 up
";

/// Runs a script beside the devices.
fn beside(bundle: &Bundle, script: &str) -> Output {
    bundle.apart(&["--net", "--mount"], &format!("{SETUP}{script}"))
}

#[test]
fn a_device_moves_with_its_name_addresses_and_state() {
    if !possible() {
        return;
    }
    let show = "busybox ip -o address show dev $0; cat /sys/class/net/$0/mtu /sys/class/net/$0/flags /sys/class/net/$0/ifalias";
    for (name, inside) in [(json!({}), "v0"), (json!({"name": "eth9"}), "eth9"), (json!({"name": "net%d"}), "net0")] {
        let mut bundle = Bundle::new(&["sh", "-c", show, inside]);
        bundle.config["linux"]["netDevices"] = json!({ "v0": name });
        // Its namespace's own sysctls are set after it has come.
        bundle.config["linux"]["sysctl"] = json!({"net.ipv4.conf.all.arp_filter": "1"});
        let output = beside(&bundle, "$RUN; ip link show v0 2>&1 || true");
        let out = text(&output.stdout);
        assert!(output.status.success(), "{}", text(&output.stderr));
        for words in
            ["inet 10.9.8.7/24 brd 10.9.8.255", "inet 10.9.8.8/24", "inet6 fd00:9::7/64", "\n1400\n0x1", "wired"]
        {
            assert!(out.contains(words), "{words:?} is not in {out}");
        }
        for words in ["169.254.3.3", "10.9.8.9/"] {
            assert!(!out.contains(words), "{words:?} is in {out}");
        }
        assert!(out.contains("Device \"v0\" does not exist"), "{out}");
    }
}

#[test]
fn users_of_its_own_make_no_difference() {
    if !possible() {
        return;
    }
    let mut bundle = Bundle::new(&["busybox", "ip", "-o", "address", "show", "dev", "v0"]);
    bundle.config["linux"]["netDevices"] = json!({"v0": {}});
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    for map in ["uidMappings", "gidMappings"] {
        bundle.config["linux"][map] = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
    }
    let output = beside(&bundle, "$RUN");
    assert!(text(&output.stdout).contains("inet 10.9.8.7/24"), "{}", text(&output.stderr));
}

#[test]
fn it_stays_in_the_namespace_it_was_moved_to() {
    if !possible() {
        return;
    }
    let mut bundle = Bundle::new(&["sleep", "1000"]);
    bundle.config["linux"]["netDevices"] = json!({"v0": {"name": "eth9"}});
    let spaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
    spaces.retain(|n| n["type"] != "network");
    spaces.push(json!({"type": "network", "path": bundle.dir.path().join("net")}));
    let script = "touch $DIR/net; unshare --net=$DIR/net true; $CREATE <&- >$DIR/err 2>&1 || cat $DIR/err; $DELETE
                  nsenter --net=$DIR/net ip -o address show dev eth9; umount $DIR/net";
    let output = beside(&bundle, script);
    assert!(text(&output.stdout).contains("inet 10.9.8.7/24"), "{} {}", text(&output.stdout), text(&output.stderr));
}

#[test]
fn what_cannot_move_is_an_error_and_stays() {
    if !possible() {
        return;
    }
    let cases = [
        (json!({"nosuch": {}}), "linux.netDevices: the host has no device nosuch"),
        (
            json!({"v0": {"name": "lo"}}),
            "linux.netDevices v0: the container's network namespace has a device lo already",
        ),
        (json!({"v0": {}, "v1": {"name": "lo"}}), "has a device lo already"),
        (json!({"lo": {"name": "x0"}}), "linux.netDevices: move lo into the container as x0: invalid argument"),
        (json!({"v0": {"name": "much-too-long-a-name"}}), "is no name of a network device"),
    ];
    for (devices, words) in cases {
        let mut bundle = Bundle::new(&["true"]);
        bundle.config["linux"]["netDevices"] = devices;
        let output = beside(&bundle, "$RUN || ip -o address show dev v0");
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(err.contains(words), "{words:?} is not in {err}");
        assert!(out.contains("inet 10.9.8.7/24"), "{out}");
        assert!(bundle.cgroups().is_empty());
    }
}
