//! What Helm charts render, applied by kubectl twice: the second time nothing changes, and nothing ever differs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use isopod_tests::{Cluster, Net, eventually};

/// Applies a directory of `charts/` until nothing is left to do, in both ways kubectl has.
fn install(c: &Cluster, chart: &str) {
    let from = format!("{}/charts/{chart}", env!("CARGO_MANIFEST_DIR"));
    let to = format!("/etc/isopod/charts/{chart}");
    c.host.must(&format!("mkdir -p {to}"));
    for file in std::fs::read_dir(&from).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, c.host.path(&format!("{to}/{}", path.file_name().unwrap().to_str().unwrap()))).unwrap();
    }
    let generations = || {
        c.k(&format!("get -n charts -f {to} -o jsonpath='{{range .items[*]}}{{.kind}}/{{.metadata.name}} {{.metadata.generation}}\n{{end}}'"))
    };
    let first = c.k(&format!("apply -n charts -f {to}"));
    assert!(first.lines().all(|line| line.ends_with(" created")), "{chart}: {first}");
    let before = generations();
    // "configured" where kubectl sends a list or selector that is one value with defaults inside: nothing changes.
    c.k(&format!("apply -n charts -f {to}"));
    assert_eq!(generations(), before, "{chart}");
    let diff = c.kubectl(&format!("diff -n charts -f {to}"));
    assert_eq!((diff.code, diff.out.as_str()), (0, ""), "{chart}");
    c.k(&format!("apply -n charts --server-side --force-conflicts -f {to}"));
    let before = generations();
    c.k(&format!("apply -n charts --server-side -f {to}"));
    assert_eq!(generations(), before, "{chart}");
    let diff = c.kubectl(&format!("diff -n charts --server-side -f {to}"));
    assert_eq!((diff.code, diff.out.as_str()), (0, ""), "{chart}");
}

#[test]
fn charts_apply_twice_without_a_difference() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.k("create namespace charts");

    install(&c, "web");
    assert!(c.k("-n charts rollout status deployment/shop-web --timeout=60s").contains("successfully rolled out"));
    let environment = c.k("-n charts exec deploy/shop-web -- env");
    assert!(environment.contains("MEMORY_LIMIT=67108864") && environment.contains("LOG_LEVEL=info"), "{environment}");

    install(&c, "operator");
    c.k("wait --for=condition=Established crd/caches.example.com --timeout=20s");
    install(&c, "operator-objects");
    assert_eq!(c.k("-n charts get cache sessions -o jsonpath='{.spec.size}{.spec.mode}'"), "3Single");
    c.k("-n charts scale cache/sessions --replicas=4");
    let refused = c.kubectl("-n charts scale cache/sessions --replicas=6");
    assert!(refused.code != 0 && refused.err.contains("a single cache has at most five members"), "{}", refused.err);

    install(&c, "database");
    eventually("both claims are there", || {
        let claims = c.k("-n charts get pvc -o name");
        if claims.lines().count() == 2 { Ok(()) } else { Err(claims) }
    });
    c.k("delete namespace charts --timeout=60s");
}
