//! The control plane's static pod manifests, rendered into the manifest directory.
//!
//! A file that is already as wanted is not touched, so that its pod is not restarted. Other files there are the
//! administrator's and left alone.

use std::{fs, path::Path};

use anyhow::{Context, Result};

/// Name of the image that the agent assembles from its own executable.
pub(crate) const IMAGE: &str = concat!("isopod.local/isopod:v", env!("CARGO_PKG_VERSION"));

const TEMPLATES: [(&str, &str); 3] = [
    ("kube-apiserver.yaml", include_str!("../../manifests/control-plane/kube-apiserver.yaml")),
    ("kube-controller-manager.yaml", include_str!("../../manifests/control-plane/kube-controller-manager.yaml")),
    ("kube-scheduler.yaml", include_str!("../../manifests/control-plane/kube-scheduler.yaml")),
];

/// Replaces `{{name}}` by its value.
fn render(template: &str, values: &[(&str, String)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&format!("{{{{{name}}}}}"), value))
}

/// Writes the manifests into `dir`.
pub(crate) fn write(dir: &Path, values: &[(&str, String)]) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    for (name, template) in TEMPLATES {
        let (path, text) = (dir.join(name), render(template, values));
        if fs::read_to_string(&path).is_ok_and(|present| present == text) {
            continue;
        }
        // The agent skips names that begin with a dot, so it never sees half a manifest.
        let scratch = dir.join(format!(".{name}"));
        fs::write(&scratch, &text)
            .and_then(|()| fs::rename(&scratch, &path))
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_placeholder_is_known_and_the_result_is_a_pod() {
        let values: Vec<(&str, String)> =
            ["image", "api_port", "node_ip", "service_cidr", "pod_cidr", "pki", "data", "etc", "volumes"]
                .into_iter()
                .map(|name| (name, if name == "api_port" { "6443".to_owned() } else { format!("/{name}") }))
                .collect();
        for (name, template) in TEMPLATES {
            let text = render(template, &values);
            assert!(!text.contains("{{"), "{name}: {text}");
            let pod: k8s_openapi::api::core::v1::Pod = serde_yaml_ng::from_str(&text).unwrap();
            assert_eq!(pod.spec.unwrap().host_network, Some(true));
        }
    }
}
