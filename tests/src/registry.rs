//! A real registry (Debian's docker-registry) on a virtual host: open, with HTTP basic authentication, or behind TLS.

use std::{fs, path::Path, process::Child};

use crate::{Host, eventually};

/// A running registry.
pub struct Registry {
    host: Host,
    child: Child,
    port: u16,
    /// How skopeo gets in.
    access: String,
    /// How curl does.
    curl: String,
}

/// What a registry behind TLS and its clients need: `ca.crt`, and certificates with keys for `server` and `client`.
pub const CERTIFICATES: &str = "/var/lib/registry/tls";

impl Registry {
    /// One on port 5000; `user` and `password` are wanted for everything.
    pub fn start(host: &Host, user: &str, password: &str) -> Self {
        host.must(&format!("mkdir -p /var/lib/registry && htpasswd -Bbc /var/lib/registry/htpasswd {user} {password}"));
        let auth = "auth: {htpasswd: {realm: isopod, path: /var/lib/registry/htpasswd}}\n";
        let access = format!("--dest-tls-verify=false --dest-creds {user}:{password}");
        Self::serve(host, 5000, ("", auth), access, "http://")
    }

    /// One that anybody may use.
    pub fn open(host: &Host, port: u16) -> Self {
        Self::serve(host, port, ("", ""), "--dest-tls-verify=false".into(), "http://")
    }

    /// One behind TLS with an authority of its own, which clients have to be of too.
    pub fn tls(host: &Host, port: u16) -> Self {
        let dir = host.path(CERTIFICATES);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("names"), format!("subjectAltName=IP:{},IP:127.0.0.1\n", host.address)).unwrap();
        host.must(&format!(
            "cd {CERTIFICATES} && exec 2> log && key='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes' && \
             openssl req -x509 $key -keyout ca.key -out ca.crt -subj /CN=authority -days 1 && \
             for who in server client; do openssl req $key -keyout $who.key -subj /CN=$who | \
               openssl x509 -req -CA ca.crt -CAkey ca.key -days 1 -extfile names -out $who.crt || exit 1; done; \
             mkdir skopeo && cp ca.crt client.key skopeo && cp client.crt skopeo/client.cert"
        ));
        let tls = format!(
            ", tls: {{certificate: {CERTIFICATES}/server.crt, key: {CERTIFICATES}/server.key, clientcas: [{CERTIFICATES}/ca.crt]}}"
        );
        let curl = format!("-k --cert {CERTIFICATES}/client.crt --key {CERTIFICATES}/client.key https://");
        Self::serve(host, port, (&tls, ""), format!("--dest-cert-dir {CERTIFICATES}/skopeo"), &curl)
    }

    fn serve(host: &Host, port: u16, (http, more): (&str, &str), access: String, curl: &str) -> Self {
        let dir = host.path("/var/lib/registry");
        fs::create_dir_all(&dir).unwrap();
        // The first has the place that tests look into.
        let root = if port == 5000 { String::new() } else { format!("/{port}") };
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: /var/lib/registry{root}}}}}\n\
             http: {{addr: ':{port}'{http}}}\n{more}"
        );
        fs::write(dir.join(format!("{port}.yml")), config).unwrap();
        let child = Self::spawn(host, port);
        let registry = Self { host: host.clone(), child, port, access, curl: curl.to_owned() };
        registry.answers();
        registry
    }

    fn spawn(host: &Host, port: u16) -> Child {
        host.spawn(
            &format!("registry-{port}.log"),
            "docker-registry",
            &["serve", &format!("/var/lib/registry/{port}.yml")],
        )
    }

    fn answers(&self) {
        let ask = format!("curl -s -o /dev/null {}127.0.0.1:{}/v2/", self.curl, self.port);
        eventually("registry answers", || self.host.sh(&ask).ok());
    }

    /// Kills it in the middle of what it does, and starts it again.
    pub fn crash(&mut self) {
        self.host.must(&format!("kill -9 $(pgrep -f '^docker-registry serve .*/{}.yml')", self.port));
        self.child.wait().unwrap();
        self.child = Self::spawn(&self.host, self.port);
        self.answers();
    }

    /// Copies a docker archive into the registry as NAME.
    pub fn push(&self, archive: &Path, name: &str) {
        let inside = self.host.path("/var/lib/registry/push.tar");
        fs::copy(archive, &inside).unwrap();
        self.host.must(&format!(
            "skopeo --insecure-policy copy {} docker-archive:/var/lib/registry/push.tar docker://127.0.0.1:{}/{name}",
            self.access, self.port
        ));
    }

    /// `host:port` of the registry.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host.address, self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Ends with its host at the latest.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
