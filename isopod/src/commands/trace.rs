//! `isopod trace`: what would become of a connection from a pod to a service.

use anyhow::{Context, Result};
use isopod_agent::Paths;

use crate::error::Usage;

/// Options of `trace`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Who connects: NAME, NAMESPACE/NAME or address of a pod, or `node`.
    from: String,
    /// To what: HOST:PORT or HOST:PORT/udp; HOST is a service (web, web.default), a DNS name of the cluster or an address.
    to: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(paths: &Paths, args: &Args) -> Result<()> {
    let snapshot = super::services::snapshot(paths)?;
    let traced = snapshot.trace(&args.from, &args.to).map_err(|error| Usage(error.to_string()))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&traced).context("write JSON")?);
    } else {
        print!("{traced}");
    }
    Ok(())
}
