//! A node's life on fast-forward: pods come, go and are killed at random, and so are their supervisors, the control plane and
//! the agent; memory limits are hit and the disk fills. After every handful of blows everything has to be well again and each
//! killed container has to have been counted as one restart, no more and no less; at the end nothing may be left.
//!
//! `ISOPOD_CHURN_SECONDS` says how long (25 s), `ISOPOD_CHURN_SEED` repeats a run.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::{Duration, Instant, SystemTime},
};

use isopod_tests::{
    Cluster, Host, Net, eventually, eventually_within,
    snapshot::{Snapshot, converges},
};
use serde_json::Value;

/// No waits between restarts that would only make the test longer, and no eviction.
const CONFIGURATION: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                             clusterDNS: [10.96.0.10]\nclusterDomain: cluster.local\n\
                             evictionHard: {memory.available: 100Mi}\n\
                             crashLoopBackOff: {maxContainerRestartPeriod: 1s}\n";

/// How many pods there are at most.
const MOST: usize = 14;

/// A number from the environment.
fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

/// splitmix64: the same seed, the same churn.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn pick<T: Clone>(&mut self, all: &[T]) -> Option<T> {
        let n = u64::try_from(all.len()).unwrap();
        (n > 0).then(|| all[usize::try_from(self.next() % n).unwrap()].clone())
    }
}

/// What pods look like. Some hear their end, some have to be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Pair,
    Fed,
    Sidecar,
    Hungry,
    Brief,
    Mapped,
}

const KINDS: [Kind; 7] = [Kind::Plain, Kind::Pair, Kind::Fed, Kind::Sidecar, Kind::Hungry, Kind::Brief, Kind::Mapped];

impl Kind {
    fn spec(self) -> &'static str {
        match self {
            Self::Plain => "containers: [{name: c, image: 'web:1', ports: [{containerPort: 8080}]}]",
            Self::Pair => {
                "containers:
  - {name: a, image: 'busybox:1', command: [sleep, '100000'], volumeMounts: [{name: m, mountPath: /m}]}
  - {name: b, image: 'busybox:1', command: [sleep, '100000'], volumeMounts: [{name: m, mountPath: /m}, {name: h, mountPath: /h, subPath: deep/er}]}
  volumes: [{name: m, emptyDir: {medium: Memory}}, {name: h, hostPath: {path: /var/lib/churn, type: DirectoryOrCreate}}]"
            }
            Self::Fed => {
                "containers:
  - name: c
    image: busybox:1
    command: [sleep, '100000']
    readinessProbe: {exec: {command: [cat, /all/key, /conf/key]}, periodSeconds: 1}
    livenessProbe: {exec: {command: ['true']}, periodSeconds: 5, timeoutSeconds: 60}
    volumeMounts: [{name: conf, mountPath: /conf}, {name: all, mountPath: /all}, {name: e, mountPath: /e, subPath: x}]
  volumes:
  - {name: conf, configMap: {name: churn}}
  - {name: e, emptyDir: {}}
  - name: all
    projected:
      sources:
      - {configMap: {name: churn}}
      - {downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}
      - {serviceAccountToken: {path: token, expirationSeconds: 3600}}"
            }
            Self::Sidecar => {
                "initContainers:
  - {name: i, image: 'busybox:1', command: ['true']}
  - {name: s, image: 'busybox:1', restartPolicy: Always, command: [sleep, '100000']}
  containers: [{name: c, image: 'busybox:1', command: [sleep, '100000']}]"
            }
            Self::Hungry => {
                "containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'mkfifo /tmp/eat; read x < /tmp/eat; a=x; while :; do a=$a$a; done']
    resources: {limits: {memory: 24Mi, cpu: 500m}, requests: {cpu: 5m, memory: 4Mi}}"
            }
            Self::Brief => {
                "restartPolicy: Never
  containers: [{name: c, image: 'busybox:1', command: [sh, -c, 'echo done; exit 0']}]"
            }
            Self::Mapped => {
                "hostUsers: false
  containers: [{name: c, image: 'busybox:1', command: [sleep, '100000'], volumeMounts: [{name: e, mountPath: /e}]}]
  volumes: [{name: e, emptyDir: {}}]"
            }
        }
    }
}

