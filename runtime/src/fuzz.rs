//! Mutated configurations, processes and passwd files: nothing a bundle or an image says may panic or hang the runtime.
//!
//! Run with every `make test`, for as many cases as proptest does; `PROPTEST_CASES=1000000 cargo test -p isopod-runtime --release
//! fuzz` goes on for longer. Cases are kept small so that most of them get past the parser.

use std::path::PathBuf;

use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};

use crate::{
    config::{Config, validate_process},
    mount_options, passwd, seccomp,
};

/// One change of a document: where, and what is put there.
type Mutation = (usize, usize);

/// A configuration that has something of everything.
fn rich() -> Value {
    let mut config = serde_json::to_value(crate::spec::template()).unwrap();
    let map = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
    config["annotations"] = json!({"a": "b"});
    config["hooks"] = json!({"poststop": [{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 3}]});
    config["process"]["user"] = json!({"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3, 4]});
    config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 1, "flags": ["SCHED_FLAG_RECLAIM"]});
    config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 3});
    config["process"]["execCPUAffinity"] = json!({"initial": "0-1", "final": "0,2"});
    config["linux"]["uidMappings"] = map.clone();
    config["linux"]["gidMappings"] = map;
    config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1, "nanosecs": 2}});
    config["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "0-1,3", "flags": ["MPOL_F_STATIC_NODES"]});
    config["linux"]["netDevices"] = json!({"eth7": {"name": "net%d"}, "eth8": {}});
    config["linux"]["devices"] = json!([{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438}]);
    config["linux"]["seccomp"] = serde_json::to_value(seccomp::default_profile()).unwrap();
    config["linux"]["seccomp"]["syscalls"].as_array_mut().unwrap().truncate(3);
    config
}

/// What is put into documents: bounds, wrong types, names that mean something elsewhere.
fn words() -> Vec<Value> {
    let mut words = vec![json!(null), json!(true), json!([]), json!({}), json!([[]]), json!([{}]), json!([null])];
    words.extend([0, 1, -1, 63, 64, 4096, i64::MAX, i64::MIN].map(|n| json!(n)));
    words.extend([json!(u64::MAX), json!(1e300), json!(1i64 << 40)]);
    let texts = [
        "",
        "/",
        "..",
        "/..",
        "a/../..",
        "\0",
        "0-",
        "0-8191",
        "99999999999",
        "rbind",
        "mode=",
        "=",
        "idmap",
        "\u{10ffff}",
    ];
    words.extend(texts.map(|t| json!(t)));
    words.extend(
        ["SCMP_ACT_NOTIFY", "SCMP_ARCH_ARM", "user", "time", "SCMP_CMP_MASKED_EQ", "MPOL_LOCAL"].map(|t| json!(t)),
    );
    words.push(json!("x".repeat(5000)));
    words
}

/// Every place of a document, as JSON pointers.
fn places(value: &Value, at: &str, out: &mut Vec<String>) {
    out.push(at.to_owned());
    match value {
        Value::Array(items) => items.iter().enumerate().for_each(|(i, v)| places(v, &format!("{at}/{i}"), out)),
        Value::Object(map) => map.iter().for_each(|(k, v)| places(v, &format!("{at}/{}", k.replace('/', "~1")), out)),
        _ => {}
    }
}

fn mutate(mut document: Value, mutations: &[Mutation]) -> Value {
    let words = words();
    for (place, word) in mutations {
        let mut all = vec![];
        places(&document, "", &mut all);
        if let Some(found) = document.pointer_mut(&all[place % all.len()]) {
            *found = words[word % words.len()].clone();
        }
    }
    document
}

/// Bytes with some replaced, removed, doubled.
fn scramble(text: &[u8], changes: &[(usize, u8, u8)]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    for &(at, what, byte) in changes {
        let at = at % (bytes.len() + 1);
        match what % 4 {
            0 => bytes.insert(at, byte),
            1 if at < bytes.len() => bytes[at] = byte,
            2 => bytes.truncate(at.max(1)),
            _ => bytes.extend_from_within(at..),
        }
        bytes.truncate(1 << 16);
    }
    bytes
}

/// Everything that is done with a configuration before a process is made.
fn load(text: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, text).unwrap();
    let Ok(config) = Config::read(&path, PathBuf::from("/bundle")) else { return };
    let _ = config.rootfs();
    for mount in config.spec.mounts().iter().flatten() {
        let _ = mount_options::parse(mount.options().as_deref().unwrap_or_default());
    }
    let Some(linux) = config.spec.linux() else { return };
    let _ = mount_options::rootfs_propagation(linux.rootfs_propagation().as_deref().unwrap_or_default());
    let _ = linux.seccomp().as_ref().map(seccomp::compile);
}

#[test]
fn the_corpus_is_accepted() {
    let mut whole = rich();
    whole["linux"]["namespaces"].as_array_mut().unwrap().extend([json!({"type": "user"}), json!({"type": "time"})]);
    let config =
        Config { spec: serde_json::from_value(whole).unwrap(), bundle: "/b".into(), raw: vec![], warnings: vec![] };
    assert_eq!(config.validate().map_err(|e| e.to_string()), Ok(()));
}

proptest! {
    #[test]
    fn configurations(mutations in vec(any::<Mutation>(), 0..8)) {
        load(mutate(rich(), &mutations).to_string().as_bytes());
    }

    #[test]
    fn broken_json(changes in vec(any::<(usize, u8, u8)>(), 1..6)) {
        load(&scramble(rich().to_string().as_bytes(), &changes));
    }

    #[test]
    fn processes(mutations in vec(any::<Mutation>(), 0..6)) {
        if let Ok(process) = serde_json::from_value(mutate(rich()["process"].clone(), &mutations)) {
            let _ = validate_process(&process);
        }
    }

    #[test]
    fn passwd_files(changes in vec(any::<(usize, u8, u8)>(), 0..12), user in "(root|web|0|33|:|web:www|[0-9]{1,12}|.{0,8})") {
        let passwd = String::from_utf8_lossy(&scramble(b"root:x:0:0::/root:/bin/sh\nweb:x:33:44::/www:\n", &changes)).into_owned();
        let group = String::from_utf8_lossy(&scramble(b"root:x:0:\nwww:x:44:\naudio:x:63:web,root\n", &changes)).into_owned();
        let _ = passwd::resolve(&user, &passwd, &group);
        let _ = passwd::home_of(33, &passwd);
    }
}
