//! `isopod scheduler`.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// Options of the scheduler.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// kubeconfig of its identity.
    #[arg(long, value_name = "FILE")]
    kubeconfig: PathBuf,
}

pub(crate) fn run(args: Args) -> Result<()> {
    crate::logging::to_stderr();
    super::serve(1, |stop| async move {
        let client = super::client(&args.kubeconfig).await?;
        isopod_scheduler::run(client, isopod_scheduler::Config::default(), stop).await.context("scheduler")
    })
}
