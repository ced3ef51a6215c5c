//! The managers together, on machines made up for it.

use std::fs;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{machine::tests::machine, *};
use crate::{devices::Devices, metrics::Metrics};

const GB: i64 = 1 << 30;

struct World {
    dir: tempfile::TempDir,
    shape: (u32, u32, u32, u32),
    config: String,
}

impl World {
    fn new(shape: (u32, u32, u32, u32), config: &str) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), shape, config: config.into() }
    }

    fn try_open(&self) -> Result<Managers, String> {
        let text = format!("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{}\n", self.config);
        let k = KubeletConfiguration::parse(&text).unwrap();
        let (sockets, nodes, cores, threads) = self.shape;
        let left_out = |resource: &str| if resource == "cpu" { 1000 } else { GB * 1000 };
        let settings = Settings::read(&k)?;
        Managers::on(machine(sockets, nodes, cores, threads), settings, &k, self.dir.path().into(), left_out)
    }

    fn open(&self) -> Managers {
        self.try_open().unwrap()
    }

    fn admit(&self, m: &Managers, pod: &Pod) -> Result<(), (&'static str, String)> {
        m.admit(pod, &Devices::open(self.dir.path().join("devices")), &Metrics::default())
    }
}

/// A guaranteed pod; init containers and containers by their CPUs.
fn pod(uid: &str, init: &[&str], containers: &[&str]) -> Pod {
    let one = |(at, cpu): (usize, &&str), kind: &str| {
        let amounts = json!({"cpu": cpu, "memory": "1Gi"});
        json!({"name": format!("{kind}{at}"), "resources": {"requests": amounts, "limits": amounts}})
    };
    let all = |list: &[&str], kind: &str| list.iter().enumerate().map(|c| one(c, kind)).collect::<Vec<Value>>();
    serde_json::from_value(json!({"metadata": {"uid": uid, "name": uid},
        "spec": {"initContainers": all(init, "i"), "containers": all(containers, "c")}}))
    .unwrap()
}

/// What all have: `pod/container=cpus` and what is shared.
fn given(m: &Managers) -> String {
    let state = m.state.lock();
    let own = state.exclusive.iter().flat_map(|(pod, all)| all.iter().map(move |(c, cpus)| (pod, c, cpus)));
    let own: Vec<String> = own.map(|(pod, c, cpus)| format!("{pod}/{c}={}", list(cpus))).collect();
    format!("{} shared={}", own.join(" "), list(&state.shared))
}

const STATIC: &str = "cpuManagerPolicy: static";

#[test]
fn whole_cpus_of_guaranteed_pods_are_their_own() {
    let w = World::new((2, 1, 4, 2), STATIC);
    let m = w.open();
    for (pod, want) in [
        (pod("a", &[], &["2"]), "a/c0=1,9 shared=0,2-8,10-15"),
        (pod("b", &[], &["1500m"]), "a/c0=1,9 shared=0,2-8,10-15"),
        // Socket 1 is free as a whole.
        (pod("c", &[], &["8"]), "a/c0=1,9 c/c0=4-7,12-15 shared=0,2-3,8,10-11"),
        // What an init container had is its successor's; a core that is in use is used up first.
        (pod("d", &["2"], &["1", "1"]), "a/c0=1,9 c/c0=4-7,12-15 d/c0=8 d/c1=2 d/i0=2,10 shared=0,3,11"),
    ] {
        w.admit(&m, &pod).unwrap();
        assert_eq!(given(&m), want, "{:?}", pod.metadata.uid);
    }
    let (reason, message) = w.admit(&m, &pod("e", &[], &["1", "2"])).unwrap_err();
    let want = "Pod was rejected: Allocate failed due to not enough cpus available to satisfy request: requested=2, \
                available=1, which is unexpected";
    assert_eq!((reason, message.as_str()), ("UnexpectedAdmissionError", want));
    // Nothing of it stays, and the next life knows all the rest.
    let before = given(&m);
    assert!(!before.contains("e/"));
    assert_eq!((m.cpus_of("x", "y").unwrap(), m.counts()), ("0,3,11".into(), (3, 13)));
    let again = w.open();
    assert_eq!(given(&again), before);
    w.admit(&again, &pod("a", &[], &["2"])).unwrap();
    assert_eq!(given(&again), before);
    again.retain(&["a".into()]);
    assert_eq!(given(&w.open()), "a/c0=1,9 shared=0,2-8,10-15");
}

