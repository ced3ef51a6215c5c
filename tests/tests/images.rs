//! Where images come from, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, io::Read, os::unix::fs::PermissionsExt};

use isopod_tests::{
    Cluster, Host, Net, eventually,
    image::Image,
    registry::{CERTIFICATES, Registry},
};

/// A credential provider for a registry far away, which wants to know the pod's service account.
fn provider(host: &Host) {
    let dir = host.path("/etc/isopod/credential-providers");
    fs::create_dir_all(&dir).unwrap();
    fs::write(
        dir.with_extension("yaml"),
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: far\n  \
         matchImages: ['far.example']\n  defaultCacheDuration: 10m\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  \
         tokenAttributes: {serviceAccountTokenAudience: far, cacheType: ServiceAccount, requireServiceAccount: true}\n",
    )
    .unwrap();
    let script = "#!/bin/sh\ncat > /var/lib/provider.asked\necho '{\"kind\": \"CredentialProviderResponse\", \
                  \"apiVersion\": \"credentialprovider.kubelet.k8s.io/v1\", \"cacheKeyType\": \"Registry\", \
                  \"auth\": {\"far.example\": {\"username\": \"user\", \"password\": \"secret\"}}}'\n";
    fs::write(dir.join("far"), script).unwrap();
    fs::set_permissions(dir.join("far"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn images_come_from_a_registry_with_credentials_and_corruption_is_refused() {
    let mut net = Net::new();
    let registry_host = net.host("registry");
    let registry = Registry::start(&registry_host, "user", "secret");
    let archive = registry_host.disk().join("pulled.tar");
    Image::busybox("pulled:1").file("marker", 0o644, b"from the registry").save(&archive);
    registry.push(&archive, "team/pulled:1");
    Image::busybox("broken:1").file("marker", 0o644, b"will be damaged").save(&archive);
    registry.push(&archive, "team/broken:1");
    let host = net.host("one");
    provider(&host);
    let c = Cluster::start(&host);
    let address = registry.address();
    let hosts = c.host.path(&format!("/etc/isopod/certs.d/{address}"));
    fs::create_dir_all(&hosts).unwrap();
    fs::write(hosts.join("hosts.toml"), format!("server = \"http://{address}\"\n")).unwrap();
    let pod = |name: &str, image: &str, secret: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  restartPolicy: Never\n  imagePullSecrets: [{{name: {secret}}}]\n  \
             containers: [{{name: c, image: '{address}/{image}', command: [cat, /marker]}}]\n"
        )
    };
    c.k(&format!(
        "create secret docker-registry good --docker-server={address} --docker-username=user --docker-password=secret"
    ));
    c.k(&format!(
        "create secret docker-registry bad --docker-server={address} --docker-username=user --docker-password=wrong"
    ));
    c.apply(&pod("denied", "team/pulled:1", "bad"));
    c.wait_field("pod denied", ".status.containerStatuses[0].state.waiting.reason", |r| {
        r == "ErrImagePull" || r == "ImagePullBackOff"
    });
    assert!(c.k("get events --field-selector reason=Failed").contains("may require authorization"));
    c.apply(&pod("granted", "team/pulled:1", "good"));
    c.wait_field("pod granted", ".status.phase", |phase| phase == "Succeeded");
    assert_eq!(c.k("logs granted"), "from the registry");
    let events = c.k("get events --field-selector involvedObject.name=granted");
    assert!(events.contains("Pulling") && events.contains("Successfully pulled image"), "{events}");
    let id = c.get("pod granted")["status"]["containerStatuses"][0]["imageID"].as_str().unwrap().to_owned();
    assert!(id.contains("@sha256:"), "{id}");
    // It is here now: for those whose credentials its registry knows, for nobody else.
    c.apply(&pod("granted-again", "team/pulled:1", "good"));
    c.wait_field("pod granted-again", ".status.phase", |phase| phase == "Succeeded");
    assert!(c.k("get events --field-selector involvedObject.name=granted-again").contains("already present"));
    c.apply(&pod("stranger", "team/pulled:1", "bad"));
    c.wait_field("pod stranger", ".status.containerStatuses[0].state.waiting.reason", |r| {
        r == "ErrImagePull" || r == "ImagePullBackOff"
    });
    // Damage the largest blob that the first image does not share: one byte in the middle of the layer.
    let damaged = registry_host.must(
        "cd /var/lib/registry/docker/registry/v2; \
         for link in repositories/team/broken/_layers/sha256/*; do d=${link##*/}; \
           [ -d repositories/team/pulled/_layers/sha256/$d ] && continue; \
           f=blobs/sha256/$(echo $d | cut -c1-2)/$d/data; \
           [ $(stat -c %s $f) -gt 100000 ] && printf X | dd of=$f bs=1 seek=50000 conv=notrunc 2>/dev/null && echo $d; done; true",
    );
    let damaged = damaged.trim();
    assert_eq!(damaged.len(), 64, "one blob: {damaged:?}");
    c.apply(&pod("corrupt", "team/broken:1", "good"));
    c.wait_field("pod corrupt", ".status.containerStatuses[0].state.waiting.message", |message| {
        message.contains("digest") || message.contains("Back-off")
    });
    let events = c.k("get events --field-selector reason=Failed");
    assert!(events.contains(&format!("expected sha256:{damaged}")), "{events}");
    assert_eq!(c.host.must("ls /var/lib/isopod/image-store/tmp | wc -l").trim(), "0");
    // A registry that nobody reaches has mirrors: the first is down, the second keeps it below a path of its own and wants
    // credentials, which a program of this node knows.
    let hosts = c.host.path("/etc/isopod/certs.d/far.example");
    fs::create_dir_all(&hosts).unwrap();
    let mirrors = format!(
        "[host.\"http://{}:1\"]\n[host.\"http://{address}/v2/team\"]\noverride_path = true\n",
        registry_host.address
    );
    fs::write(hosts.join("hosts.toml"), mirrors).unwrap();
    c.apply(&pod("mirrored", "X", "none").replace(&format!("{address}/X"), "far.example/pulled:1"));
    c.wait_field("pod mirrored", ".status.phase", |phase| phase == "Succeeded");
    assert_eq!(c.k("logs mirrored"), "from the registry");
    let asked = fs::read_to_string(c.host.path("/var/lib/provider.asked")).unwrap();
    assert!(
        asked.contains("\"image\":\"far.example/pulled\"") && asked.contains("\"serviceAccountToken\":\"ey"),
        "{asked}"
    );
    c.apply(&pod("missing", "team/none:1", "good"));
    c.wait_field("pod missing", ".status.containerStatuses[0].state.waiting.reason", |r| {
        r == "ErrImagePull" || r == "ImagePullBackOff"
    });
    assert!(c.k("get events").contains("not found"));
}

/// Bytes of a layer that no compression makes smaller.
const LARGE: u64 = 12 << 20;

#[test]
fn pulls_wait_their_turn_and_go_on_where_they_broke() {
    let mut net = Net::new();
    let there = net.host("registry");
    let mut registry = Registry::open(&there, 5000);
    let archive = there.disk().join("pulled.tar");
    for name in ["one", "two", "three"] {
        let mut content = Vec::new();
        fs::File::open("/dev/urandom").unwrap().take(LARGE).read_to_end(&mut content).unwrap();
        Image::busybox("app:1").file("marker", 0o644, &content).save(&archive);
        registry.push(&archive, &format!("team/{name}:1"));
    }
    // Slow enough to be seen at work.
    there.must("tc qdisc add dev eth0 root tbf rate 32mbit burst 32k latency 400ms");
    let host = net.host("one");
    fs::write(
        host.path("/etc/isopod/config.yaml"),
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nclusterDNS: [10.96.0.10]\n\
         clusterDomain: cluster.local\nevictionHard: {memory.available: 100Mi}\nserializeImagePulls: false\n\
         maxParallelImagePulls: 2\n",
    )
    .unwrap();
    let c = Cluster::start(&host);
    let address = registry.address();
    let hosts = host.path(&format!("/etc/isopod/certs.d/{address}"));
    fs::create_dir_all(&hosts).unwrap();
    fs::write(hosts.join("hosts.toml"), format!("server = \"http://{address}\"\n")).unwrap();
    for name in ["one", "two", "three"] {
        c.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  restartPolicy: Never\n  containers:\n  \
             - {{name: c, image: '{address}/team/{name}:1', command: [stat, -c, '%s', /marker]}}\n"
        ));
    }
    let sizes = || -> Vec<u64> {
        let files = fs::read_dir(host.path("/var/lib/isopod/image-store/downloads")).into_iter().flatten();
        let sizes = files.filter_map(|file| Some(file.ok()?.metadata().ok()?.len()));
        sizes.collect()
    };
    let begun = eventually("two pulls are in the middle", || {
        let sizes = sizes();
        if sizes.iter().filter(|size| **size > LARGE / 16).count() >= 2 { Ok(sizes) } else { Err(sizes) }
    });
    assert_eq!(begun.len(), 2, "the third waits: {begun:?}");
    registry.crash();
    there.must("tc qdisc del dev eth0 root");
    for name in ["one", "two", "three"] {
        c.wait_field(&format!("pod {name}"), ".status.phase", |phase| phase == "Succeeded");
        assert_eq!(c.k(&format!("logs {name}")).trim(), LARGE.to_string());
    }
    let log = fs::read_to_string(there.disk().join("registry-5000.log")).unwrap();
    let parts = log.lines().filter(|line| line.contains("GET /v2/team/") && line.contains("\" 206 ")).count();
    assert_eq!(parts, 2, "what was begun is not sent again:\n{log}");
    assert_eq!(sizes(), Vec::<u64>::new());
}

