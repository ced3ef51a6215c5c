//! Lifecycle hooks: postStart and preStop.

use std::{net::IpAddr, path::Path, time::Duration};

use k8s_openapi::api::core::v1::{Container, LifecycleHandler};

use super::exec;
use crate::{probes, runtime::Supervisor};

/// What messages call a hook.
pub(crate) fn name(handler: &LifecycleHandler) -> String {
    match (&handler.exec, &handler.http_get, &handler.sleep) {
        (Some(e), ..) => {
            format!("Exec lifecycle hook ([{}])", e.command.iter().flatten().cloned().collect::<Vec<_>>().join(" "))
        }
        (_, Some(h), _) => format!("HTTP lifecycle hook ({})", h.path.as_deref().unwrap_or_default()),
        (.., Some(s)) => format!("Sleep lifecycle hook ({})", s.seconds),
        _ => "lifecycle hook".into(),
    }
}

/// Runs a hook to its end; the error is upstream's text.
pub(crate) async fn run(
    handler: &LifecycleHandler,
    container: &Container,
    id: &str,
    supervisor: &Supervisor,
    bundle: &Path,
    ip: Option<IpAddr>,
    limit: Duration,
) -> Result<(), String> {
    if let Some(e) = &handler.exec {
        let command = e.command.clone().unwrap_or_default();
        return match exec::capture(supervisor, id, bundle, &command, limit).await {
            Ok((0, _)) => Ok(()),
            Ok((code, said)) => {
                Err(format!("command '{}' exited with {code}: {}, message: {said:?}", command.join(" "), said.trim()))
            }
            Err(e) => Err(e.to_string()),
        };
    }
    if let Some(h) = &handler.http_get {
        let ip = ip.ok_or("failed to find networking container: the pod has no address")?;
        let ip = probes::address(h.host.as_deref(), ip).await?;
        let request = probes::http_get(h, ip, container, "kube-lifecycle/1.36")?;
        return probes::http::get(&request, limit).await.map(|_| ());
    }
    if let Some(s) = &handler.sleep {
        let wanted = Duration::from_secs(u64::try_from(s.seconds).unwrap_or(0));
        tokio::time::sleep(wanted.min(limit)).await;
        return Ok(());
    }
    if handler.tcp_socket.is_some() {
        return Ok(());
    }
    Err(format!("invalid handler: {handler:?}"))
}
