//! A cluster on a virtual host, started the way a person starts it.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{Host, Ran, eventually, eventually_within, host::binaries, image::Image};

/// What `isopod up` writes, without thresholds for disks.
const CONFIGURATION: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                             clusterDNS: [10.96.0.10]\nclusterDomain: cluster.local\n\
                             evictionHard: {memory.available: 100Mi}\n";

/// `isopod up` on a host, with kubectl.
pub struct Cluster {
    /// Where it runs.
    pub host: Host,
    /// The directory of its executables.
    bin: PathBuf,
    up: Option<Child>,
    /// Time from the start of `isopod up` to its word that the node is Ready.
    pub started_in: Duration,
}

impl Cluster {
    /// Puts the test images in place and starts a cluster.
    pub fn start(host: &Host) -> Self {
        Self::install_images(host);
        Self::start_from(host, binaries())
    }

    /// The same with the executables installed on the host's own disk, as on a real machine: agent and control plane share one
    /// file only where both are on one mount.
    pub fn start_installed(host: &Host) -> Self {
        Self::install_images(host);
        let bin = host.path("/var/lib/bin");
        fs::create_dir_all(&bin).unwrap();
        for name in ["isopod", "isopod-runtime"] {
            fs::copy(binaries().join(name), bin.join(name)).unwrap();
        }
        Self::start_from(host, PathBuf::from("/var/lib/bin"))
    }

    fn start_from(host: &Host, bin: PathBuf) -> Self {
        let mut cluster = Self { host: host.clone(), bin, up: None, started_in: Duration::ZERO };
        cluster.up();
        cluster
    }

    /// busybox:1 and web:1 in the host's image directory, and a configuration that does not mind how full the disk of the
    /// machine under the virtual hosts is.
    pub fn install_images(host: &Host) {
        let config = host.path("/etc/isopod/config.yaml");
        if !config.exists() {
            fs::write(config, CONFIGURATION).unwrap();
        }
        // Also where the test has mounted a disk of its own there.
        let images = host.inside("/var/lib/isopod/images");
        Image::busybox("busybox:1").save(&images.join("busybox.tar"));
        Image::web("web:1").save(&images.join("web.tar"));
    }

    /// What `isopod agent` needs to run the pods of `/etc/isopod/manifests` without a control plane.
    pub fn stand_alone(host: &Host) {
        fs::create_dir_all(host.path("/etc/isopod/manifests")).unwrap();
        let config = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\npodCIDR: 10.244.9.0/24\n\
                      evictionHard: {memory.available: 100Mi}\n";
        fs::write(host.path("/etc/isopod/config.yaml"), config).unwrap();
        host.must(
            "mkdir -p /etc/isopod/pki && cd /etc/isopod/pki && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 \
             -nodes -keyout kubelet.key -out kubelet.crt -subj /CN=one -days 1 2>/dev/null && cp kubelet.crt ca.crt",
        );
    }

    /// Runs `isopod up` until the node is Ready.
    pub fn up(&mut self) {
        let started = Instant::now();
        let log = self.host.disk().join("up.log");
        let file = fs::File::create(&log).unwrap();
        let mut command = self.host.command(self.bin.join("isopod").to_str().unwrap());
        self.up = Some(
            command.arg("up").stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap(),
        );
        eventually_within(Duration::from_secs(90), "isopod up", || {
            let text = fs::read_to_string(&log).unwrap();
            if text.contains("Ready in ") {
                return Ok(());
            }
            if let Some(status) = self.up.as_mut().and_then(|up| up.try_wait().unwrap()) {
                panic!("isopod up ended with {status}:\n{text}");
            }
            Err(text)
        });
        self.started_in = started.elapsed();
        let kubeconfig = self.isopod(&["kubeconfig"]).ok().unwrap();
        fs::write(self.host.path("/etc/isopod/kubeconfig"), kubeconfig).unwrap();
    }

    /// Runs the isopod executable on the host.
    pub fn isopod(&self, args: &[&str]) -> Ran {
        self.host.run(self.bin.join("isopod").to_str().unwrap(), args)
    }

    /// Waits for `isopod up` to end by itself.
    pub fn wait_up(&mut self) {
        if let Some(mut up) = self.up.take() {
            up.wait().unwrap();
        }
    }

    /// PID of the agent as its host sees it.
    pub fn agent_pid(&self) -> u32 {
        self.host.must("cat /run/isopod/agent.lock").trim().parse().unwrap()
    }

    /// kill -9 of the agent; pods stay.
    pub fn kill_agent(&mut self) {
        let pid = self.agent_pid();
        self.host.must(&format!("kill -9 {pid}"));
        self.wait_up();
    }

    /// An agent where `isopod up` has put everything already.
    pub fn start_agent(&mut self) {
        let log = fs::File::create(self.host.disk().join("agent.out")).unwrap();
        let mut command = self.host.command(self.bin.join("isopod").to_str().unwrap());
        self.up = Some(command.arg("agent").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
    }

    /// Runs kubectl with a whole command line (split by a shell on the host).
    pub fn kubectl(&self, line: &str) -> Ran {
        self.host.sh(&format!("KUBECONFIG=/etc/isopod/kubeconfig kubectl {line}"))
    }

    /// kubectl that must succeed; its output.
    #[track_caller]
    pub fn k(&self, line: &str) -> String {
        self.kubectl(line).ok().unwrap_or_else(|ran| panic!("kubectl {line}: {ran:?}"))
    }

    /// An object as JSON.
    #[track_caller]
    pub fn get(&self, line: &str) -> Value {
        serde_json::from_str(&self.k(&format!("get {line} -o json"))).unwrap()
    }

    /// Applies manifests given as text.
    #[track_caller]
    pub fn apply(&self, yaml: &str) -> String {
        fs::write(self.host.path("/etc/isopod/apply.yaml"), yaml).unwrap();
        self.k("apply -f /etc/isopod/apply.yaml")
    }

    /// Applies manifests that may be refused for now.
    pub fn try_apply(&self, yaml: &str) -> Result<String, Ran> {
        fs::write(self.host.path("/etc/isopod/apply.yaml"), yaml).unwrap();
        self.kubectl("apply -f /etc/isopod/apply.yaml").ok()
    }

    /// Waits until a field of an object, as kubectl's jsonpath prints it, satisfies `want`.
    #[track_caller]
    pub fn wait_field(&self, object: &str, path: &str, want: impl Fn(&str) -> bool) -> String {
        eventually(&format!("{path} of {object}"), || {
            let ran = self.kubectl(&format!("get {object} -o jsonpath='{{{path}}}'"));
            if ran.code == 0 && want(&ran.out) { Ok(ran.out) } else { Err(ran) }
        })
    }

    /// Waits until a pod is Ready.
    #[track_caller]
    pub fn wait_ready(&self, pod: &str) {
        self.wait_field(&format!("pod {pod}"), ".status.conditions[?(@.type==\"Ready\")].status", |s| s == "True");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- up.log\n{}", fs::read_to_string(self.host.disk().join("up.log")).unwrap_or_default());
            for line in ["get pods -A -o wide", "get events -A --sort-by=.lastTimestamp", "get nodes -o wide"] {
                let ran = self.kubectl(&format!("--request-timeout=5s {line}"));
                eprintln!("--- kubectl {line}\n{}{}", ran.out, ran.err);
            }
        }
        if let Some(up) = &mut self.up {
            // The host's end takes the rest along.
            let _ = up.kill();
            let _ = up.wait();
        }
    }
}
