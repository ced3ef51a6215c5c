//! The agent killed at its steps, while it makes a pod and while it takes one away: a new agent brings the pod up all the
//! same, each container once, and once the pod is deleted nothing of it is left. The same with the pod's supervisor killed while
//! the agent goes on.
//!
//! strace shows what the agent does, call by call, and holds it back a moment after each; the test kills at one of them. Some
//! steps are tried in every run, all with `ISOPOD_EVERY_STEP=1`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::Receiver,
    time::Duration,
};

use isopod_tests::{Cluster, Host, Net, eventually, host::binaries, snapshot::Snapshot};

/// Something of everything that an agent makes for a pod without an API server.
const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: victim, uid: 0b5e55ed-0b5e-55ed-0b5e-55ed0b5e55ed}
spec:
  terminationGracePeriodSeconds: 5
  volumes:
  - {name: memory, emptyDir: {medium: Memory}}
  - {name: disk, emptyDir: {}}
  - {name: down, downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}
  initContainers:
  - {name: i, image: 'busybox:1', command: [touch, /m/init], volumeMounts: [{name: memory, mountPath: /m}]}
  containers:
  - name: a
    image: busybox:1
    command: [sh, -c, 'trap "exit 0" TERM; while :; do sleep 76543 & wait; done']
    ports: [{containerPort: 8080, hostPort: 9090}]
    readinessProbe: {exec: {command: [cat, /m/init]}, periodSeconds: 1}
    lifecycle: {postStart: {exec: {command: [touch, /m/post]}}, preStop: {exec: {command: ['true']}}}
    volumeMounts: [{name: memory, mountPath: /m}, {name: down, mountPath: /d}]
  - name: b
    image: busybox:1
    command: [sh, -c, 'trap "exit 0" TERM; while :; do sleep 76543 & wait; done']
    volumeMounts: [{name: disk, mountPath: /m, subPath: sub}]
"#;
const CALLS: &str = "mkdir,mkdirat,rmdir,unlink,unlinkat,rename,renameat,renameat2,symlink,symlinkat,link,linkat,mount,umount2,\
                     move_mount,sendto,sendmsg,write,openat,connect,fsync,kill,chmod,fchmod,chown,fchownat,mknodat,execve,clone3";
/// Steps tried in an ordinary run, of making a pod and of taking it away each.
const SOME: usize = 8;

/// A step: what the call says, and which of those that say so.
type Step = (String, usize);

/// What a call does, told alike each time; `None` for what changes nothing.
fn step(line: &str) -> Option<String> {
    let call = line.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
    let quiet = ["<...", "---", "+++", "write(2<", "write(1<"].iter().any(|start| call.starts_with(start))
        || ["O_RDONLY", "O_PATH", "eventfd", "ENOENT", "EEXIST", "/trace"].iter().any(|word| call.contains(word));
    if quiet || call.is_empty() {
        return None;
    }
    let call = call.split(" <unfinished").next()?.split(") = ").next()?;
    let word = |c: char| c.is_ascii_alphanumeric();
    let mut out = String::new();
    let mut rest = call;
    // Numbers and random names come out different each time.
    while let Some(first) = rest.chars().next() {
        let end = if word(first) { rest.find(|c| !word(c)).unwrap_or(rest.len()) } else { first.len_utf8() };
        let (token, after) = rest.split_at(end);
        let random = token.chars().all(|c| c.is_ascii_hexdigit()) && token.chars().any(|c| c.is_ascii_digit());
        out.push_str(if random { "#" } else { token });
        rest = after;
    }
    Some(out.chars().take(110).collect())
}

/// An agent alone on its host, its pods from a directory of manifests.
struct Agent {
    host: Host,
    child: Child,
}

impl Agent {
    fn start(host: &Host) -> Self {
        let log = File::options().create(true).append(true).open(host.path("/var/lib/agent.out")).unwrap();
        let mut command = host.command(binaries().join("isopod").to_str().unwrap());
        let child = command.arg("agent").stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let agent = Self { host: host.clone(), child };
        eventually("the agent has its lock", || {
            let ran = host.sh("cat /proc/$(cat /run/isopod/agent.lock)/task/*/comm");
            if ran.out.lines().count() > 1 { Ok(()) } else { Err(ran) }
        });
        agent
    }

    fn pid(&self) -> String {
        self.host.must("cat /run/isopod/agent.lock").trim().to_owned()
    }

