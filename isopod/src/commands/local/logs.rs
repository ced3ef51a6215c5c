//! `isopod logs`: what a container has written, from this machine's files.

use std::io::Write;

use anyhow::{Context, Result};
use futures::{AsyncReadExt, io::AsyncRead};
use isopod_agent::Paths;
use kube::api::LogParams;

use super::{Node, PodName, ask, text};

/// Options of `logs`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pod: PodName,
    /// Container; the first by default.
    #[arg(short, long)]
    container: Option<String>,
    /// Go on as it writes.
    #[arg(short, long)]
    follow: bool,
    /// Of the instance before this one.
    #[arg(short, long)]
    previous: bool,
    /// Only the last lines.
    #[arg(long, value_name = "LINES")]
    tail: Option<i64>,
    /// Each line with its time.
    #[arg(long)]
    timestamps: bool,
}

pub(crate) fn run(paths: &Paths, args: Args) -> Result<()> {
    ask(async {
        let node = Node::connect(paths).await?;
        let pod = node.pod(&args.pod).await?;
        let parameters = LogParams {
            container: args.container,
            follow: args.follow,
            previous: args.previous,
            tail_lines: args.tail,
            timestamps: args.timestamps,
            ..LogParams::default()
        };
        let stream = node.api(&pod).log_stream(text(&pod["metadata"]["name"]), &parameters).await;
        copy(stream.context("read the log")?).await
    })
}

async fn copy(stream: impl AsyncRead) -> Result<()> {
    let mut stream = std::pin::pin!(stream);
    let (mut out, mut buffer) = (std::io::stdout(), vec![0; 16 << 10]);
    loop {
        let n = stream.read(&mut buffer).await.context("read the log")?;
        if n == 0 {
            return Ok(());
        }
        match out.write_all(&buffer[..n]).and_then(|()| out.flush()) {
            // Whoever read this has enough.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            other => other.context("write")?,
        }
    }
}
