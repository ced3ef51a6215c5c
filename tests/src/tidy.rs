//! Which crate may use which: the walls of the house, read from `cargo metadata`.

use std::{collections::BTreeMap, process::Command};

use serde_json::Value;

/// Crate -> workspace crates it may depend on.
const ALLOWED: [(&str, &[&str]); 10] = [
    ("isopod-api", &[]),
    ("isopod-store", &[]),
    ("isopod-apiserver", &["isopod-api", "isopod-store"]),
    ("isopod-client", &["isopod-api"]),
    ("isopod-scheduler", &["isopod-api", "isopod-client"]),
    ("isopod-controllers", &["isopod-api", "isopod-client"]),
    ("isopod-runtime", &[]),
    ("isopod-agent", &["isopod-api", "isopod-client", "isopod-runtime"]),
    ("isopod-netproxy", &["isopod-api"]),
    ("isopod-tests", &[]),
];

/// Every forbidden dependency, as a sentence.
pub fn violations() -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let allowed: BTreeMap<_, _> = ALLOWED.into_iter().collect();
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        // The binary alone may use them all.
        let Some(may) = allowed.get(name) else { continue };
        for dependency in package["dependencies"].as_array().unwrap() {
            let on = dependency["name"].as_str().unwrap();
            if on.starts_with("isopod") && !may.contains(&on) {
                found.push(format!("{name} must not depend on {on}"));
            }
        }
    }
    found
}
