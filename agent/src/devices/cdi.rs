//! The Container Device Interface: what `vendor/class=device` stands for, from specs on this machine.

use std::{fs, path::Path};

use serde::Deserialize;

use super::inject::{Injection, Mount, Node};

/// Where specs lie; a later directory wins.
pub(super) const DIRECTORIES: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    kind: String,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Edits {
    env: Vec<String>,
    device_nodes: Vec<DeviceNode>,
    mounts: Vec<SpecMount>,
    hooks: Vec<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DeviceNode {
    path: String,
    #[serde(default)]
    host_path: Option<String>,
    #[serde(default)]
    permissions: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SpecMount {
    host_path: String,
    container_path: String,
    #[serde(default)]
    options: Vec<String>,
}

impl Edits {
    fn add(&self, to: &mut Injection) -> Result<(), String> {
        if !self.hooks.is_empty() {
            return Err("it has hooks, which this runtime does not run".into());
        }
        let variables = self.env.iter().filter_map(|e| e.split_once('='));
        to.env.extend(variables.map(|(k, v)| (k.to_string(), v.to_string())));
        to.nodes.extend(self.device_nodes.iter().map(|d| Node {
            host: d.host_path.as_ref().unwrap_or(&d.path).into(),
            container: d.path.clone(),
            permissions: d.permissions.clone().unwrap_or_else(|| "rwm".into()),
        }));
        to.mounts.extend(self.mounts.iter().map(|m| Mount {
            host: m.host_path.clone().into(),
            container: m.container_path.clone(),
            read_only: m.options.iter().any(|o| o == "ro"),
        }));
        Ok(())
    }
}

fn specs(directories: &[&Path]) -> Vec<Spec> {
    let mut all = Vec::new();
    for dir in directories.iter().rev() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if !path.extension().is_some_and(|e| e == "json" || e == "yaml" || e == "yml") {
                continue;
            }
            // JSON is YAML.
            match fs::read_to_string(&path).map(|text| serde_yaml_ng::from_str(&text)) {
                Ok(Ok(spec)) => all.push(spec),
                Ok(Err(error)) => tracing::warn!(path = %path.display(), %error, "CDI spec"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "CDI spec"),
            }
        }
    }
    all
}

/// What these names put into a container.
pub(super) fn resolve(names: &[String], directories: &[&Path]) -> Result<Injection, String> {
    let mut injection = Injection::default();
    if names.is_empty() {
        return Ok(injection);
    }
    let specs = specs(directories);
    let mut used: Vec<&str> = Vec::new();
    for name in names {
        let unresolved = || format!("unresolvable CDI devices {name}");
        let (kind, device) = name.split_once('=').ok_or_else(unresolved)?;
        let found = specs.iter().filter(|s| s.kind == kind);
        let found = found.filter_map(|s| Some((s, s.devices.iter().find(|d| d.name == device)?))).next();
        let (spec, device) = found.ok_or_else(unresolved)?;
        let refused = |e: String| format!("CDI device {name}: {e}");
        if !used.contains(&kind) {
            used.push(kind);
            spec.container_edits.add(&mut injection).map_err(refused)?;
        }
        device.container_edits.add(&mut injection).map_err(refused)?;
    }
    Ok(injection)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_for_what_specs_say() {
        let dir = tempfile::tempdir().unwrap();
        let text = "cdiVersion: 0.6.0\nkind: test.dev/gpu\ncontainerEdits: {env: [ALL=1]}\ndevices:\n\
                    - name: one\n  containerEdits:\n    env: [GPU=one]\n    deviceNodes: [{path: /dev/gpu, hostPath: /dev/null}]\n\
                    \x20   mounts: [{hostPath: /opt, containerPath: /drv, options: [ro, bind]}]\n\
                    - name: hooked\n  containerEdits: {hooks: [{hookName: createContainer, path: /bin/true}]}\n";
        fs::write(dir.path().join("gpu.yaml"), text).unwrap();
        fs::write(dir.path().join("bad.json"), "{").unwrap();
        let of = |name: &str| resolve(&[name.to_string()], &[dir.path()]);
        let one = of("test.dev/gpu=one").unwrap();
        assert_eq!(one.env, [("ALL", "1"), ("GPU", "one")].map(|(k, v)| (k.to_string(), v.to_string())).into());
        let node = Node { host: "/dev/null".into(), container: "/dev/gpu".into(), permissions: "rwm".into() };
        assert_eq!(one.nodes, [node]);
        assert!(one.mounts[0].read_only);
        assert_eq!(of("test.dev/gpu=two").unwrap_err(), "unresolvable CDI devices test.dev/gpu=two");
        assert!(of("nonsense").is_err());
        assert!(of("test.dev/gpu=hooked").unwrap_err().contains("hooks"));
    }
}
