//! Bad input: one clear error each, and nothing left behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use isopod_tests::{Cluster, Net, eventually, host::binaries};

#[test]
fn a_machine_that_cannot_run_says_why() {
    let mut net = Net::new();
    let host = net.host("one");
    let isopod = binaries().join("isopod").to_str().unwrap().to_owned();
    let up = |options: &[&str]| {
        let mut args = vec!["up"];
        args.extend(options);
        host.run(&isopod, &args)
    };
    let one_line = |text: &str| text.lines().filter(|line| line.starts_with("isopod: ")).count() == 1;
    let mut listener = host.command("sh").args(["-c", "exec busybox nc -l -p 6443"]).spawn().unwrap();
    eventually("the port is taken", || host.sh("ss -ltn | grep -q :6443").ok());
    let ran = up(&[]);
    assert!(
        ran.code == 1 && ran.err.contains("port 6443") && ran.err.contains("--api-port") && one_line(&ran.err),
        "{ran:?}"
    );
    listener.kill().unwrap();
    listener.wait().unwrap();
    host.sh("pkill -x busybox");
    let ran = host.sh(&format!("mkdir -p /run/empty; PATH=/run/empty {isopod} up --nonsense"));
    assert!(ran.code == 64 && ran.err.contains("--nonsense") && one_line(&ran.err), "{ran:?}");
    let ran = host.sh(&format!("mount -t tmpfs none /usr/sbin; {isopod} up; e=$?; umount /usr/sbin; exit $e"));
    assert!(ran.code == 1 && ran.err.contains("apt-get install nftables"), "{ran:?}");
    let ran = host.sh(&format!("mount -t tmpfs -o ro none /var/lib/; {isopod} up; e=$?; umount /var/lib; exit $e"));
    assert!(ran.code == 1 && ran.err.contains("/var/lib/isopod is not writable"), "{ran:?}");
    fs::create_dir_all(host.path("/etc/isopod")).unwrap();
    fs::write(host.path("/etc/isopod/cluster.yaml"), "nodeName: on").unwrap();
    let ran = up(&[]);
    assert!(ran.code == 64 && ran.err.contains("cluster.yaml") && one_line(&ran.err), "{ran:?}");
    fs::remove_file(host.path("/etc/isopod/cluster.yaml")).unwrap();
    fs::write(
        host.path("/etc/isopod/config.yaml"),
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nnonsense: 1\n",
    )
    .unwrap();
    let ran = up(&[]);
    assert!(ran.code == 64 && ran.err.contains("config.yaml") && ran.err.contains("nonsense"), "{ran:?}");
    for left in ["pki", "cluster.yaml", "admin.conf", "manifests"] {
        assert!(!host.path(&format!("/etc/isopod/{left}")).exists(), "{left} was made all the same");
    }
    assert_eq!(host.sh("pgrep isopod").code, 1);
}

#[test]
fn a_running_node_names_what_is_wrong() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    let ran = c.isopod(&["up"]);
    assert!(ran.code == 1 && ran.err.contains("another isopod (PID "), "{ran:?}");
    fs::write(c.host.path("/etc/isopod/manifests/bad.yaml"), "apiVersion: v1\nkind: Pod\nmetadata: [\n").unwrap();
    fs::write(
        c.host.path("/etc/isopod/manifests/unknown.yaml"),
        "apiVersion: v1\nkind: Pod\nmetadata: {name: u}\nspec: {nonsense: 1, containers: [{name: c, image: 'busybox:1'}]}\n",
    )
    .unwrap();
    let log = c.host.path("/var/log/isopod/agent.log");
    for file in ["bad.yaml", "unknown.yaml"] {
        eventually(&format!("{file} is named"), || {
            let text = fs::read_to_string(&log).unwrap();
            if text.lines().any(|line| line.contains(file)) { Ok(()) } else { Err(text.len()) }
        });
    }
    c.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: noimage}\nspec: {containers: [{name: c, image: 'none:1', imagePullPolicy: Never}]}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: nocommand}\nspec: {containers: [{name: c, image: 'busybox:1', command: [nothing-there]}]}\n",
    );
    c.wait_field("pod noimage", ".status.containerStatuses[0].state.waiting.reason", |r| r == "ErrImageNeverPull");
    eventually("the missing command is named", || {
        let events = c.k("get events --field-selector involvedObject.name=nocommand");
        if events.contains("nothing-there") && events.contains("not found") { Ok(()) } else { Err(events) }
    });
    c.k("delete pod noimage nocommand --timeout=30s");
    // A state file cut in half by a crash does not keep the node from starting.
    c.kill_agent();
    c.host.must("echo '{\"images\":{' > /var/lib/isopod/image-store/index.json");
    // Nor does another boot, which is told.
    c.k(r#"patch node one --subresource=status -p '{"status":{"nodeInfo":{"bootID":"another"}}}'"#);
    c.up();
    eventually("Rebooted", || {
        let events = c.k("get events --field-selector reason=Rebooted");
        if events.contains("Node one has been rebooted") { Ok(()) } else { Err(events) }
    });
    c.k("run p --image=busybox:1 -- sleep 100000");
    c.wait_ready("p");
}