#[test]
fn whole_cores_only() {
    let w = World::new((1, 1, 4, 2), "cpuManagerPolicy: static\ncpuManagerPolicyOptions: {full-pcpus-only: 'true'}");
    let m = w.open();
    let refused = |pod: &Pod| {
        let (reason, message) = w.admit(&m, pod).unwrap_err();
        assert_eq!(reason, "SMTAlignmentError");
        message
    };
    let text = "Pod was rejected: SMT Alignment Error: requested 3 cpus not multiple cpus per core = 2";
    assert_eq!(refused(&pod("a", &[], &["3"])), text);
    w.admit(&m, &pod("b", &[], &["2"])).unwrap();
    let text = refused(&pod("c", &[], &["6"]));
    assert!(text.ends_with("available physical CPUs = 4, requested CPUs = 6, CPUs per core = 2"), "{text}");
}

#[test]
fn all_of_a_container_comes_from_one_node() {
    let config = "cpuManagerPolicy: static\nmemoryManagerPolicy: Static\ntopologyManagerPolicy: single-numa-node\n\
                  reservedMemory: [{numaNode: 0, limits: {memory: 1Gi}}]";
    let w = World::new((2, 1, 4, 1), config);
    let m = w.open();
    // Node 0 keeps one processor for the system and has three.
    w.admit(&m, &pod("a", &[], &["2"])).unwrap();
    w.admit(&m, &pod("b", &[], &["2"])).unwrap();
    assert_eq!(given(&m), "a/c0=1-2 b/c0=4-5 shared=0,3,6-7");
    assert_eq!((m.nodes_of("a", "c0"), m.nodes_of("b", "c0")), (Some("0".into()), Some("1".into())));
    assert_eq!(m.affinity("b", "c0"), Some(hints::Mask(2)));
    let (reason, message) = w.admit(&m, &pod("c", &[], &["3"])).unwrap_err();
    let want = "Pod was rejected: Resources cannot be allocated with Topology locality";
    assert_eq!((reason, message.as_str()), ("TopologyAffinityError", want));
    let file = fs::read_to_string(w.dir.path().join("memory_manager_state")).unwrap();
    let file: Value = serde_json::from_str(&file).unwrap();
    assert_eq!(file["entries"]["b"]["c0"], json!([{"numaAffinity": [1], "type": "memory", "size": GB}]));
    assert_eq!(file["machineState"]["1"]["memoryMap"]["memory"]["reserved"], GB);
    assert_eq!(file["machineState"]["0"]["memoryMap"]["memory"]["systemReserved"], GB);
    // In a new life, too, but not on another machine.
    assert_eq!(given(&w.open()), given(&m));
    assert_eq!(w.open().memory("b", "c0"), m.memory("b", "c0"));
    let other = World { shape: (2, 1, 5, 1), ..w };
    let error = other.try_open().err().unwrap();
    assert!(
        error.contains("current set of available CPUs \"0-9\" doesn't match with CPUs in state \"0-7\""),
        "{error}"
    );
}

#[test]
fn a_pod_as_a_whole_or_its_containers_one_by_one() {
    let config = |scope: &str| format!("{STATIC}\ntopologyManagerPolicy: restricted\ntopologyManagerScope: {scope}");
    let two = pod("a", &[], &["2", "2"]);
    let w = World::new((2, 1, 4, 1), &config("container"));
    let m = w.open();
    w.admit(&m, &two).unwrap();
    assert_eq!(given(&m), "a/c0=1-2 a/c1=4-5 shared=0,3,6-7");
    let w = World::new((2, 1, 4, 1), &config("pod"));
    let m = w.open();
    w.admit(&m, &two).unwrap();
    assert_eq!(given(&m), "a/c0=4-5 a/c1=6-7 shared=0-3");
}

#[test]
fn reserved_cpus_are_shared_unless_that_is_strict() {
    let config = |strict: &str| {
        format!("{STATIC}\nreservedSystemCPUs: 0-1\ncpuManagerPolicyOptions: {{strict-cpu-reservation: '{strict}'}}")
    };
    let w = World::new((1, 1, 4, 1), &config("true"));
    assert_eq!(given(&w.open()), " shared=2-3");
    let w = World { config: config("false"), ..w };
    let error = w.try_open().err().unwrap();
    assert!(error.contains("please drain node and remove policy state file"), "{error}");
    assert!(error.contains("not all reserved cpus: \"0-1\" are present in defaultCpuSet: \"2-3\""), "{error}");
    let none = World { config: String::new(), ..w };
    assert!(none.try_open().err().unwrap().contains("configured policy \"none\" differs from state checkpoint policy"));
    fs::remove_file(none.dir.path().join("cpu_manager_state")).unwrap();
    let m = none.open();
    assert_eq!((m.cpus_of("a", "b"), m.nodes_of("a", "b"), m.gives_cpus()), (None, None, false));
    let file = fs::read_to_string(none.dir.path().join("cpu_manager_state")).unwrap();
    assert_eq!(file, r#"{"policyName":"none","defaultCpuSet":"","checksum":1353318690}"#);
}