/// Which pod's state the agent could not write, and when: a line of its log. Files' times are those of the last tick.
fn not_saved(line: &str) -> Option<(&str, SystemTime)> {
    let dir = line.split("path=").nth(1).filter(|_| line.contains("state not saved"))?;
    let at: k8s_openapi::jiff::Timestamp = line.split_whitespace().next()?.parse().ok()?;
    Some((dir.split_whitespace().next()?, SystemTime::from(at) - Duration::from_millis(20)))
}

/// What is known of a pod.
struct Pod {
    kind: Kind,
    uid: String,
    /// Container instances that were killed.
    deaths: BTreeSet<String>,
    /// It was well when this round began, and nothing was done to it since.
    steady: bool,
    /// The last thing that happened to it is that it had too little memory.
    starved: bool,
    going: bool,
}

impl Pod {
    fn new(kind: Kind, uid: String) -> Self {
        Self { kind, uid, deaths: BTreeSet::new(), steady: false, starved: false, going: false }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Blow {
    Create,
    Delete,
    Container,
    Supervisor,
    System,
    Starve,
    Agent,
    Disk,
}

/// Each as often as it stands here.
const BLOWS: [Blow; 20] = {
    use Blow::{Agent, Container, Create, Delete, Disk, Starve, Supervisor, System};
    [
        Create, Create, Create, Create, Create, Create, Delete, Delete, Delete, Delete, Container, Container,
        Container, Supervisor, Supervisor, Starve, Starve, Agent, Disk, System,
    ]
};

/// What can happen without an agent; the first two also without an API server.
const BLIND: [Blow; 4] = [Blow::Container, Blow::Supervisor, Blow::Create, Blow::Delete];

struct Churn {
    c: Cluster,
    rng: Rng,
    pods: BTreeMap<String, Pod>,
    system: BTreeMap<String, Pod>,
    made: u32,
    counts: BTreeMap<Blow, u32>,
    /// The agent stays alive from now on, so that what it keeps shows.
    spare_agent: bool,
}

impl Churn {
    fn blow(&mut self, blow: Blow) {
        let done = match blow {
            Blow::Create => self.create(),
            Blow::Delete => self.delete(),
            Blow::Container => self.kill_container(),
            Blow::Supervisor => self.kill_supervisor(),
            Blow::System => self.kill_system(),
            Blow::Starve => self.starve(),
            Blow::Agent => self.kill_agent(),
            Blow::Disk => self.fill_disk(),
        };
        if done {
            *self.counts.entry(blow).or_default() += 1;
        }
    }

    fn manifest(name: &str, kind: Kind) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{churn: '1'}}}}\nspec:\n  \
             terminationGracePeriodSeconds: 1\n  {}\n",
            kind.spec()
        )
    }

    /// The API server may just be down: tried again until it answers.
    fn create(&mut self) -> bool {
        if self.pods.values().filter(|p| !p.going).count() >= MOST {
            return false;
        }
        let kind = self.rng.pick(&KINDS).unwrap();
        self.made += 1;
        let name = format!("churn-{}", self.made);
        let yaml = Self::manifest(&name, kind);
        let uid = eventually("the pod is created", || {
            let ran = self.c.try_apply(&yaml);
            ran.and_then(|_| self.c.kubectl(&format!("get pod {name} -o jsonpath='{{.metadata.uid}}'")).ok())
        });
        self.pods.insert(name, Pod::new(kind, uid));
        true
    }

    fn delete(&mut self) -> bool {
        let there: Vec<String> = self.pods.iter().filter(|(_, p)| !p.going).map(|(n, _)| n.clone()).collect();
        let Some(name) = self.rng.pick(&there) else { return false };
        let how = self.rng.pick(&["", "--now", "--force --grace-period=0"]).unwrap();
        eventually("the pod is deleted", || {
            self.c.kubectl(&format!("delete pod {name} --ignore-not-found --wait=false {how}")).ok()
        });
        self.pods.get_mut(&name).unwrap().going = true;
        true
    }

    /// One of the pods that are known to be well, of a kind.
    fn victim(&mut self, want: impl Fn(&Pod) -> bool) -> Option<String> {
        let fit =
            |(n, p): (&String, &Pod)| (p.steady && !p.going && p.kind != Kind::Brief && want(p)).then(|| n.clone());
        let all: Vec<String> = self.pods.iter().filter_map(fit).collect();
        self.rng.pick(&all)
    }

    fn kill_container(&mut self) -> bool {
        let Some(name) = self.victim(|_| true) else { return false };
        let alive = instances(&self.c.host, &self.pods[&name].uid);
        let (id, pid) = self.rng.pick(&alive.into_iter().collect::<Vec<_>>()).unwrap();
        self.c.host.must(&format!("kill -9 {pid}"));
        self.hit(&name, [id]);
        true
    }

    fn kill_supervisor(&mut self) -> bool {
        let Some(name) = self.victim(|_| true) else { return false };
        let uid = self.pods[&name].uid.clone();
        let alive = instances(&self.c.host, &uid);
        self.c.host.must(&format!("kill -9 $(cat /run/isopod/pods/{uid}/supervisor.pid)"));
        self.hit(&name, alive.into_keys());
        true
    }

    fn starve(&mut self) -> bool {
        let Some(name) = self.victim(|p| p.kind == Kind::Hungry) else { return false };
        let alive = instances(&self.c.host, &self.pods[&name].uid);
        let (id, pid) = alive.into_iter().next().unwrap();
        self.c.host.must(&format!("echo > /proc/{pid}/root/tmp/eat"));
        self.hit(&name, [id]);
        self.pods.get_mut(&name).unwrap().starved = true;
        true
    }

    fn hit(&mut self, name: &str, ids: impl IntoIterator<Item = String>) {
        let pod = self.pods.get_mut(name).unwrap();
        pod.steady = false;
        pod.starved = false;
        let before = pod.deaths.len();
        pod.deaths.extend(ids);
        assert!(pod.deaths.len() > before, "{name} had nothing to kill");
    }

    /// A container or the supervisor of the control plane.
    fn kill_system(&mut self) -> bool {
        let steady: Vec<String> = self.system.iter().filter(|(_, p)| p.steady).map(|(n, _)| n.clone()).collect();
        let Some(name) = self.rng.pick(&steady) else { return false };
        let supervisor = self.rng.next().is_multiple_of(2);
        let pod = self.system.get_mut(&name).unwrap();
        let alive = instances(&self.c.host, &pod.uid);
        let (id, pid) = alive.into_iter().next().unwrap();
        let target = if supervisor { format!("$(cat /run/isopod/pods/{}/supervisor.pid)", pod.uid) } else { pid };
        self.c.host.must(&format!("kill -9 {target}"));
        pod.steady = false;
        pod.deaths.insert(id);
        true
    }

    /// The agent dies; before it is back something else happens, too.
    fn kill_agent(&mut self) -> bool {
        if self.spare_agent {
            return false;
        }
        self.c.kill_agent();
        // An API server that has just been killed comes back with the agent only.
        let answers = self.system.values().all(|p| p.steady);
        let possible = if answers { &BLIND[..] } else { &BLIND[..2] };
        for _ in 0..self.rng.next() % 3 {
            let blow = self.rng.pick(possible).unwrap();
            self.blow(blow);
        }
        self.c.up();
        true
    }

    /// The disk of the agent and of the store is full while a container has to be started again.
    fn fill_disk(&mut self) -> bool {
        let Some(name) = self.victim(|_| true) else { return false };
        let log = self.c.host.path("/var/log/isopod/agent.log");
        let before = fs::read(&log).unwrap().len();
        self.c.host.must(
            // Something may be written between the two.
            "for i in $(seq 100); do \
                 mount -o remount,size=$(df --output=used -k /var/lib/isopod | tail -n 1 | tr -d ' ')k /var/lib/isopod \
                     2> /dev/null && exit; \
             done; exit 1",
        );
        let uid = self.pods[&name].uid.clone();
        let alive = instances(&self.c.host, &uid);
        let (id, pid) = alive.iter().next().unwrap();
        self.c.host.must(&format!("kill -9 {pid}"));
        self.hit(&name, [id.clone()]);
        // Refused or not: what the API server has acknowledged is there later.
        self.made += 1;
        let late = format!("churn-{}", self.made);
        let taken = self.c.try_apply(&Self::manifest(&late, Kind::Plain));
        // A pod that has gone meanwhile may have left room.
        eventually("the agent says that the disk is full, or finds room", || {
            let text = fs::read(&log).unwrap();
            let text = String::from_utf8_lossy(&text[before..]).into_owned();
            let again = instances(&self.c.host, &uid).keys().any(|id| !alive.contains_key(id));
            if again || text.contains("No space left on device") { Ok(()) } else { Err(text) }
        });
        self.c.host.must("mount -o remount,size=2g /var/lib/isopod");
        // What happened meanwhile is known to the agent alone until it is written down.
        let text = String::from_utf8_lossy(&fs::read(&log).unwrap()[before..]).into_owned();
        for (dir, failed) in text.lines().filter_map(not_saved).collect::<BTreeMap<_, _>>() {
            let dir = self.c.host.inside(dir);
            eventually("the agent saves what it could not", || {
                let saved = fs::metadata(dir.join("state.json")).and_then(|file| file.modified());
                if !dir.exists() || saved.as_ref().is_ok_and(|at| *at >= failed) { Ok(()) } else { Err(saved) }
            });
        }
        let uid = eventually("the API server answers again", || {
            self.c.kubectl(&format!("get pod {late} --ignore-not-found -o jsonpath='{{.metadata.uid}}'")).ok()
        });
        assert!(taken.is_err() || !uid.is_empty(), "{late} was acknowledged and is gone");
        if !uid.is_empty() {
            self.pods.insert(late, Pod::new(Kind::Plain, uid));
        }
        true
    }

    /// Waits until all is as it should be: pods that are to go have gone, others are well, restarts are those we made.
    fn settle(&mut self) {
        eventually_within(Duration::from_secs(90), "everything is well again", || {
            let seen = self.c.kubectl("get pods -A -o json").ok().map_err(|ran| vec![format!("{ran:?}")])?;
            let seen: Value = serde_json::from_str(&seen).unwrap();
            let wrong = self.wrong(seen["items"].as_array().unwrap());
            if wrong.is_empty() { Ok(()) } else { Err(wrong) }
        });
        self.pods.retain(|_, p| !p.going);
        self.pods.values_mut().chain(self.system.values_mut()).for_each(|p| p.steady = true);
    }

    /// What differs from what is expected.
    fn wrong(&self, seen: &[Value]) -> Vec<String> {
        let mut wrong = Vec::new();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let seen: BTreeMap<String, &Value> = seen.iter().map(|p| (text(&p["metadata"]["name"]), p)).collect();
        for (name, pod) in self.pods.iter().chain(&self.system) {
            match (seen.get(name), pod.going) {
                (None, true) => {}
                (Some(_), true) => wrong.push(format!("{name} is still there")),
                (None, false) => wrong.push(format!("{name} is gone")),
                (Some(now), false) => wrong.extend(unwell(name, pod, now)),
            }
        }
        let known = |name: &&String| !self.pods.contains_key(*name) && !self.system.contains_key(*name);
        wrong.extend(seen.keys().filter(known).map(|name| format!("{name} is a stranger")));
        wrong
    }
}