    fn end(mut self) {
        self.host.must(&format!("kill -9 {} 2>/dev/null || true", self.pid()));
        self.child.wait().unwrap();
    }
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Agent,
    Supervisor,
}

/// strace on an agent, and who kills without delay.
struct Watch {
    strace: Child,
    steps: Receiver<Step>,
    killer: Child,
}

impl Watch {
    fn on(agent: &Agent, victim: Victim) -> Self {
        let pid = agent.pid();
        let kill = match victim {
            Victim::Agent => "read x && kill -9 $0",
            Victim::Supervisor => "read x && pkill -9 -x isopod-pod",
        };
        let mut killer = agent.host.command("sh");
        let killer = killer.args(["-c", kill, &pid]).stdin(Stdio::piped()).spawn().unwrap();
        let script = format!(
            "echo $$ > /var/lib/strace.pid; exec strace -y -s 60 -e trace={CALLS} -e inject={CALLS}:delay_exit=2000 -o /proc/self/fd/1 \
             $(for t in /proc/{pid}/task/*; do echo -p ${{t##*/}}; done)"
        );
        let mut strace = agent.host.command("sh");
        let mut strace = strace.args(["-c", &script]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(strace.stderr.take().unwrap()).lines();
        let line = said.next().unwrap().unwrap();
        assert!(line.contains("attached"), "{line}");
        // It goes on to say so of every thread; it must not have to wait for a reader.
        std::thread::spawn(move || said.count());
        let lines = BufReader::new(strace.stdout.take().unwrap()).lines();
        let (sender, steps) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut seen = BTreeMap::new();
            for what in lines.map_while(Result::ok).filter_map(|line| step(&line)) {
                let n = seen.entry(what.clone()).or_insert(0);
                *n += 1;
                let _ = sender.send((what, *n));
            }
        });
        Self { strace, steps, killer }
    }

    /// Steps until there are no more but those of a pod that runs.
    fn steps(&self) -> impl Iterator<Item = Step> {
        let mut probes = 0;
        std::iter::from_fn(move || {
            let step = self.steps.recv_timeout(Duration::from_secs(3)).ok()?;
            probes += usize::from(step.0.contains("exec\\"));
            (probes < 5).then_some(step)
        })
    }

    /// Kills when the agent is at `at`, or at last; whether it came there.
    fn kill_at(mut self, host: &Host, at: &Step) -> bool {
        let there = self.steps().any(|step| step == *at);
        self.killer.stdin.take().unwrap().write_all(b"\n").unwrap();
        self.end(host);
        there
    }

    /// All steps there are.
    fn record(self, host: &Host) -> Vec<Step> {
        let steps = self.steps().collect();
        self.end(host);
        steps
    }

    fn end(mut self, host: &Host) {
        drop(self.killer.stdin.take());
        self.killer.wait().unwrap();
        // Asked to end in a better way it may wait for threads that are dead.
        host.sh("kill -9 $(cat /var/lib/strace.pid)");
        self.strace.wait().unwrap();
    }
}

/// A host with an agent that has its one pod, or not.
struct Case {
    host: Host,
    manifest: PathBuf,
    empty: Snapshot,
}

impl Case {
    fn put(&self) {
        fs::write(&self.manifest, POD).unwrap();
    }

    fn take(&self) {
        fs::remove_file(&self.manifest).unwrap();
    }

    #[track_caller]
    fn comes_up(&self, at: &str) {
        let look = "pgrep -xc isopod-pod; pgrep -xfc 'sleep 76543'; cat /var/lib/isopod/pods/*/state.json";
        eventually(&format!("the pod runs, killed at {at}"), || {
            let ran = self.host.sh(look);
            let all = ran.out.starts_with("1\n2\n") && ran.out.contains("\"sandbox\":{");
            if all { Ok(()) } else { Err(ran) }
        });
    }

    #[track_caller]
    fn goes(&self, at: &str) {
        eventually(&format!("nothing is left, killed at {at}"), || {
            let diff = self.empty.diff(&Snapshot::take(&self.host).pooled());
            let records = self.host.must(
                "cd /var/lib/isopod; ls network/pods pods /run/isopod/pods /var/log/pods image-store/tmp | grep -v ':$' | grep . || true",
            );
            if diff.is_empty() && records.is_empty() { Ok(()) } else { Err((diff, records)) }
        });
    }
}

