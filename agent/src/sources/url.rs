//! Static pods from a URL, asked for at an interval (`staticPodURL`).

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    SOURCE,
    files::{self, Manifests},
};

/// Where and how to ask.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) url: String,
    pub(crate) headers: BTreeMap<String, Vec<String>>,
    pub(crate) every: Duration,
}

/// Most bytes of an answer.
const MOST: usize = 10 << 20;

/// The manifests of `files` and of the URL together; a name that is in both is the directory's.
pub(crate) fn join(
    mut files: watch::Receiver<Manifests>,
    place: Place,
    node: Arc<str>,
    stop: CancellationToken,
) -> watch::Receiver<Manifests> {
    let (sender, receiver) = watch::channel(files.borrow_and_update().clone());
    tokio::spawn(async move {
        let mut remote = Manifests::new();
        let mut said = None;
        let mut clock = tokio::time::interval(place.every.max(Duration::from_secs(1)));
        loop {
            // Cancel-safe: an interval and a watch lose nothing.
            tokio::select! {
                () = stop.cancelled() => return,
                changed = files.changed() => if changed.is_err() { return },
                _ = clock.tick() => match fetch(&place, &node).await {
                    Ok(now) => (remote, said) = (now, None),
                    // What was there stays: a server that is away takes no pods with it.
                    Err(error) if said.as_ref() != Some(&error) => {
                        tracing::error!("static pods from {}: {error}", place.url);
                        said = Some(error);
                    }
                    Err(_) => {}
                },
            }
            let mut all = remote.clone();
            all.extend(files.borrow_and_update().clone());
            sender.send_if_modified(|now| {
                let uids = |m: &Manifests| m.values().map(|p| p.metadata.uid.clone()).collect::<Vec<_>>();
                let changed = uids(now) != uids(&all);
                if changed {
                    *now = all;
                }
                changed
            });
        }
    });
    receiver
}

async fn fetch(place: &Place, node: &str) -> Result<Manifests, String> {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build().map_err(|e| e.to_string())?;
    let mut request = client.get(&place.url);
    for (name, values) in &place.headers {
        for value in values {
            request = request.header(name, value);
        }
    }
    let answer = request.send().await.and_then(reqwest::Response::error_for_status).map_err(|e| e.to_string())?;
    let text = answer.text().await.map_err(|e| e.to_string())?;
    if text.len() > MOST {
        return Err(format!("an answer of {} bytes is too long", text.len()));
    }
    let mut all = Manifests::new();
    for mut pod in files::parse(&text, Path::new(&place.url), node)?.pods {
        pod.metadata.annotations.get_or_insert_default().insert(SOURCE.into(), "http".into());
        let key = (pod.metadata.namespace.clone().unwrap_or_default(), pod.metadata.name.clone().unwrap_or_default());
        all.insert(key, Arc::new(pod));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn pods_come_from_a_url_and_stay_while_it_is_away() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        tokio::spawn(async move {
            let body = "apiVersion: v1\nkind: Pod\nmetadata: {name: far}\nspec: {containers: [{name: c, image: i}]}\n";
            // One good answer, then none.
            for answer in
                [format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())]
                    .into_iter()
                    .chain(std::iter::repeat(
                        "HTTP/1.1 500 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into(),
                    ))
            {
                let (mut stream, _) = server.accept().await.unwrap();
                let mut buffer = [0; 1024];
                let n = stream.read(&mut buffer).await.unwrap();
                let asked = String::from_utf8_lossy(&buffer[..n]).to_lowercase();
                assert!(asked.contains("x-key: secret"), "{asked}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let (files, receiver) = watch::channel(Manifests::new());
        let place = Place {
            url: format!("http://{address}/pods.yaml"),
            headers: BTreeMap::from([("X-Key".to_string(), vec!["secret".to_string()])]),
            every: Duration::from_secs(1),
        };
        let stop = CancellationToken::new();
        let mut all = join(receiver, place, "n".into(), stop.clone());
        let found =
            tokio::time::timeout(Duration::from_secs(10), all.wait_for(|m| m.len() == 1)).await.unwrap().unwrap();
        let pod = found.values().next().unwrap().clone();
        drop(found);
        assert_eq!(pod.metadata.name.as_deref(), Some("far-n"));
        assert_eq!(pod.metadata.annotations.as_ref().unwrap()[SOURCE], "http");
        // The directory's word counts more, and the URL's failure takes nothing away.
        let mut own = (*pod).clone();
        own.metadata.uid = Some("own".into());
        files.send_replace(Manifests::from([(("default".into(), "far-n".into()), Arc::new(own))]));
        let seen = all.wait_for(|m| m.values().any(|p| p.metadata.uid.as_deref() == Some("own")));
        tokio::time::timeout(Duration::from_secs(10), seen).await.unwrap().unwrap();
        stop.cancel();
    }
}
