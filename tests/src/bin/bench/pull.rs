//! Pulls of one image from one registry: isopod over its CRI socket, skopeo and containerd, in turn.

use std::{
    fs,
    path::Path,
    process::Child,
    time::{Duration, Instant},
};

use isopod_tests::{
    Cluster, Host, eventually,
    grpc::{
        Channel,
        proto::cri::{
            AuthConfig, ImageSpec, PullImageRequest, RemoveImageRequest, image_service_client::ImageServiceClient,
        },
    },
    image::Image,
    registry::Registry,
};

use crate::{inside, row, times};

/// How often each pulls.
const RUNS: usize = 5;
const NAME: &str = "team/large:1";
const USER: (&str, &str) = ("user", "secret");

/// Bytes that compress by about half, different for each seed.
fn filler(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 16);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
        bytes.extend_from_slice(b"isopod..");
    }
    bytes.truncate(size);
    bytes
}

/// Four layers: three with a few large files each, one with thousands of small ones.
fn image() -> Image {
    let mut image = Image::busybox(NAME);
    for layer in 0..3_u64 {
        for file in 0..4 {
            image = image.file(&format!("opt/{layer}/{file}"), 0o644, &filler(12 << 20, layer * 10 + file + 1));
        }
        image = image.next_layer();
    }
    for file in 0..5_000 {
        image = image.file(&format!("usr/share/{}/{file}", file % 50), 0o644, &filler(3_000, file + 100));
    }
    image
}

pub(crate) fn run(cluster: &Cluster) {
    let host = &cluster.host;
    let registry = Registry::start(host, USER.0, USER.1);
    let archive = host.disk().join("large.tar");
    image().save(&archive);
    registry.push(&archive, NAME);
    fs::remove_file(&archive).unwrap();
    let size = host.must("du -sbc /var/lib/registry/docker/registry/v2/blobs | tail -n 1 | cut -f 1");
    let size: f64 = size.trim().parse().unwrap();
    row("image pulled: compressed size", &format!("{:.1} MB in 4 layers", size / 1e6));
    inside(cluster, &["pull", NAME, &size.to_string()]);
    if host.sh("command -v skopeo").code == 0 {
        let pull = || {
            host.must(&format!(
                "rm -rf /var/lib/skopeo; skopeo --insecure-policy copy -q --src-tls-verify=false --src-creds {}:{} \
                 docker://127.0.0.1:5000/{NAME} dir:/var/lib/skopeo",
                USER.0, USER.1
            ));
        };
        told("skopeo (to a directory, not unpacked)", size, (0..RUNS).map(|_| timed(pull)).collect());
    }
    if host.sh("command -v containerd").code == 0 {
        let mut containerd = containerd(host);
        let ctr = "ctr -a /run/bench-containerd.sock";
        let all = (0..RUNS).map(|_| {
            let took = timed(|| {
                host.must(&format!("{ctr} images pull --plain-http -u {}:{} 127.0.0.1:5000/{NAME}", USER.0, USER.1));
            });
            host.must(&format!("{ctr} images rm --sync 127.0.0.1:5000/{NAME}"));
            took
        });
        told("containerd (ctr, unpacked)", size, all.collect());
        let _ = containerd.kill();
        let _ = containerd.wait();
    }
}

fn containerd(host: &Host) -> Child {
    let config = "version = 2\nroot = \"/var/lib/bench-containerd\"\nstate = \"/run/bench-containerd\"\n\
                  disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"/run/bench-containerd.sock\"\n";
    fs::write(host.path("/var/lib/bench-containerd.toml"), config).unwrap();
    let child = host.spawn("containerd.log", "containerd", &["--config", "/var/lib/bench-containerd.toml"]);
    eventually("containerd answers", || host.sh("ctr -a /run/bench-containerd.sock version").ok());
    child
}

fn timed(work: impl FnOnce()) -> Duration {
    let started = Instant::now();
    work();
    started.elapsed()
}

/// A row: the rate by the median of the times.
fn told(who: &str, size: f64, mut all: Vec<Duration>) {
    all.sort();
    let median = all[all.len() / 2];
    row(&format!("image pull: {who}"), &format!("{:.1} MB/s; {}", size / 1e6 / median.as_secs_f64(), times(all)));
}

/// Our own pulls, over the CRI socket; runs on the host.
pub(crate) async fn ours(name: &str, size: f64) {
    let mut client = ImageServiceClient::new(Channel::connect(Path::new("/run/isopod/cri.sock")).await);
    let image = Some(ImageSpec { image: format!("127.0.0.1:5000/{name}"), ..ImageSpec::default() });
    let auth = AuthConfig { username: USER.0.into(), password: USER.1.into(), ..AuthConfig::default() };
    let mut all = Vec::new();
    for _ in 0..RUNS {
        let request = PullImageRequest { image: image.clone(), auth: Some(auth.clone()), sandbox_config: None };
        let started = Instant::now();
        client.pull_image(request).await.unwrap();
        all.push(started.elapsed());
        client.remove_image(RemoveImageRequest { image: image.clone() }).await.unwrap();
    }
    told("isopod (CRI, unpacked and synced)", size, all);
}
