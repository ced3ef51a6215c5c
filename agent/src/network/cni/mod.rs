//! Pod networks made by a chain of CNI plugins, when an administrator put one into `/etc/cni/net.d`.
//!
//! Every pod gets a namespace of ours; the plugins do the rest, called as the specification has it: ADD in order, each
//! with the result of the one before; CHECK after a restart of the agent; DEL backwards with the configuration and the
//! result the pod was made with, which are kept on disk; GC and STATUS for lists of version 1.1 and later.

mod list;
mod plugin;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::future::BoxFuture;
use ipnet::IpNet;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use self::{
    list::List,
    plugin::{Attachment, Plugins},
};
use super::{
    Bandwidth, HostPort, NetworkError, PodNetwork, PodNetworkRequest, PodNetworkStatus, Protocol, links, namespace,
};
use crate::Paths;

/// Number of the loopback link in every namespace.
const LOOPBACK: u32 = 1;

/// One pod's attachment, on disk from before its first plugin runs until after its last one.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
struct Record {
    uid: String,
    args: String,
    list: List,
    /// What plugins may ask for.
    runtime: Map<String, Value>,
    /// The last plugin's; none while they run.
    result: Option<Value>,
}

struct Inner {
    config: PathBuf,
    netns: PathBuf,
    records: PathBuf,
    plugins: Plugins,
    state: Mutex<HashMap<String, Record>>,
    ranges: Mutex<Vec<IpNet>>,
    turned: watch::Sender<()>,
}

/// Pod networks made by plugins.
#[derive(Clone)]
pub struct CniNetwork {
    inner: Arc<Inner>,
}

fn fail(what: &str, path: &Path, error: impl std::fmt::Display) -> NetworkError {
    NetworkError(format!("{what} {}: {error}", path.display()))
}

/// Root of the file system that `paths` are in.
fn root(paths: &Paths) -> PathBuf {
    paths.etc().ancestors().nth(2).unwrap_or(Path::new("/")).to_owned()
}

/// Whether an administrator wants plugins to make the pod network.
pub fn is_configured(paths: &Paths) -> bool {
    !matches!(list::load(&root(paths).join("etc/cni/net.d")), Err(list::Error::None(_)))
}

impl CniNetwork {
    /// Reads what an earlier process left.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn start(paths: &Paths) -> Result<Self, NetworkError> {
        let inner = Inner {
            config: root(paths).join("etc/cni/net.d"),
            netns: paths.run().join("netns"),
            records: paths.state().join("network/cni"),
            plugins: Plugins { dirs: vec![root(paths).join("opt/cni/bin"), "/usr/lib/cni".into()] },
            state: Mutex::default(),
            ranges: Mutex::default(),
            turned: watch::Sender::new(()),
        };
        for dir in [&inner.netns, &inner.records] {
            fs::create_dir_all(dir).map_err(|e| fail("create", dir, e))?;
        }
        *inner.state.lock() = inner.load()?;
        tracing::info!(config = %inner.config.display(), "CNI plugins make the pod network");
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Lets the plugins remove what they made for every pod. Needs no running agent.
    ///
    /// # Errors
    /// The first pod's whose network is not removed.
    pub async fn cleanup_all(paths: &Paths) -> Result<(), NetworkError> {
        if !paths.state().join("network/cni").exists() {
            return Ok(());
        }
        Self::start(paths)?.reconcile(&[]).await
    }
}

impl Inner {
    fn record_path(&self, uid: &str) -> PathBuf {
        self.records.join(format!("{uid}.json"))
    }

    fn load(&self) -> Result<HashMap<String, Record>, NetworkError> {
        let mut all = HashMap::new();
        for entry in fs::read_dir(&self.records).map_err(|e| fail("read", &self.records, e))?.flatten() {
            let path = entry.path();
            let text = fs::read(&path).map_err(|e| fail("read", &path, e))?;
            match serde_json::from_slice::<Record>(&text) {
                Ok(record) if path == self.record_path(&record.uid) => drop(all.insert(record.uid.clone(), record)),
                _ => {
                    tracing::warn!(path = %path.display(), "not a network record: removed");
                    fs::remove_file(&path).map_err(|e| fail("remove", &path, e))?;
                }
            }
        }
        Ok(all)
    }

