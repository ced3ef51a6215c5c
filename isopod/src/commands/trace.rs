//! `isopod trace`: what would become of a connection from a pod to a service.

use anyhow::{Context, Result};
use isopod_agent::Paths;

use crate::error::Usage;

/// Options of `trace`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Who connects: NAME, NAMESPACE/NAME, the beginning of a name or the address of a pod, or `node`.
    from: String,
    /// To what: HOST:PORT or HOST:PORT/udp; HOST is a service (web, web.default), a DNS name of the cluster or an address; a
    /// service with one port needs no PORT.
    to: String,
    /// Send a real packet as well, from the pod itself, and say what the kernel's rules did with it. The pod must be on this node.
    #[arg(long)]
    packet: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(paths: &Paths, args: &Args) -> Result<()> {
    let snapshot = super::services::snapshot(paths)?;
    let mut traced = snapshot.trace(&args.from, &args.to).map_err(|error| Usage(error.to_string()))?;
    if args.packet {
        let probe = snapshot.probe(&args.from, &args.to).map_err(|error| Usage(error.to_string()))?;
        let netns = match &probe.pod {
            Some((namespace, name)) => Some(super::services::pod_netns(paths, namespace, name, &probe.node)?),
            None => None,
        };
        traced.steps.extend(probe.send(netns.as_deref()).context("follow a packet")?);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&traced).context("write JSON")?);
    } else {
        print!("{traced}");
    }
    Ok(())
}
