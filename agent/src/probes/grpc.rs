//! A probe of kind grpc: grpc.health.v1.Health/Check.

use std::{net::IpAddr, time::Duration};

use tonic::{Code, Request, metadata::MetadataValue};

use super::http::{authority, dial};
use crate::grpc::{
    Channel,
    proto::health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient},
    words,
};

/// Whether the service says that it serves; the error is upstream's text.
pub(crate) async fn check(ip: IpAddr, port: u16, service: &str, timeout: Duration) -> Result<(), String> {
    match tokio::time::timeout(timeout, ask(ip, port, service, timeout)).await {
        Ok(answer) => answer,
        Err(_) => {
            let target = authority(&ip.to_string(), port);
            Err(format!("timeout: failed to connect service {target:?} within {timeout:?}: context deadline exceeded"))
        }
    }
}

async fn ask(ip: IpAddr, port: u16, service: &str, timeout: Duration) -> Result<(), String> {
    let target = authority(&ip.to_string(), port);
    let failed = |e: String| format!("error: health rpc probe failed: {e}");
    let refused = |e: String| format!("timeout: failed to connect service {target:?} within {timeout:?}: {e}");
    let channel = Channel::over(dial(ip, port).await.map_err(refused)?).await.map_err(|e| failed(e.to_string()))?;
    let origin = format!("http://{target}").parse().map_err(|_| failed(format!("bad address {target:?}")))?;
    let mut client = HealthClient::with_origin(channel, origin);
    let mut request = Request::new(HealthCheckRequest { service: service.into() });
    request.metadata_mut().insert("user-agent", MetadataValue::from_static("kube-probe/1.36"));
    let answer = client.check(request).await.map_err(|status| match status.code() {
        Code::Unimplemented => {
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health)".into()
        }
        _ => failed(words(&status)),
    })?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        other => Err(format!("service unhealthy (responded with {:?})", other.as_str_name())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::{
        proto::health::{
            HealthCheckResponse,
            health_server::{Health, HealthServer},
        },
        server,
    };
    use tokio::net::TcpListener;

    struct Server;

    #[tonic::async_trait]
    impl Health for Server {
        async fn check(
            &self,
            r: Request<HealthCheckRequest>,
        ) -> Result<tonic::Response<HealthCheckResponse>, tonic::Status> {
            assert_eq!(r.metadata().get("user-agent").unwrap(), "kube-probe/1.36");
            let status = match r.into_inner().service.as_str() {
                "" => ServingStatus::Serving,
                "ill" => ServingStatus::NotServing,
                name => return Err(tonic::Status::not_found(format!("no {name}"))),
            };
            Ok(tonic::Response::new(HealthCheckResponse { status: status.into() }))
        }
    }

    #[tokio::test]
    async fn what_a_service_says() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(server::answer(stream, HealthServer::new(Server)));
            }
        });
        let ask = |service: &'static str| check(at.ip(), at.port(), service, Duration::from_secs(10));
        assert_eq!(ask("").await, Ok(()));
        assert_eq!(ask("ill").await.unwrap_err(), "service unhealthy (responded with \"NOT_SERVING\")");
        let long = "s".repeat(300);
        let error = check(at.ip(), at.port(), &long, Duration::from_secs(10)).await.unwrap_err();
        assert_eq!(error, format!("error: health rpc probe failed: rpc error: code = NotFound desc = no {long}"));
    }

    #[tokio::test]
    async fn a_server_that_says_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let error = check(at.ip(), at.port(), "", Duration::from_millis(200)).await.unwrap_err();
        assert!(error.starts_with("timeout: failed to connect service"), "{error}");
        drop(listener);
        let error = check(at.ip(), at.port(), "", Duration::from_secs(10)).await.unwrap_err();
        assert!(error.contains("connection refused"), "{error}");
    }
}
