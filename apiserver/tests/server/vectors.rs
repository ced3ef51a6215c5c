//! Recorded answers of upstream, replayed against this server. They are not part of this repository: `.ci/run` names them.

use std::{env, path::PathBuf, process::Stdio};

use tokio::process::Command;

use crate::{Server, TOKEN};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "set ISOPOD_VECTORS (recorded answers) and ISOPOD_REPLAY (the tool that replays them), then run it with --run-ignored"]
async fn recorded_answers() {
    let path = |name: &str| {
        let value = env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: see docs/CONFORMANCE.md"));
        PathBuf::from(value).canonicalize().unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    let (vectors, replay) = (path("ISOPOD_VECTORS"), path("ISOPOD_REPLAY"));
    let server = Server::start().await;
    let out = Command::new(replay)
        .args(["--server", &server.url(""), "--token", TOKEN, "--insecure", "--jobs", "4"])
        .arg(vectors)
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let (text, errors) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    print!("{text}{errors}");
    assert!(out.status.success(), "answers differ from those that were recorded");
}
