//! Runs the API server alone on loopback, with keys it makes itself: for tests and measurements.
//!
//! `serve DIR PORT TOKEN [ETCD]` keeps everything in DIR, objects in etcd when its URL is given; TOKEN is a member of
//! system:masters.

mod setup;

use std::{error::Error, path::PathBuf};

use isopod_apiserver::{EtcdConfig, Store};
use tokio_util::sync::CancellationToken;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("usage: serve DIR PORT TOKEN")?);
    let port: u16 = args.next().ok_or("usage: serve DIR PORT TOKEN")?.parse()?;
    let token = args.next().ok_or("usage: serve DIR PORT TOKEN")?;
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut config = setup::config(&dir, port, &token)?;
    if let Some(url) = args.next() {
        config.store = Store::Etcd(EtcdConfig { endpoints: vec![url], ..EtcdConfig::default() });
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let on_signal = stop.clone();
        tokio::spawn(async move {
            let _ = tokio::signal::ctrl_c().await;
            on_signal.cancel();
        });
        isopod_apiserver::run(config, stop).await
    })?;
    Ok(())
}
