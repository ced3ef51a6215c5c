//! A real registry (Debian's docker-registry) on a virtual host, with HTTP basic authentication.

use std::{fs, path::Path, process::Child};

use crate::{Host, eventually};

/// A running registry on port 5000 of a host.
pub struct Registry {
    host: Host,
    child: Child,
}

impl Registry {
    /// Starts it; `user` and `password` are wanted for everything.
    pub fn start(host: &Host, user: &str, password: &str) -> Self {
        let dir = host.path("/var/lib/registry");
        fs::create_dir_all(&dir).unwrap();
        host.must(&format!("htpasswd -Bbc /var/lib/registry/htpasswd {user} {password}"));
        let config = "version: 0.1\nlog: {level: warn}\nstorage: {filesystem: {rootdirectory: /var/lib/registry}}\n\
                      http: {addr: ':5000'}\nauth: {htpasswd: {realm: isopod, path: /var/lib/registry/htpasswd}}\n";
        fs::write(dir.join("config.yml"), config).unwrap();
        let child = host.spawn("registry.log", "docker-registry", &["serve", "/var/lib/registry/config.yml"]);
        let registry = Self { host: host.clone(), child };
        eventually("registry answers", || registry.host.sh("curl -s -o /dev/null http://127.0.0.1:5000/v2/").ok());
        registry
    }

    /// Copies a docker archive into the registry as NAME.
    pub fn push(&self, archive: &Path, name: &str, user: &str, password: &str) {
        let inside = self.host.path("/var/lib/registry/push.tar");
        fs::copy(archive, &inside).unwrap();
        self.host.must(&format!(
            "skopeo --insecure-policy copy --dest-tls-verify=false --dest-creds {user}:{password} \
             docker-archive:/var/lib/registry/push.tar docker://127.0.0.1:5000/{name}"
        ));
    }

    /// `host:port` of the registry.
    pub fn address(&self) -> String {
        format!("{}:5000", self.host.address)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Ends with its host at the latest.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
