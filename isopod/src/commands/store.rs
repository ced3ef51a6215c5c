//! `isopod store`: what can be done with the objects of a cluster while its API server is stopped.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use isopod_store::{EtcdConfig, transfer};

use crate::error::Usage;

/// Options of `store`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Copy everything from one store to an empty other one; every resourceVersion stays. No API server may be running.
    Move {
        /// Directory of a database, or etcd=URL[,URL...].
        #[arg(long)]
        from: String,
        /// Directory of a database that is not there yet, or etcd=URL[,URL...] of an empty etcd.
        #[arg(long)]
        to: String,
        /// Directory with etcd/ca.crt and apiserver-etcd-client.{crt,key}, for https.
        #[arg(long, default_value = "/etc/isopod/pki", value_name = "DIR")]
        pki: PathBuf,
    },
}

pub(crate) fn run(args: Args) -> Result<()> {
    let Command::Move { from, to, pki } = args.command;
    let usage = |reason: String| Usage(format!("store move: {reason}"));
    let report = match (from.starts_with("etcd="), to.starts_with("etcd=")) {
        (false, true) => transfer::to_etcd(Path::new(&from), &etcd(&to, &pki).map_err(usage)?),
        (true, false) => transfer::to_embedded(&etcd(&from, &pki).map_err(usage)?, Path::new(&to)),
        _ => return Err(usage("one of --from and --to must be etcd=URL, the other a directory".into()).into()),
    };
    let report = report.with_context(|| format!("move {from} to {to}"))?;
    println!("{} keys moved, the last revision is {}", report.keys, report.revision);
    Ok(())
}

/// Reads `etcd=URL[,URL...]`.
pub(crate) fn etcd(text: &str, pki: &Path) -> Result<EtcdConfig, String> {
    let urls = text.strip_prefix("etcd=").ok_or_else(|| format!("{text:?} is neither embedded nor etcd=URL"))?;
    let endpoints: Vec<String> = urls.split(',').map(str::to_owned).collect();
    if !endpoints.iter().any(|url| url.starts_with("https://")) {
        return Ok(EtcdConfig { endpoints, ..EtcdConfig::default() });
    }
    let identity = (pki.join("apiserver-etcd-client.crt"), pki.join("apiserver-etcd-client.key"));
    Ok(EtcdConfig { endpoints, ca: Some(pki.join("etcd/ca.crt")), identity: Some(identity) })
}