/// What is wrong with a pod that should run or have ended.
fn unwell(name: &str, pod: &Pod, now: &Value) -> Option<String> {
    let status = &now["status"];
    if pod.kind == Kind::Brief {
        return (status["phase"] != "Succeeded").then(|| format!("{name}: {status}"));
    }
    let ready =
        status["conditions"].as_array().into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True");
    let sidecars = status["initContainerStatuses"].as_array().into_iter().flatten().filter(|s| s["name"] == "s");
    let counted = status["containerStatuses"].as_array().into_iter().flatten().chain(sidecars);
    let restarts: u64 = counted.map(|s| s["restartCount"].as_u64().unwrap_or_default()).sum();
    let wanted = u64::try_from(pod.deaths.len()).unwrap();
    let why = &status["containerStatuses"][0]["lastState"]["terminated"]["reason"];
    if !ready || restarts != wanted || (pod.starved && why != "OOMKilled") {
        return Some(format!("{name} ({:?}): {restarts} restarts after {wanted} deaths, {status}", pod.kind));
    }
    None
}

/// A pod's containers that live, by id, and the PID of the first process of each; told by the kernel.
fn instances(host: &Host, uid: &str) -> BTreeMap<String, String> {
    let script = format!(
        "for d in $(find /sys/fs/cgroup/pids -mindepth 2 -type d -path '*pod{uid}/*'); do \
         n=${{d##*/}}; [ ${{#n}} = 64 ] || continue; p=$(sort -n $d/cgroup.procs | head -n 1); [ -z \"$p\" ] || echo $n $p; done; true"
    );
    let text = host.must(&script);
    text.lines().filter_map(|line| line.split_once(' ')).map(|(id, pid)| (id.to_owned(), pid.to_owned())).collect()
}

