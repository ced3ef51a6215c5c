//! `isopod scheduler`.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// Options of the scheduler.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// kubeconfig of its identity.
    #[arg(long, value_name = "FILE")]
    kubeconfig: PathBuf,
    /// Act only while holding the lease: for several control-plane machines.
    #[arg(long)]
    leader_elect: bool,
}

pub(crate) fn run(args: Args) -> Result<()> {
    crate::logging::to_stderr();
    super::serve(1, |stop| async move {
        let config = isopod_scheduler::Config { leader_elect: args.leader_elect, ..Default::default() };
        let client = super::client(&args.kubeconfig).await?;
        if !super::answers(&client, &stop).await {
            return Ok(());
        }
        isopod_scheduler::run(client, config, stop).await.context("scheduler")
    })
}
