//! Debian's containerd with this runtime in runc's place.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    process::{Child, Command, Output, Stdio},
};

use common::{Bundle, RUNTIME, eventually, possible, text, unified};

/// A containerd of the test's own.
struct Containerd {
    dir: tempfile::TempDir,
    process: Child,
    group: String,
}

impl Containerd {
    fn new() -> Option<Self> {
        let there = |name: &str| Command::new(name).arg("--version").output().is_ok();
        if !possible() || !there("containerd") || !there("ctr") {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("socket")
        );
        fs::write(at("config.toml"), config).unwrap();
        let log = fs::File::create(at("log")).unwrap();
        let mut command = Command::new("containerd");
        command.args(["--config", &at("config.toml")]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process = command.spawn().unwrap();
        let containerd = Self { dir, process, group: format!("isopod-test-ctr{}", std::process::id()) };
        let answers = || containerd.ctr(&["version"]).status.success().then_some(());
        eventually("containerd answers", answers, || fs::read_to_string(containerd.at("log")).unwrap());
        containerd.import();
        Some(containerd)
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn ctr(&self, args: &[&str]) -> Output {
        let mut command = Command::new("ctr");
        command.args(["--address", &self.at("socket")]).args(args).stdin(Stdio::null());
        command.output().unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.ctr(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Makes the image `docker.io/library/busybox:1`, of one layer.
    fn import(&self) {
        let bundle = Bundle::new(&["true"]);
        let dir = self.dir.path().join("image");
        fs::create_dir(&dir).unwrap();
        let script = "tar -cf layer.tar -C \"$0\" . && sha256sum layer.tar | cut -d' ' -f1";
        let output = Command::new("sh").args(["-c", script]).arg(bundle.rootfs()).current_dir(&dir).output().unwrap();
        let digest = format!("sha256:{}", text(&output.stdout).trim());
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": [digest]},
        });
        let manifest = serde_json::json!([{
            "Config": "config.json", "RepoTags": ["docker.io/library/busybox:1"], "Layers": ["layer.tar"],
        }]);
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
        let script = "tar -cf ../image.tar manifest.json config.json layer.tar";
        assert!(Command::new("sh").args(["-c", script]).current_dir(&dir).status().unwrap().success());
        self.ok(&["images", "import", "--snapshotter", "native", &self.at("image.tar")]);
    }

    /// `ctr run OPTIONS busybox ID COMMAND`.
    fn run(&self, options: &[&str], id: &str, command: &[&str]) -> Output {
        let group = format!("/{}/{id}", self.group);
        let fixed = ["run", "--runc-binary", RUNTIME, "--snapshotter", "native", "--cgroup", &group];
        self.ctr(&[&fixed[..], options, &["docker.io/library/busybox:1", id], command].concat())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for id in self.ctr(&["containers", "list", "-q"]).stdout.split(|b| *b == b'\n').map(text) {
            let _ = self.ctr(&["tasks", "delete", "--force", &id]);
            let _ = self.ctr(&["containers", "delete", &id]);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        for group in common::groups(&self.group) {
            let _ = fs::remove_dir(group);
        }
    }
}

#[test]
fn a_container_lives_under_containerd() {
    let Some(containerd) = Containerd::new() else { return };
    let said = containerd.run(&["--rm"], "one", &["sh", "-c", "echo hello; exit 7"]);
    assert_eq!((said.status.code(), text(&said.stdout).as_str()), (Some(7), "hello\n"), "{}", text(&said.stderr));
    let failed = containerd.run(&["--rm"], "none", &["nope"]);
    assert!(text(&failed.stderr).contains("nope"), "{}", text(&failed.stderr));
    let options = ["--detach", "--memory-limit=67108864", "--cpus=0.5", "--seccomp"];
    let started = containerd.run(&options, "c", &["sleep", "1234"]);
    assert!(started.status.success(), "{}", text(&started.stderr));
    let exec =
        |id: &str, command: &[&str]| containerd.ctr(&[&["tasks", "exec", "--exec-id", id, "c"], command].concat());
    let memory = if unified() { "memory.max" } else { "memory.limit_in_bytes" };
    let limits = common::groups(&format!("{}/c/{memory}", containerd.group));
    assert_eq!(limits.first().map(|file| fs::read_to_string(file).unwrap()).as_deref(), Some("67108864\n"));
    assert!(text(&exec("e2", &["cat", "/proc/self/status"]).stdout).contains("Seccomp:\t2"));
    assert_eq!(exec("e3", &["sh", "-c", "exit 5"]).status.code(), Some(5));
    let status = || containerd.ok(&["tasks", "list"]);
    containerd.ok(&["tasks", "pause", "c"]);
    assert!(status().contains("PAUSED"), "{}", status());
    containerd.ok(&["tasks", "resume", "c"]);
    assert!(status().contains("RUNNING"), "{}", status());
    assert!(containerd.ok(&["tasks", "ps", "c"]).lines().count() == 2);
    assert!(containerd.ok(&["tasks", "metrics", "c"]).contains("memory"));
    let checkpoint = containerd.ctr(&["tasks", "checkpoint", "c"]);
    assert!(text(&checkpoint.stderr).contains("not supported"), "{}", text(&checkpoint.stderr));
    containerd.ok(&["tasks", "kill", "--signal", "SIGKILL", "c"]);
    eventually("the container has ended", || status().contains("STOPPED").then_some(()), status);
    containerd.ok(&["tasks", "delete", "c"]);
    containerd.ok(&["containers", "delete", "c"]);
}