/// Descriptors and kilobytes of anonymous memory of the agent.
fn agent_holds(c: &Cluster) -> (u64, u64) {
    let pid = c.agent_pid();
    let text = c.host.must(&format!("ls /proc/{pid}/fd | wc -l; awk '/^RssAnon:/{{print $2}}' /proc/{pid}/status"));
    let mut numbers = text.lines().map(|line| line.trim().parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// A cluster with its state on a small disk of its own, once it is warm.
fn start(net: &mut Net) -> Churn {
    let host = net.host("one");
    fs::write(host.path("/etc/isopod/config.yaml"), CONFIGURATION).unwrap();
    host.must("mkdir -p /var/lib/isopod && mount -t tmpfs -o size=2g disk /var/lib/isopod");
    let c = Cluster::start(&host);
    c.k("create configmap churn --from-literal=key=value");
    let mut churn = Churn {
        c,
        rng: Rng(setting("ISOPOD_CHURN_SEED", 7)),
        pods: BTreeMap::new(),
        system: BTreeMap::new(),
        made: 0,
        counts: BTreeMap::new(),
        spare_agent: false,
    };
    let mirrors = eventually("mirrors of the control plane", || {
        let seen = churn.c.get("pods -n kube-system");
        let seen = seen["items"].as_array().unwrap().clone();
        if seen.len() == 3 { Ok(seen) } else { Err(seen.len()) }
    });
    for pod in mirrors {
        let uid = pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str().unwrap();
        let name = pod["metadata"]["name"].as_str().unwrap();
        churn.system.insert(name.to_owned(), Pod::new(Kind::Plain, uid.to_owned()));
    }
    for kind in KINDS {
        churn.c.apply(&Churn::manifest(&format!("warm-{kind:?}").to_lowercase(), kind));
    }
    churn.c.k("wait pod --for=jsonpath='{.status.containerStatuses[0].started}'=true --timeout=60s warm-pair warm-fed");
    churn.c.k("delete pods --all --now");
    churn.settle();
    churn
}

#[test]
fn nothing_leaks_sticks_or_is_miscounted() {
    let span = Duration::from_secs(setting("ISOPOD_CHURN_SECONDS", 25));
    let mut net = Net::new();
    let mut churn = start(&mut net);
    let before = Snapshot::settled(&churn.c.host);
    let (fds, memory) = agent_holds(&churn.c);
    let started = Instant::now();
    // The first rounds have something of everything.
    let mut first = BLOWS.to_vec();
    (1..first.len()).rev().for_each(|i| first.swap(i, usize::try_from(churn.rng.next() % (i as u64 + 1)).unwrap()));
    let mut rounds = 0;
    for _ in 0..6 {
        churn.blow(Blow::Create);
    }
    churn.settle();
    while started.elapsed() < span || !first.is_empty() {
        churn.spare_agent = started.elapsed() > span * 3 / 4 && first.is_empty();
        for _ in 0..5 {
            let blow = first.pop().or_else(|| churn.rng.pick(&BLOWS)).unwrap();
            churn.blow(blow);
        }
        churn.settle();
        rounds += 1;
    }
    let deaths: usize = churn.pods.values().chain(churn.system.values()).map(|p| p.deaths.len()).sum();
    println!("{rounds} rounds in {:.0?}: {:?}; {deaths} deaths of those there now", started.elapsed(), churn.counts);
    churn.c.k("delete pods --all --wait=false");
    churn.pods.values_mut().for_each(|p| p.going = true);
    churn.settle();
    converges(&churn.c.host, &before);
    let kept = churn.c.host.must("ls /var/lib/isopod/starts | wc -l");
    assert!(kept.trim().parse::<u32>().unwrap() <= 570, "{kept} start records");
    let (fds_now, memory_now) = agent_holds(&churn.c);
    println!("agent: {fds} -> {fds_now} descriptors, {memory} -> {memory_now} KiB of anonymous memory");
    assert!(fds_now <= fds + 8, "{fds} -> {fds_now} descriptors");
    assert!(memory_now <= memory * 3 / 2 + 16 * 1024, "{memory} -> {memory_now} KiB");
}
