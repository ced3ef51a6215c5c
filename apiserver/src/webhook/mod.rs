//! Calls of the API server to webhooks: admission and the conversion of custom resources.
//!
//! [`Target`] is a `clientConfig`, understood. [`Client`] posts JSON to it over TLS, HTTP/1.1 as upstream does. Connections
//! are kept and used again; one to an endpoint that has left its service is not. Nothing is sent in the clear.

mod connection;
mod target;

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use parking_lot::Mutex;
use serde_json::Value;

use connection::{Broken, Connection, Pool};
pub(crate) use target::Target;

use crate::objects::Objects;

/// Largest answer of a webhook.
const ANSWER_MAX: usize = 16 << 20;
/// Pools of targets; the oldest configuration's go when there are more.
const POOLS: usize = 200;

/// Posts to webhooks.
#[derive(Default)]
pub(crate) struct Client {
    pools: Mutex<HashMap<Arc<Target>, Arc<Pool>>>,
}

impl Client {
    fn pool(&self, target: &Arc<Target>) -> Result<Arc<Pool>, String> {
        let mut pools = self.pools.lock();
        if let Some(pool) = pools.get(target) {
            return Ok(Arc::clone(pool));
        }
        if pools.len() >= POOLS {
            pools.clear();
        }
        let pool = Arc::new(Pool::new(target)?);
        pools.insert(Arc::clone(target), Arc::clone(&pool));
        Ok(pool)
    }

    /// Posts a JSON body and reads the JSON answer. The error is upstream's text.
    pub(crate) async fn post(
        &self,
        objects: &dyn Objects,
        target: &Arc<Target>,
        body: &Value,
        timeout: Duration,
    ) -> Result<Value, String> {
        let pool = self.pool(target)?;
        let body = Bytes::from(serde_json::to_vec(body).map_err(|e| e.to_string())?);
        let seconds = timeout.as_secs();
        let posting = async {
            let (status, answer) = exchange(objects, target, &pool, seconds, body).await?;
            read(status, &answer)
        };
        let failed = |error: &str| format!("Post \"{}?timeout={seconds}s\": {error}", target.url());
        match tokio::time::timeout(timeout, posting).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Failure::Transport(error))) => Err(failed(&error)),
            Ok(Err(Failure::Answer(error))) => Err(error),
            Err(_) => Err(failed("context deadline exceeded")),
        }
    }
}

enum Failure {
    /// Nothing came back.
    Transport(String),
    /// What came back is no answer.
    Answer(String),
}

/// One request and its answer, over a kept connection when there is one.
async fn exchange(
    objects: &dyn Objects,
    target: &Target,
    pool: &Pool,
    seconds: u64,
    body: Bytes,
) -> Result<(StatusCode, Bytes), Failure> {
    let addresses = target.addresses(objects).await.map_err(Failure::Transport)?;
    while let Some(mut kept) = pool.take(&addresses) {
        match send(&mut kept, target, seconds, body.clone()).await {
            Ok(answer) => {
                pool.put(kept).await;
                return Ok(answer);
            }
            // The far end had closed it before it saw the request: that is not the request's fault.
            Err(Broken::Unsent) => {}
            Err(Broken::Sent(error)) => return Err(Failure::Transport(error)),
        }
    }
    let mut fresh = pool.connect(target, &addresses).await.map_err(Failure::Transport)?;
    match send(&mut fresh, target, seconds, body).await {
        Ok(answer) => {
            pool.put(fresh).await;
            Ok(answer)
        }
        Err(Broken::Sent(error)) => Err(Failure::Transport(error)),
        Err(Broken::Unsent) => Err(Failure::Transport("EOF".into())),
    }
}

async fn send(
    connection: &mut Connection,
    target: &Target,
    seconds: u64,
    body: Bytes,
) -> Result<(StatusCode, Bytes), Broken> {
    let request = Request::post(format!("{}?timeout={seconds}s", target.path))
        .header(header::HOST, target.authority())
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json, */*")
        .header(header::USER_AGENT, "kube-apiserver-admission")
        .body(Full::new(body))
        .map_err(|error| Broken::Sent(error.to_string()))?;
    let response = connection.send(request).await?;
    let status = response.status();
    let limited = Limited::new(response.into_body(), ANSWER_MAX);
    let body = limited.collect().await.map_err(|error| Broken::Sent(error.to_string()))?;
    Ok((status, body.to_bytes()))
}

/// The answer as JSON; other codes in the words of upstream's client.
fn read(status: StatusCode, body: &[u8]) -> Result<Value, Failure> {
    let parsed = serde_json::from_slice::<Value>(body);
    if !status.is_success() {
        if let Ok(value) = &parsed
            && value["kind"] == "Status"
            && let Some(message) = value["message"].as_str()
        {
            return Err(Failure::Answer(message.to_owned()));
        }
        let text = String::from_utf8_lossy(&body[..body.len().min(2048)]).trim().to_owned();
        return Err(Failure::Answer(match status.as_u16() {
            401 => "Unauthorized".to_owned(),
            403 => "forbidden".to_owned(),
            404 => "the server could not find the requested resource".to_owned(),
            405 => "the server does not allow this method on the requested resource".to_owned(),
            429 => "the server has received too many requests and has asked us to try again later".to_owned(),
            503 => "the server is currently unable to handle the request".to_owned(),
            code if code >= 500 => {
                let text = if text.is_empty() { "unknown".to_owned() } else { text };
                format!("an error on the server ({text:?}) has prevented the request from succeeding")
            }
            _ => "the server rejected our request for an unknown reason".to_owned(),
        }));
    }
    parsed.map_err(|error| Failure::Answer(format!("couldn't get version/kind; json parse error: {error}")))
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