/// What hosts.toml says of a registry that is its mirror at `secure`, behind TLS, and what comes of a pull.
const TLS: [(&str, &str, Result<(), &str>); 5] = [
    // Nobody vouches for its certificate.
    ("unknown", "client = [['client.crt', 'client.key']]", Err("UnknownIssuer")),
    // It knows us not.
    ("nobody", "ca = 'ca.crt'", Err("error sending request for url (https://")),
    ("missing", "ca = 'none.crt'", Err("none.crt: No such file")),
    ("known", "ca = 'ca.crt'\nclient = [['client.crt', 'client.key']]", Ok(())),
    ("unasked", "skip_verify = true\nclient = [['client.crt', 'client.key']]", Ok(())),
];

#[test]
fn registries_behind_tls_are_reached_as_hosts_toml_says() {
    let mut net = Net::new();
    let there = net.host("registry");
    let (secure, open) = (Registry::tls(&there, 5443), Registry::open(&there, 5080));
    let archive = there.disk().join("pulled.tar");
    for (registry, content) in [(&secure, &b"behind tls"[..]), (&open, b"in the open")] {
        Image::busybox("app:1").file("marker", 0o644, content).save(&archive);
        registry.push(&archive, "team/app:1");
    }
    Image::busybox("app:2").file("marker", 0o644, b"only there").save(&archive);
    open.push(&archive, "team/app:2");
    let host = net.host("one");
    let c = Cluster::start(&host);
    let (tls, plain) = (format!("https://{}", secure.address()), format!("http://{}", open.address()));
    let mirror = |name: &str, text: &str| {
        let dir = host.path(&format!("/etc/isopod/certs.d/{name}.example"));
        fs::create_dir_all(&dir).unwrap();
        for file in ["ca.crt", "client.crt", "client.key"] {
            fs::copy(there.path(&format!("{CERTIFICATES}/{file}")), dir.join(file)).unwrap();
        }
        fs::write(dir.join("hosts.toml"), text).unwrap();
    };
    let run = |pod: &str, registry: &str, tag: u8| {
        c.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}}}\nspec:\n  restartPolicy: Never\n  containers:\n  \
             - {{name: c, image: '{registry}.example/team/app:{tag}', imagePullPolicy: Always, command: [cat, /marker]}}\n"
        ));
    };
    let says = |pod: &str, text: &str| {
        c.wait_field(&format!("pod {pod}"), ".status.phase", |phase| phase == "Succeeded");
        assert_eq!(c.k(&format!("logs {pod}")), text);
    };
    // Nothing listens where the registries themselves would be: what is told is what its last endpoint said.
    for (name, with, _) in TLS {
        mirror(name, &format!("server = \"{tls}\"\n{with}\n"));
        run(name, name, 1);
    }
    // The first that has it gives it.
    let ours = "ca = 'ca.crt'\nclient = [['client.crt', 'client.key']]";
    mirror("first", &format!("[host.\"{tls}\"]\n{ours}\n[host.\"{plain}\"]\n"));
    mirror("second", &format!("[host.\"{plain}\"]\n[host.\"{tls}\"]\n{ours}\n"));
    run("first", "first", 1);
    run("second", "second", 1);
    run("later", "first", 2);
    for (name, _, want) in TLS {
        match want {
            Ok(()) => says(name, "behind tls"),
            Err(why) => eventually(why, || {
                let told = c.k(&format!("get events --field-selector involvedObject.name={name},reason=Failed"));
                if told.contains(why) { Ok(()) } else { Err(told) }
            }),
        }
    }
    says("first", "behind tls");
    says("second", "in the open");
    says("later", "only there");
}
