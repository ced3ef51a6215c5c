//! Debian's podman with this runtime instead of crun: what people do with containers, through a caller that is not ours.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use common::{Bundle, possible, text};

struct Podman {
    dir: tempfile::TempDir,
    parent: String,
}

impl Podman {
    /// With a storage of its own and one image, `busybox:1`.
    fn new() -> Option<Self> {
        if !possible() || Command::new("podman").arg("--version").output().is_err() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let parent = format!("/isopod-test-podman{}", std::process::id());
        let podman = Self { dir, parent };
        let bundle = Bundle::new(&["true"]);
        for name in ["tmp", "mnt"] {
            fs::create_dir(bundle.rootfs().join(name)).unwrap();
        }
        let archive = podman.dir.path().join("busybox.tar");
        let packed = Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(bundle.rootfs()).arg(".").status();
        assert!(packed.unwrap().success());
        podman.ok(&["import", "--change", "ENV PATH=/bin", &archive.to_string_lossy(), "busybox:1"]);
        Some(podman)
    }

    fn command(&self) -> Command {
        let at = |name: &str| self.dir.path().join(name);
        let mut command = Command::new("podman");
        command.arg("--root").arg(at("root")).arg("--runroot").arg(at("run")).arg("--tmpdir").arg(at("tmp"));
        command.args(["--cgroup-manager=cgroupfs", "--events-backend=file", "--storage-driver=vfs"]);
        command.arg("--runtime").arg(common::RUNTIME).stdin(Stdio::null());
        command
    }

    fn call(&self, args: &[&str]) -> Output {
        self.command().args(args).output().unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// `podman run --rm OPTIONS busybox:1 COMMAND`, without a network.
    fn run(&self, options: &[&str], command: &[&str]) -> Output {
        let parent = format!("--cgroup-parent={}", self.parent);
        let fixed = ["run", "--rm", "--network=none", &parent];
        self.call(&[&fixed[..], options, &["busybox:1"], command].concat())
    }

    #[track_caller]
    fn says(&self, options: &[&str], command: &[&str]) -> String {
        let output = self.run(options, command);
        assert!(output.status.success(), "{options:?} {command:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.call(&["rm", "--force", "--all", "--time", "0"]);
        // Its monitor has a group beside the containers'.
        for group in ["/conmon", ""].iter().flat_map(|name| common::groups(&format!("{}{name}", &self.parent[1..]))) {
            let _ = fs::remove_dir(group);
        }
        // What its graph driver keeps mounted for later calls.
        for name in ["root/vfs", "run"] {
            let _ = Command::new("umount").arg(self.dir.path().join(name)).stderr(Stdio::null()).status();
        }
    }
}

#[test]
fn a_container_lives_under_podman() {
    let Some(podman) = Podman::new() else { return };
    let volume = podman.dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "of the host").unwrap();
    let (parent, mounted) = (format!("--cgroup-parent={}", podman.parent), format!("{}:/vol:ro", volume.display()));
    let limits = ["--memory=64m", "--cpus=0.5", "--pids-limit=50"];
    let name = ["run", "-d", "--name=c", "--network=none", &parent, "--volume", &mounted];
    podman
        .ok(&[&name[..], &limits, &["busybox:1", "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"]]
            .concat());
    let group = |controller: &str, file: &str| {
        let file = if common::unified() {
            format!("/sys/fs/cgroup/{file}")
        } else {
            format!("/sys/fs/cgroup/{controller}/{file}")
        };
        podman.ok(&["exec", "c", "cat", &file]).trim().to_owned()
    };
    let (memory, quota) = if common::unified() {
        ("memory.max", ("cpu.max", ["50000 100000", "25000 100000"]))
    } else {
        ("memory.limit_in_bytes", ("cpu.cfs_quota_us", ["50000", "25000"]))
    };
    assert_eq!((group("memory", memory), group("cpu", quota.0)), ("67108864".into(), quota.1[0].into()));
    assert_eq!(group("pids", "pids.max"), "50");
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
    assert_eq!((group("memory", memory), group("cpu", quota.0)), ("33554432".into(), quota.1[1].into()));
    assert!(podman.ok(&["stats", "--no-stream", "c"]).contains("MB"));
    assert!(podman.ok(&["top", "c"]).contains("trap"));
    let checkpoint = podman.call(&["container", "checkpoint", "c"]);
    assert!(!checkpoint.status.success() && !checkpoint.stderr.is_empty());
    podman.ok(&["kill", "--signal=TERM", "c"]);
    assert_eq!(podman.ok(&["wait", "c"]), "3\n");
    podman.ok(&["start", "c"]);
    podman.ok(&["stop", "--time=5", "c"]);
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
