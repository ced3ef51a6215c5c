//! Small images, built here: busybox with its applets, in docker-archive form.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// An image to be built.
pub struct Image {
    name: String,
    files: BTreeMap<String, (u32, Vec<u8>)>,
    links: BTreeMap<String, String>,
    /// Layers that are complete.
    below: Vec<Vec<u8>>,
    config: Value,
}

impl Image {
    /// An image with nothing in it.
    pub fn scratch(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            files: BTreeMap::new(),
            links: BTreeMap::new(),
            below: Vec::new(),
            config: json!({}),
        }
    }

    /// busybox with all applets, a root user and `sh` as command.
    pub fn busybox(name: &str) -> Self {
        let busybox = fs::read("/bin/busybox").expect("busybox-static is not installed");
        let mut image = Self::scratch(name).file("bin/busybox", 0o755, &busybox);
        let applets = Command::new("/bin/busybox").arg("--list").output().unwrap();
        for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|applet| *applet != "busybox") {
            image.links.insert(format!("bin/{applet}"), "busybox".to_owned());
        }
        image
            .file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
            .file("etc/group", 0o644, b"root:x:0:\nnobody:x:65534:\n")
            .file("tmp/.keep", 0o644, b"")
            .config("Cmd", json!(["sh"]))
            .config("Env", json!(["PATH=/bin:/sbin:/usr/bin:/usr/sbin"]))
    }

    /// An HTTP server on port 8080 that answers the pod's name, and anything put under /www.
    pub fn web(name: &str) -> Self {
        let script = "#!/bin/sh\nmkdir -p /www\nhostname > /www/index.html\nmkdir -p /www/cgi-bin\n\
                      echo \"started $(hostname)\"\ntrap 'exit 0' TERM\nhttpd -f -v -p 8080 -h /www &\nwait\n";
        Self::busybox(name).file("bin/web", 0o755, script.as_bytes()).config("Cmd", json!(["/bin/web"]))
    }

    /// Adds a file.
    pub fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Self {
        self.files.insert(path.to_owned(), (mode, content.to_vec()));
        self
    }

    /// What is added from here on is in another layer.
    pub fn next_layer(mut self) -> Self {
        self.below.push(self.layer());
        self.files.clear();
        self.links.clear();
        self
    }

    /// Sets a field of the image's `config` (Cmd, Entrypoint, Env, User, ...).
    pub fn config(mut self, field: &str, value: Value) -> Self {
        self.config[field] = value;
        self
    }

    fn layer(&self) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let header = |kind, mode, size| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(size);
            header
        };
        for (path, (mode, content)) in &self.files {
            let mut header = header(tar::EntryType::Regular, *mode, content.len() as u64);
            builder.append_data(&mut header, path, &content[..]).unwrap();
        }
        for (path, target) in &self.links {
            let mut header = header(tar::EntryType::Symlink, 0o777, 0);
            builder.append_link(&mut header, path, target).unwrap();
        }
        builder.into_inner().unwrap()
    }

    /// Writes the image as a docker archive.
    pub fn save(&self, path: &Path) {
        let mut layers = self.below.clone();
        layers.push(self.layer());
        let diff_ids: Vec<_> = layers.iter().map(|layer| format!("sha256:{}", hex(layer))).collect();
        let names: Vec<_> = (0..layers.len()).map(|n| format!("layer-{n}.tar")).collect();
        let history: Vec<_> = layers.iter().map(|_| json!({"created_by": "tests"})).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": history,
        })
        .to_string();
        let manifest = json!([{"Config": "config.json", "RepoTags": [self.name], "Layers": names}]).to_string();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).unwrap();
        }
        let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
        let fixed = [("manifest.json", manifest.as_bytes()), ("config.json", config.as_bytes())];
        let layers = names.iter().map(String::as_str).zip(layers.iter().map(Vec::as_slice));
        for (name, content) in fixed.into_iter().chain(layers) {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(0);
            builder.append_data(&mut header, name, content).unwrap();
        }
        builder.finish().unwrap();
    }
}

/// The hexadecimal SHA-256 of some bytes.
pub fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
