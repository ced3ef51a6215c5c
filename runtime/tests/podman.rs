//! Debian's podman with this runtime instead of crun: what people do with containers, through a caller that is not ours.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{fs, path::Path, process::Output};

use common::{podman::Podman, text, unified};

#[test]
fn a_container_lives_under_podman() {
    let Some(podman) = Podman::new() else { return };
    lives(&podman);
}

#[test]
fn a_container_lives_in_a_scope_of_systemds() {
    let Some(podman) = Podman::with_systemd() else { return };
    let group = podman.says(&["--cgroupns=host"], &["cat", "/proc/self/cgroup"]);
    assert!(group.contains(&format!("/{}/libpod-", podman.parent)) && group.contains(".scope"), "{group}");
    lives(&podman);
}

/// What people do with a container, from `run` to `rm`.
fn lives(podman: &Podman) {
    let volume = podman.dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "of the host").unwrap();
    let mounted = format!("--volume={}:/vol:ro", volume.display());
    podman.background(
        &[&mounted, "--memory=64m", "--cpus=0.5", "--pids-limit=50"],
        &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"],
    );
    let (memory, quota) = if unified() {
        ("memory.max", ("cpu.max", ["50000 100000", "25000 100000"]))
    } else {
        ("memory.limit_in_bytes", ("cpu.cfs_quota_us", ["50000", "25000"]))
    };
    let limits = || (podman.control("memory", memory), podman.control("cpu", quota.0));
    assert_eq!(limits(), ("67108864".into(), quota.1[0].into()));
    assert_eq!(podman.control("pids", "pids.max"), "50");
    assert_eq!(podman.ok(&["exec", "c", "cat", "/vol/file"]), "of the host");
    assert!(!podman.call(&["exec", "c", "touch", "/vol/new"]).status.success());
    let exec = podman.call(&[
        "exec",
        "-e",
        "A=b",
        "-w",
        "/tmp",
        "-u",
        "33:44",
        "c",
        "sh",
        "-c",
        "id -u; echo $A $PWD; exit 5",
    ]);
    assert_eq!((exec.status.code(), text(&exec.stdout).as_str()), (Some(5), "33\nb /tmp\n"), "{}", text(&exec.stderr));
    assert!(podman.ok(&["exec", "-t", "c", "tty"]).contains("/dev/pts/"));
    podman.ok(&["pause", "c"]);
    assert_eq!(podman.ok(&["inspect", "--format={{.State.Status}}", "c"]), "paused\n");
    podman.ok(&["unpause", "c"]);
    podman.ok(&["update", "--memory=32m", "--cpus=0.25", "c"]);
    assert_eq!(limits(), ("33554432".into(), quota.1[1].into()));
    assert!(podman.ok(&["stats", "--no-stream", "c"]).contains("MB"));
    assert!(podman.ok(&["top", "c"]).contains("trap"));
    let checkpoint = podman.call(&["container", "checkpoint", "c"]);
    let said = text(&checkpoint.stderr);
    assert!(!checkpoint.status.success() && said.to_lowercase().contains("checkpoint"), "{said}");
    podman.ok(&["kill", "--signal=TERM", "c"]);
    assert_eq!(podman.ok(&["wait", "c"]), "3\n");
    podman.ok(&["start", "c"]);
    podman.ok(&["stop", "--time=20", "c"]);
    assert_eq!(podman.ok(&["inspect", "--format={{.State.ExitCode}}", "c"]), "3\n");
    assert_eq!(podman.ok(&["logs", "c"]), "", "messages of the runtime are no output of the container");
    podman.ok(&["rm", "c"]);
}