    fn save(&self, record: &Record) -> Result<(), NetworkError> {
        let path = self.record_path(&record.uid);
        let temporary = path.with_extension("tmp");
        let bytes = serde_json::to_vec(record).map_err(|e| fail("write", &path, e))?;
        let written = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|e| fail("write", &path, e))?;
        self.state.lock().insert(record.uid.clone(), record.clone());
        Ok(())
    }

    fn forget(&self, uid: &str) -> Result<(), NetworkError> {
        let path = self.record_path(uid);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail("remove", &path, e)),
            _ => {}
        }
        self.state.lock().remove(uid);
        Ok(())
    }

    fn attachment(&self, record: &Record) -> Attachment {
        let path = self.netns.join(&record.uid);
        let netns = namespace::is_pinned(&path).then_some(path);
        Attachment { id: record.uid.clone(), netns, args: record.args.clone() }
    }

    fn call(
        &self,
        record: &Record,
        number: usize,
        command: &str,
        previous: Option<&Value>,
    ) -> Result<Option<Value>, NetworkError> {
        let (kind, input) = (record.list.kind(number), record.list.input(number, previous, &record.runtime));
        self.plugins.run(kind, command, Some(&self.attachment(record)), &input).map_err(|error| {
            let verb = match command {
                "ADD" => "add",
                "DEL" => "delete",
                _ => "check",
            };
            let text = super::bridge::chain(&error).0;
            NetworkError(format!("plugin type=\"{kind}\" name=\"{}\" failed ({verb}): {text}", record.list.name))
        })
    }

    fn add(&self, record: &Record) -> Result<Value, NetworkError> {
        let mut result = None;
        for number in 0..record.list.plugins.len() {
            // A plugin without a result of its own passes on what it got.
            result = self.call(record, number, "ADD", result.as_ref())?.or(result);
        }
        result.ok_or_else(|| NetworkError(format!("network \"{}\": no plugin gave a result", record.list.name)))
    }

    /// Every plugin gets its turn, the last one first; the first failure is told. One that is not there has made nothing
    /// for a pod whose chain never came to its end.
    fn del(&self, record: &Record) -> Result<(), NetworkError> {
        let mut outcome = Ok(());
        for number in (0..record.list.plugins.len()).rev() {
            if record.result.is_none() && !self.plugins.has(record.list.kind(number)) {
                continue;
            }
            let done = self.call(record, number, "DEL", record.result.as_ref()).map(|_| ());
            outcome = outcome.and(done);
        }
        outcome
    }

    fn check(&self, record: &Record) -> Result<(), NetworkError> {
        if record.list.disable_check || !record.list.is_at_least(0, 4) {
            return Ok(());
        }
        (0..record.list.plugins.len())
            .try_for_each(|number| self.call(record, number, "CHECK", record.result.as_ref()).map(|_| ()))
    }

    /// Tells the plugins of 1.1 who is still there, so that they remove what belongs to nobody.
    fn collect_garbage(&self) {
        let Ok(list) = list::load(&self.config) else { return };
        if list.disable_gc || !list.is_at_least(1, 1) {
            return;
        }
        let valid: Vec<Value> =
            self.state.lock().keys().map(|uid| json!({"containerID": uid, "ifname": "eth0"})).collect();
        for number in 0..list.plugins.len() {
            let mut input = list.input(number, None, &Map::new());
            input["cni.dev/valid-attachments"] = json!(valid);
            if let Err(error) = self.plugins.run(list.kind(number), "GC", None, &input) {
                tracing::warn!(plugin = list.kind(number), %error, "plugin did not collect garbage");
            }
        }
    }

    /// Why pods cannot get a network now, as far as configuration and plugins tell.
    fn status(&self) -> Result<(), NetworkError> {
        let list = list::load(&self.config).map_err(|e| super::bridge::chain(&e))?;
        if !list.is_at_least(1, 1) {
            return Ok(());
        }
        (0..list.plugins.len()).try_for_each(|number| {
            let input = list.input(number, None, &Map::new());
            self.plugins.run(list.kind(number), "STATUS", None, &input).map(|_| ()).map_err(|error| {
                NetworkError(format!(
                    "plugin type=\"{}\" name=\"{}\" failed (status): {error}",
                    list.kind(number),
                    list.name
                ))
            })
        })
    }

    fn known(&self, uid: &str) -> Option<PodNetworkStatus> {
        let record = self.state.lock().get(uid).cloned()?;
        let netns = self.netns.join(uid);
        let ips = addresses(record.result.as_ref()?);
        (namespace::is_pinned(&netns) && !ips.is_empty()).then_some(PodNetworkStatus { netns, ips })
    }

    fn record(&self, pod: &PodNetworkRequest) -> Result<Record, NetworkError> {
        let list = list::load(&self.config).map_err(|e| super::bridge::chain(&e))?;
        let mut runtime = Map::new();
        if !pod.host_ports.is_empty() {
            runtime.insert("portMappings".into(), pod.host_ports.iter().map(port_mapping).collect());
        }
        if let Some(bandwidth) = bandwidth(pod.bandwidth) {
            runtime.insert("bandwidth".into(), bandwidth);
        }
        let ranges: Vec<Value> = self.ranges.lock().iter().map(|r| json!([{ "subnet": r.to_string() }])).collect();
        if !ranges.is_empty() {
            runtime.insert("ipRanges".into(), ranges.into());
        }
        let PodNetworkRequest { uid, namespace, name, .. } = pod;
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={uid};K8S_POD_UID={uid}"
        );
        Ok(Record { uid: uid.clone(), args, list, runtime, result: None })
    }

    /// Makes everything; undoes what was made when something fails.
    fn attach(&self, mut record: Record) -> Result<PodNetworkStatus, NetworkError> {
        let outcome = self.add(&record).and_then(|result| {
            record.result = Some(result);
            self.save(&record)?;
            let said = || NetworkError(format!("network \"{}\": its result has no addresses", record.list.name));
            self.known(&record.uid).ok_or_else(said)
        });
        if outcome.is_err() {
            match self.del(&record).and_then(|()| self.drop_all(&record.uid)) {
                Ok(()) => {}
                Err(error) => tracing::warn!(%error, uid = record.uid, "half a pod network is left for later"),
            }
        }
        outcome
    }

    fn drop_all(&self, uid: &str) -> Result<(), NetworkError> {
        namespace::unpin(&self.netns.join(uid))?;
        self.forget(uid)
    }

    fn detach(&self, uid: &str) -> Result<(), NetworkError> {
        let record = self.state.lock().get(uid).cloned();
        if let Some(record) = record {
            self.del(&record)?;
        }
        self.drop_all(uid)
    }
}

