//! Recorded answers of upstream, replayed against this server. They are not part of this repository: `.ci/run` names them.

use std::{
    env,
    path::PathBuf,
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

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
    let run = async |more: &[&str]| {
        let mut command = Command::new(&replay);
        command.args(["--server", &server.url(""), "--token", TOKEN, "--insecure"]).args(more).arg(&vectors);
        let out = command.stdin(Stdio::null()).output().await.unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        print!("{text}{}", String::from_utf8_lossy(&out.stderr));
        (out.status.success(), text)
    };
    let (passed, text) = run(&["--jobs", "4"]).await;
    if passed {
        return;
    }
    // Managers of fields are listed by the second of their last change. Those answers were recorded within one second: what a
    // second's end fell into is replayed by itself, from the beginning of one.
    let failed: Vec<&str> = text.lines().filter_map(|l| l.trim().strip_prefix("FAIL ")?.rsplit('/').next()).collect();
    assert!(!failed.is_empty(), "the replay broke off");
    for scenario in failed {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        tokio::time::sleep(Duration::from_nanos(1_000_000_000 - u64::from(now.subsec_nanos()))).await;
        let (passed, _) = run(&["--scenario", scenario]).await;
        assert!(passed, "{scenario}: answers differ from those that were recorded");
    }
}