#[test]
fn podmans_options_reach_the_container() {
    let Some(podman) = Podman::new() else { return };
    assert_eq!(podman.run(&[], &["sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(podman.run(&[], &["nope"]).status.code(), Some(127));
    assert_eq!(podman.run(&[], &["/etc/passwd"]).status.code(), Some(126));
    let killed = podman.run(&["--memory=10m"], &["sh", "-c", "x=$(yes | tr -d '\\n' | head -c 100000000); echo $?"]);
    assert_ne!(killed.status.code(), Some(0));
    let maps = ["--uidmap=0:100000:5000", "--gidmap=0:100000:5000"];
    let script = "id -u; tr -s ' ' < /proc/self/uid_map; echo x > /made && cat /made";
    assert_eq!(podman.says(&maps, &["sh", "-c", script]), "0\n 0 100000 5000\nx\n");
    let script = "touch /x 2>/dev/null || echo refused; touch /t/x && echo made";
    assert_eq!(podman.says(&["--read-only", "--tmpfs=/t:size=1m"], &["sh", "-c", script]), "refused\nmade\n");
    let caps = ["--cap-drop=all", "--cap-add=net_bind_service", "--security-opt=no-new-privileges"];
    let status = podman.says(&caps, &["cat", "/proc/self/status"]);
    assert!(status.contains("CapEff:\t0000000000000400") && status.contains("NoNewPrivs:\t1"), "{status}");
    assert!(podman.says(&["--security-opt=seccomp=unconfined"], &["cat", "/proc/self/status"]).contains("Seccomp:\t0"));
    assert!(podman.says(&[], &["cat", "/proc/self/status"]).contains("Seccomp:\t2"));
    let options = ["--hostname=hh", "--sysctl=net.ipv4.ip_forward=1", "--ulimit=nofile=100:200", "--umask=0077"];
    let script = "hostname; cat /proc/sys/net/ipv4/ip_forward; ulimit -n; umask";
    assert_eq!(podman.says(&options, &["sh", "-c", script]), "hh\n1\n100\n0077\n");
    assert_eq!(
        podman.says(&["--user=1:2", "--group-add=1000"], &["sh", "-c", "id -u; id -g; id -G"]),
        "1\n2\n2 1000\n"
    );
    assert_eq!(podman.says(&["--oom-score-adj=500"], &["cat", "/proc/self/oom_score_adj"]), "500\n");
    assert!(podman.says(&["--pid=host"], &["readlink", "/proc/self/ns/pid"]).starts_with("pid:"));
    assert_eq!(
        podman.says(&["--cpuset-cpus=0"], &["grep", "Cpus_allowed_list", "/proc/self/status"]),
        "Cpus_allowed_list:\t0\n"
    );
    assert_eq!(podman.says(&["--volume=named:/data"], &["sh", "-c", "echo kept > /data/f"]), "");
    assert_eq!(podman.says(&["--volume=named:/data"], &["cat", "/data/f"]), "kept\n");
}

#[test]
fn an_init_reaps_and_passes_signals_on() {
    let Some(podman) = Podman::new() else { return };
    if !Path::new("/usr/bin/catatonit").exists() {
        return;
    }
    assert!(podman.says(&["--init"], &["cat", "/proc/1/cmdline"]).contains("init"));
    podman.background(&["--init"], &["sh", "-c", "trap 'exit 4' TERM; while :; do sleep 0.1; done"]);
    podman.ok(&["stop", "--time=20", "c"]);
    assert_eq!(podman.ok(&["inspect", "--format={{.State.ExitCode}}", "c"]), "4\n");
}

#[test]
fn containers_of_a_pod_share_its_namespaces() {
    // On cgroup v2 podman 4.3 itself denies all devices to the pods it makes groups for, also under crun.
    let podman = if unified() { Podman::with_systemd() } else { Podman::new() };
    let Some(podman) = podman else { return };
    if !Path::new("/usr/bin/catatonit").exists() {
        return;
    }
    ok(podman.new_one(&["pod", "create", "--name=p", "--network=none", "--share=net,ipc,uts,pid"], &[]));
    let run = |rest: &[&str]| ok(podman.call(&[&["run", "--pod=p"], rest].concat()));
    run(&["--detach", "--name=a", "busybox:1", "sleep", "4321"]);
    let seen = run(&["--rm", "busybox:1", "sh", "-c", "ps; hostname; readlink /proc/self/ns/net"]);
    assert!(seen.contains("sleep 4321") && seen.contains("\np\n"), "{seen}");
    assert_eq!(seen.lines().last(), podman.ok(&["exec", "a", "readlink", "/proc/self/ns/net"]).lines().next());
    podman.ok(&["pod", "pause", "p"]);
    podman.ok(&["pod", "unpause", "p"]);
    podman.ok(&["pod", "stop", "--time=0", "p"]);
    podman.ok(&["pod", "start", "p"]);
    podman.ok(&["pod", "kill", "p"]);
    podman.ok(&["pod", "rm", "--force", "p"]);
    assert_eq!(podman.ok(&["ps", "--all", "--quiet"]), "");
}

#[track_caller]
fn ok(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// What an ordinary user does with a container, without groups of his own.
fn ordinary(podman: &Podman) {
    assert_eq!(podman.says(&[], &["id", "-u"]), "0\n");
    let map = podman.says(&[], &["sh", "-c", "tr -s ' ' < /proc/self/uid_map"]);
    assert_eq!(map.lines().count(), 2, "{map}");
    let (id, kept) = (common::podman::ID.to_string(), podman.says(&["--userns=keep-id"], &["id", "-u"]));
    assert!(kept == format!("{id}\n") || !map.contains(&id), "{kept}");
    assert_eq!(podman.run(&[], &["sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(podman.run(&[], &["nope"]).status.code(), Some(127));
    let volume = format!("--volume={}:/vol", podman.dir.path().join("volume").display());
    assert_eq!(podman.says(&[&volume], &["sh", "-c", "echo mine > /vol/file && cat /vol/file"]), "mine\n");
    let options = ["--read-only", "--tmpfs=/t", "--cap-drop=all", "--user=33:44", "--ulimit=nofile=100:200"];
    assert_eq!(
        podman.says(&options, &["sh", "-c", "id -u; ulimit -n; touch /x 2>/dev/null || echo no"]),
        "33\n100\nno\n"
    );
    podman.background(&[], &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"]);
    assert!(podman.ok(&["exec", "-t", "c", "tty"]).contains("/dev/pts/"));
    assert_eq!(podman.call(&["exec", "c", "sh", "-c", "exit 5"]).status.code(), Some(5));
    podman.ok(&["stop", "--time=20", "c"]);
    assert_eq!(podman.ok(&["inspect", "--format={{.State.ExitCode}}", "c"]), "3\n");
    podman.ok(&["rm", "c"]);
}

#[test]
fn an_ordinary_user_runs_containers() {
    let Some(podman) = Podman::rootless() else { return };
    ordinary(&podman);
}

#[test]
fn an_ordinary_user_has_limits_by_his_systemd() {
    let Some(podman) = Podman::session() else { return };
    ordinary(&podman);
    podman.background(&["--memory=64m", "--pids-limit=50"], &["sleep", "1000"]);
    assert_eq!(podman.control("memory", "memory.max"), "67108864");
    assert_eq!(podman.control("pids", "pids.max"), "50");
    podman.ok(&["pause", "c"]);
    assert_eq!(podman.ok(&["inspect", "--format={{.State.Status}}", "c"]), "paused\n");
    podman.ok(&["unpause", "c"]);
    podman.ok(&["update", "--memory=32m", "c"]);
    assert_eq!(podman.control("memory", "memory.max"), "33554432");
    assert!(podman.ok(&["stats", "--no-stream", "c"]).contains("MB"));
    podman.ok(&["rm", "--force", "--time=0", "c"]);
}