/// Every step, or some of them evenly.
fn chosen(steps: &[Step], some: usize) -> Vec<Step> {
    let every = std::env::var_os("ISOPOD_EVERY_STEP").is_some();
    let stride = if every { 1 } else { steps.len().div_ceil(some) };
    steps.iter().skip(stride / 2).step_by(stride).cloned().collect()
}

/// A host with an agent alone, and its steps while the pod comes up and goes.
fn prepared(net: &mut Net) -> (Case, Agent, Vec<Step>, Vec<Step>) {
    let host = net.host("one");
    Cluster::install_images(&host);
    Cluster::stand_alone(&host);
    let agent = Agent::start(&host);
    let empty = Snapshot::settled(&host);
    let case = Case { manifest: host.path("/etc/isopod/manifests/victim.yaml"), host, empty };
    // Once for what is made once: the images.
    case.put();
    case.comes_up("nowhere");
    case.take();
    case.goes("nowhere");
    let watch = Watch::on(&agent, Victim::Agent);
    case.put();
    let up = watch.record(&case.host);
    case.comes_up("nowhere");
    let watch = Watch::on(&agent, Victim::Agent);
    case.take();
    let down = watch.record(&case.host);
    case.goes("nowhere");
    eprintln!("{} steps up and {} down", up.len(), down.len());
    (case, agent, up, down)
}

#[test]
fn an_agent_killed_at_any_step_goes_on_from_there() {
    if Command::new("strace").arg("-V").output().is_err() {
        return;
    }
    let mut net = Net::new();
    let (case, mut agent, up, down) = prepared(&mut net);
    let (up, down) = (chosen(&up, SOME), chosen(&down, SOME));
    assert!(up.len() > SOME / 2 && down.len() > SOME / 2, "{up:?} {down:?}");
    let mut there = [0, 0];
    for round in 0..up.len().max(down.len()) {
        if let Some(at) = up.get(round) {
            let watch = Watch::on(&agent, Victim::Agent);
            case.put();
            there[0] += usize::from(watch.kill_at(&case.host, at));
            agent.end();
            // Now and then the pod is deleted while no agent is there.
            let deleted = round % 4 == 3;
            if deleted {
                case.take();
            }
            agent = Agent::start(&case.host);
            if deleted {
                case.goes(&format!("up {at:?}"));
                case.put();
            }
            case.comes_up(&format!("up {at:?}"));
        } else {
            case.put();
            case.comes_up("nowhere");
        }
        if let Some(at) = down.get(round) {
            let watch = Watch::on(&agent, Victim::Agent);
            case.take();
            there[1] += usize::from(watch.kill_at(&case.host, at));
            agent.end();
            agent = Agent::start(&case.host);
            case.goes(&format!("down {at:?}"));
        } else {
            case.take();
            case.goes("nowhere");
        }
    }
    agent.end();
    eprintln!("killed at {there:?} of [{}, {}] steps", up.len(), down.len());
    assert!(there[0] * 2 > up.len() && there[1] > 0, "{there:?}");
}

#[test]
fn a_supervisor_killed_at_any_step_of_its_agent_is_replaced() {
    if Command::new("strace").arg("-V").output().is_err() {
        return;
    }
    let mut net = Net::new();
    let (case, agent, up, down) = prepared(&mut net);
    // While there is one.
    let first = up.iter().position(|(what, _)| what.contains("subscribe")).unwrap();
    let last = down.iter().position(|(what, _)| what.contains("shutdown")).unwrap();
    let (up, down) = (chosen(&up[first..], SOME / 2), chosen(&down[..=last], SOME / 2));
    for round in 0..up.len().max(down.len()) {
        let at = up.get(round);
        let watch = at.map(|_| Watch::on(&agent, Victim::Supervisor));
        case.put();
        if let (Some(watch), Some(at)) = (watch, at) {
            watch.kill_at(&case.host, at);
        }
        case.comes_up(&format!("up {at:?}"));
        let at = down.get(round);
        let watch = at.map(|_| Watch::on(&agent, Victim::Supervisor));
        case.take();
        if let (Some(watch), Some(at)) = (watch, at) {
            watch.kill_at(&case.host, at);
        }
        case.goes(&format!("down {at:?}"));
    }
    eprintln!("supervisor killed at {} and {} steps", up.len(), down.len());
    agent.end();
}