/// The pod's addresses in a result.
fn addresses(result: &Value) -> Vec<IpAddr> {
    let list = result["ips"].as_array().into_iter().flatten();
    let all = list.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok());
    // Results from before 0.3 have one per family.
    let old = ["ip4", "ip6"].iter().filter_map(|f| result[*f]["ip"].as_str()?.split('/').next()?.parse().ok());
    all.chain(old).collect()
}

fn port_mapping(port: &HostPort) -> Value {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    let mut mapping = json!({"hostPort": port.host_port, "containerPort": port.container_port, "protocol": protocol});
    if let Some(address) = port.host_ip {
        mapping["hostIP"] = json!(address.to_string());
    }
    mapping
}

/// Bursts as upstream has them: as much as fits.
fn bandwidth(limits: Bandwidth) -> Option<Value> {
    const BURST: u64 = i32::MAX as u64;
    let mut value = Map::new();
    for (rate, burst, bits) in
        [("ingressRate", "ingressBurst", limits.ingress), ("egressRate", "egressBurst", limits.egress)]
    {
        if let Some(bits) = bits {
            value.insert(rate.into(), json!(bits));
            value.insert(burst.into(), json!(BURST));
        }
    }
    (!value.is_empty()).then_some(Value::Object(value))
}

/// Runs what waits for plugins on a thread that may wait.
async fn blocking<T: Send + 'static>(
    inner: &Arc<Inner>,
    body: impl FnOnce(&Inner) -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    let inner = inner.clone();
    tokio::task::spawn_blocking(move || body(&inner)).await.unwrap_or_else(|e| Err(NetworkError(e.to_string())))
}

impl PodNetwork for CniNetwork {
    fn setup(&self, pod: PodNetworkRequest) -> BoxFuture<'_, Result<PodNetworkStatus, NetworkError>> {
        Box::pin(async move {
            if let Some(status) = self.inner.known(&pod.uid) {
                let uid = pod.uid;
                blocking(&self.inner, move |inner| {
                    let record = inner.state.lock().get(&uid).cloned();
                    if let Some(Err(error)) = record.map(|r| inner.check(&r)) {
                        // The pod runs in it: it cannot have another one.
                        tracing::warn!(%error, uid, "a running pod's network is not as it was made");
                    }
                    Ok(())
                })
                .await?;
                return Ok(status);
            }
            // A reboot, or a crash half way: begin anew.
            self.teardown(&pod.uid).await?;
            let record = self.inner.record(&pod)?;
            self.inner.save(&record)?;
            let handle = namespace::create(self.inner.netns.join(&pod.uid)).await?;
            links::up(&handle, LOOPBACK, "lo").await?;
            blocking(&self.inner, move |inner| inner.attach(record)).await
        })
    }

    fn teardown<'a>(&'a self, uid: &'a str) -> BoxFuture<'a, Result<(), NetworkError>> {
        let uid = uid.to_owned();
        Box::pin(blocking(&self.inner, move |inner| inner.detach(&uid)))
    }

    fn reconcile<'a>(&'a self, known: &'a [String]) -> BoxFuture<'a, Result<(), NetworkError>> {
        Box::pin(async move {
            let gone: Vec<String> =
                self.inner.state.lock().keys().filter(|uid| !known.contains(uid)).cloned().collect();
            let mut outcome = Ok(());
            for uid in gone {
                tracing::info!(uid, "removing the network of a pod that is gone");
                outcome = outcome.and(self.teardown(&uid).await);
            }
            blocking(&self.inner, |inner| {
                inner.collect_garbage();
                Ok(())
            })
            .await?;
            outcome
        })
    }

    fn set_pod_cidr(&self, cidrs: Vec<IpNet>) {
        *self.inner.ranges.lock() = cidrs;
        self.inner.turned.send_replace(());
    }

    fn not_ready(&self) -> Option<String> {
        self.inner.status().err().map(|e| e.0)
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.inner.turned.subscribe()
    }
}
