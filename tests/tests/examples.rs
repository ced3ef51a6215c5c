//! What manifests/examples says it does, it does; and the volumes of StorageClass `local` live and go as they should.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use isopod_tests::{Cluster, Net, eventually};

#[test]
fn every_example_runs_and_can_be_applied_again() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/examples");
    let mut files: Vec<_> = fs::read_dir(examples).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 5, "{files:?}");
    for file in &files {
        c.apply(&fs::read_to_string(file).unwrap());
    }
    for what in ["deployment/web", "statefulset/database", "daemonset/node-logger"] {
        c.k(&format!("rollout status {what} --timeout=60s"));
    }
    c.k("wait --for=condition=Complete job/parts --timeout=60s");
    assert_eq!(c.k("logs -l job-name=parts --tail=-1").lines().filter(|l| l.ends_with(" done")).count(), 4);
    for file in &files {
        // A list that kubectl replaces as a whole, as a StatefulSet's claim templates, is "configured" each time.
        fs::copy(file, c.host.path("/etc/isopod/again.yaml")).unwrap();
        assert_eq!(c.k("diff -f /etc/isopod/again.yaml"), "");
    }
}

#[test]
fn a_local_volume_outlives_its_pod_and_goes_with_its_claim() {
    let mut net = Net::new();
    let host = net.host("one");
    let c = Cluster::start(&host);
    c.apply(include_str!("../../manifests/examples/database.yaml"));
    c.k("rollout status statefulset/database --timeout=60s");
    let volume = c.k("get pvc data-database-0 -o jsonpath={.spec.volumeName}");
    assert_eq!(c.k("get sc local -o jsonpath={.provisioner}"), "isopod.dev/local");
    let directory = host.path(&format!("/var/lib/isopod/volumes/{volume}_default_data-database-0"));
    let lines = || fs::read_to_string(directory.join("log")).unwrap_or_default().lines().count();
    assert_eq!(lines(), 1);
    c.k("delete pod database-0");
    eventually("the same volume under the next pod", || if lines() == 2 { Ok(()) } else { Err(c.k("get pods")) });
    c.k("rollout status statefulset/database --timeout=60s");
    assert_eq!(c.k("get pvc data-database-0 -o jsonpath={.spec.volumeName}"), volume);
    c.k("delete statefulset database");
    eventually("claims, volumes and their directories are gone", || {
        let left = c.kubectl("get pvc,pv,pods -A -o name -l '!component'").out;
        let directories = fs::read_dir(host.path("/var/lib/isopod/volumes")).unwrap().count();
        if left.trim().is_empty() && directories == 0 {
            Ok(())
        } else {
            Err(format!("{left}{directories} directories"))
        }
    });
}
