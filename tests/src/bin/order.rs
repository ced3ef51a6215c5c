//! `make order`: writes `order.txt` of `isopod` and `runtime`, the functions that the linker puts next to each other.
//!
//! The kernel maps 64 KiB of a file around each page that a process touches, and the 2 MB of code that an idle node runs would
//! be scattered over 47. A name that is no function (any more) does no harm; sources may change without names of others doing so,
//! but a change of Cargo.lock or of a profile renames most.
#![allow(clippy::unwrap_used, reason = "a tool of the developers that cannot run has nothing to say")]

use std::{
    collections::HashSet,
    fs::{self, File},
    io::Write,
    path::Path,
    process::Stdio,
    thread,
    time::Duration,
};

use isopod_tests::{Cluster, Host, Net, eventually};

/// When a start is over.
const STARTED: Duration = Duration::from_secs(30);
/// How long an idle node is watched: leases, probes and most resyncs come by.
const IDLE: Duration = Duration::from_secs(120);

/// Prints the processes of both executables.
const OURS: &str = "for p in /proc/[0-9]*; do
  case $(readlink $p/exe) in */isopod | */isopod-runtime) echo ${p#/proc/} ;; esac
done";

const WORKLOAD: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: ordered}
data: {key: value}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: ordered}
spec:
  replicas: 3
  selector: {matchLabels: {app: ordered}}
  template:
    metadata: {labels: {app: ordered}}
    spec:
      volumes:
      - {name: config, configMap: {name: ordered}}
      - {name: scratch, emptyDir: {}}
      containers:
      - name: web
        image: web:1
        resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 5}
        volumeMounts:
        - {name: config, mountPath: /config}
        - {name: scratch, mountPath: /scratch}
---
apiVersion: v1
kind: Service
metadata: {name: ordered}
spec:
  type: NodePort
  selector: {app: ordered}
  ports: [{port: 80, targetPort: 8080}]
";

fn main() {
    let mut net = Net::new();
    let host = net.host("order");
    let cluster = Cluster::start_installed(&host);
    cluster.apply(WORKLOAD);
    cluster.k("rollout status deployment ordered");
    thread::sleep(STARTED);
    let ours = || pids(&host, OURS);
    let mut touched = trace(&host, &ours(), || thread::sleep(IDLE));
    touched.extend(trace(&host, &ours(), || work(&cluster)));
    touched.extend(verbs(&host));
    for (program, room) in [("isopod", "isopod"), ("isopod-runtime", "runtime")] {
        let mut seen = HashSet::new();
        let of = touched.iter().filter_map(|line| line.strip_prefix(program)?.strip_prefix(' '));
        let order: Vec<&str> = of.filter(|symbol| seen.insert(*symbol)).collect();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name(room).join("order.txt");
        fs::write(&file, order.join("\n") + "\n").unwrap();
        println!("{}: {} functions", file.display(), order.len());
    }
}

fn pids(host: &Host, script: &str) -> Vec<String> {
    host.must(script).split_whitespace().map(str::to_owned).collect()
}

/// What `touched` says of these processes, and what they start, while `work` goes on.
fn trace(host: &Host, pids: &[String], work: impl FnOnce()) -> Vec<String> {
    let own = std::env::current_exe().unwrap();
    let file = host.disk().join("touched");
    let mut command = host.command(own.with_file_name("touched").to_str().unwrap());
    let mut tracer = command.args(pids).stdin(Stdio::piped()).stdout(File::create(&file).unwrap()).spawn().unwrap();
    eventually("tracing", || {
        let text = fs::read_to_string(&file).unwrap();
        if text.starts_with("tracing\n") { Ok(()) } else { Err(text) }
    });
    work();
    drop(tracer.stdin.take());
    assert!(tracer.wait().unwrap().success());
    fs::read_to_string(&file).unwrap().lines().skip(1).map(str::to_owned).collect()
}

/// What people and controllers ask of a node.
fn work(cluster: &Cluster) {
    cluster.k("scale deployment ordered --replicas=6");
    cluster.k("rollout status deployment ordered");
    cluster.k("rollout restart deployment ordered");
    cluster.k("rollout status deployment ordered");
    cluster.k("run once --image=web:1 --restart=Never --command -- sh -c 'echo said; sleep 3'");
    cluster.wait_field("pod once", ".status.phase", |phase| phase == "Succeeded");
    cluster.k("logs once");
    cluster.k("exec deploy/ordered -- ls /config");
    cluster.k("get pods -A -o wide");
    cluster.k("describe nodes");
    cluster.k("delete pod once");
    // A new control plane under the supervisors that are traced.
    cluster.host.must("kill -9 $(pgrep -f '^/isopod (apiserver|scheduler|controller-manager)')");
    eventually("the API server is back", || cluster.kubectl("get --raw /readyz").ok());
    cluster.k("delete deployment,service ordered");
    eventually("no pod is left", || match cluster.k("get pods -o name").trim() {
        "" => Ok(()),
        left => Err(left.to_owned()),
    });
}

/// The runtime without an agent: the shell waits until it is traced.
fn verbs(host: &Host) -> Vec<String> {
    let runtime = std::env::current_exe().unwrap().with_file_name("isopod-runtime").display().to_string();
    let script = format!(
        "mkdir -p /run/bundle/rootfs/bin && cp /bin/busybox /run/bundle/rootfs/bin/ && cd /run/bundle && {runtime} spec &&
         sed -i 's/\"terminal\": true/\"terminal\": false/; s/\"sh\"/\"busybox\", \"true\"/' config.json && mkfifo /run/go &&
         (read -r go < /run/go
          {runtime} run once
          sed -i 's/\"true\"/\"sleep\", \"60\"/' config.json
          {runtime} create again && {runtime} start again && {runtime} exec again busybox true
          {runtime} state again; {runtime} ps again; {runtime} delete --force again
          touch /run/verbs-done) > /run/verbs.log 2>&1 < /dev/null & echo $!"
    );
    let shell = pids(host, &script);
    trace(host, &shell, || {
        File::options().write(true).open(host.inside("/run/go")).unwrap().write_all(b"go\n").unwrap();
        eventually("the runtime's verbs", || fs::metadata(host.inside("/run/verbs-done")));
    })
}
