//! Where things lie on this machine.
//!
//! Everything hangs under one root (`--root-dir`, default `/`); names that cannot live in a directory (cgroups, links,
//! nftables tables) derive from [`Paths::instance`], so that several agents live on one machine.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The layout under one root directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    root: PathBuf,
    suffix: Option<String>,
}

impl Paths {
    /// The layout under `root`, which is made absolute first.
    pub fn new(root: impl AsRef<Path>) -> Self {
        let root = root.as_ref();
        let absolute = std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf());
        let root = absolute.canonicalize().unwrap_or(absolute);
        let suffix = (root != Path::new("/")).then(|| {
            let sum = Sha256::digest(root.as_os_str().as_encoded_bytes());
            sum.iter().take(3).map(|b| format!("{b:02x}")).collect()
        });
        Self { root, suffix }
    }

    /// The root itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `etc/isopod`.
    pub fn etc(&self) -> PathBuf {
        self.root.join("etc/isopod")
    }

    /// `etc/isopod/pki`.
    pub fn pki(&self) -> PathBuf {
        self.etc().join("pki")
    }

    /// `etc/isopod/manifests`, the static pod directory.
    pub fn manifests(&self) -> PathBuf {
        self.etc().join("manifests")
    }

    /// `etc/isopod/config.yaml`, the `KubeletConfiguration`.
    pub fn config(&self) -> PathBuf {
        self.etc().join("config.yaml")
    }

    /// `etc/isopod/NAME.conf`, a kubeconfig.
    pub fn kubeconfig(&self, name: &str) -> PathBuf {
        self.etc().join(format!("{name}.conf"))
    }

    /// `var/lib/isopod`.
    pub fn state(&self) -> PathBuf {
        self.root.join("var/lib/isopod")
    }

    /// Volumes of StorageClass `local`.
    pub fn local_volumes(&self) -> PathBuf {
        self.state().join("volumes")
    }

    /// Private key of this node's WireGuard, where pods' packets are encrypted.
    pub fn wireguard_key(&self) -> PathBuf {
        self.state().join("network/wireguard.key")
    }

    /// Unpacked images.
    pub fn image_store(&self) -> PathBuf {
        self.state().join("image-store")
    }

    /// `var/lib/isopod/images`: image archives and the content store.
    pub fn images(&self) -> PathBuf {
        self.state().join("images")
    }

    /// `var/lib/isopod/pods`.
    pub fn pods(&self) -> PathBuf {
        self.state().join("pods")
    }

    /// `var/lib/isopod/pods/UID`.
    pub fn pod(&self, uid: &str) -> PathBuf {
        self.pods().join(uid)
    }

    /// `var/lib/isopod/starts`: records of how long each phase of each pod's start took.
    pub fn starts(&self) -> PathBuf {
        self.state().join("starts")
    }

    /// `var/lib/kubelet`: where plugins of other people look for their sockets and mount their volumes.
    pub fn plugins_root(&self) -> PathBuf {
        self.root.join("var/lib/kubelet")
    }

    /// `run/isopod`.
    pub fn run(&self) -> PathBuf {
        self.root.join("run/isopod")
    }

    /// `run/isopod/pods`.
    pub fn run_pods(&self) -> PathBuf {
        self.run().join("pods")
    }

    /// `run/isopod/pods/UID`: the supervisor's directory.
    pub fn run_pod(&self, uid: &str) -> PathBuf {
        self.run_pods().join(uid)
    }

    /// `var/log/pods`.
    pub fn logs(&self) -> PathBuf {
        self.root.join("var/log/pods")
    }

    /// `var/log/pods/NAMESPACE_NAME_UID`.
    pub fn pod_logs(&self, namespace: &str, name: &str, uid: &str) -> PathBuf {
        self.logs().join(format!("{namespace}_{name}_{uid}"))
    }

    /// `isopod`, or `isopod-XXXXXX` when the root is not `/`. The cgroup root and the nftables table carry this name.
    pub fn instance(&self) -> String {
        match &self.suffix {
            None => "isopod".into(),
            Some(s) => format!("isopod-{s}"),
        }
    }

    /// Name of the pod bridge: `isopod0`, or `isoXXXXXX`.
    pub fn bridge(&self) -> String {
        match &self.suffix {
            None => "isopod0".into(),
            Some(s) => format!("iso{s}"),
        }
    }

    /// Short prefix for other links (at most 15 bytes with what follows): `iso` or `isoXXXXXX`.
    pub fn link_prefix(&self) -> String {
        match &self.suffix {
            None => "iso".into(),
            Some(s) => format!("iso{s}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_root_has_plain_names() {
        let p = Paths::new("/");
        assert_eq!(p.instance(), "isopod");
        assert_eq!(p.bridge(), "isopod0");
        assert_eq!(p.manifests(), Path::new("/etc/isopod/manifests"));
        assert_eq!(p.pod_logs("ns", "p", "u"), Path::new("/var/log/pods/ns_p_u"));
    }

    #[test]
    fn another_root_has_its_own_names() {
        let dir = tempfile::tempdir().unwrap();
        let p = Paths::new(dir.path());
        assert_eq!(p.instance().len(), "isopod-".len() + 6);
        assert_eq!(p.bridge().len(), 9);
        assert_eq!(p, Paths::new(dir.path().join(".")));
    }
}
