//! The client's side: runs on the host, speaks to its API server.

use std::time::{Duration, Instant};

use futures::{StreamExt, stream::FuturesUnordered};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::{row, times};

pub(crate) fn run(args: &[String]) {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let client = Client::try_default().await.unwrap();
        match args[0].as_str() {
            "pods" => crate::pods::run(client, 100, &[50, 100]).await,
            "fill" => crate::pods::fill(client, args[1].parse().unwrap(), args[2].parse().unwrap()).await,
            "delete" => crate::pods::delete(client, args[1].parse().unwrap()).await,
            "pull" => crate::pull::ours(&args[1], args[2].parse().unwrap()).await,
            "api" => crate::api::run(args.get(1).map(String::as_str)).await,
            "services" => services(client, args[1].parse().unwrap()).await,
            other => panic!("unknown benchmark {other}"),
        }
    });
}

/// Brings the cluster to so many Services of ten endpoints each, then adds single ones.
async fn services(client: Client, total: usize) {
    let services: Api<Service> = Api::default_namespaced(client.clone());
    let slices: Api<EndpointSlice> = Api::default_namespaced(client.clone());
    let addresses: Vec<_> = (1..=10).map(|i| format!("10.244.200.{i}")).collect();
    let made = services.list_metadata(&ListParams::default().labels("bench=service")).await.unwrap().items.len();
    let mut creating = FuturesUnordered::new();
    for n in made..total {
        let (services, slices, addresses) = (services.clone(), slices.clone(), addresses.clone());
        creating.push(async move { service(&services, &slices, &format!("bench-{n}"), &addresses, 8080).await });
        if creating.len() >= 32 {
            creating.next().await;
        }
    }
    while creating.next().await.is_some() {}
    let node = Api::<Node>::all(client).list(&ListParams::default()).await.unwrap().items.remove(0);
    let host = node.status.and_then(|status| status.addresses).unwrap().remove(0).address;
    one_change(&services, &slices, total, &host).await;
}

/// Makes a Service after its endpoints; its address.
async fn service(
    services: &Api<Service>,
    slices: &Api<EndpointSlice>,
    name: &str,
    addresses: &[String],
    port: u16,
) -> String {
    let endpoints: Vec<_> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    let slice = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name, "bench": "service"}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "", "port": port, "protocol": "TCP"}],
    });
    slices.create(&PostParams::default(), &serde_json::from_value(slice).unwrap()).await.unwrap();
    let service =
        json!({"metadata": {"name": name, "labels": {"bench": "service"}}, "spec": {"ports": [{"port": 80}]}});
    let made = services.create(&PostParams::default(), &serde_json::from_value(service).unwrap()).await.unwrap();
    made.spec.and_then(|spec| spec.cluster_ip).unwrap()
}

/// From the API server's answer to the first connection through a new Service. Its one endpoint is a listener on this host, so
/// that a connection says that the kernel has the Service; asking nft would take longer than what is measured.
async fn one_change(services: &Api<Service>, slices: &Api<EndpointSlice>, total: usize, host: &str) {
    let listener = TcpListener::bind((host, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    let mut all = Vec::new();
    for n in 0..20 {
        let address = service(services, slices, &format!("change-{total}-{n}"), &[host.to_owned()], port).await;
        let started = Instant::now();
        // A connection tried too early is refused, or its first packet is lost.
        while !matches!(timeout(Duration::from_millis(5), TcpStream::connect((&*address, 80))).await, Ok(Ok(_))) {
            assert!(started.elapsed() < Duration::from_secs(20), "{address} never answered");
        }
        all.push(started.elapsed());
    }
    row(&format!("one service more at {total} x 10, API to first connection"), &times(all));
}
