//! Asking the node's own name servers, with a bounded cache.
//!
//! Answers pass through as they came but for the identity and, from the cache, the time to live.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, RecordType},
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

/// Most answers kept.
const CACHE_MAX: usize = 4096;
/// Longest an answer is kept.
const TTL_MAX: u32 = 3600;
/// Longest a failure or an answer without records and SOA is kept.
const TTL_NEGATIVE: u32 = 30;
/// Queries upstream at the same time.
const IN_FLIGHT: usize = 512;
const PATIENCE: Duration = Duration::from_secs(2);
const ROUNDS: usize = 2;
/// How often, at most, the upstream file is looked at; only while queries come.
const RECHECK: Duration = Duration::from_secs(5);

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    name: Name,
    kind: RecordType,
    dnssec: bool,
    checking_disabled: bool,
}

struct Cached {
    message: Arc<Message>,
    stored: Instant,
    ttl: u32,
}

#[derive(Default)]
struct Upstream {
    servers: Arc<[SocketAddr]>,
    checked: Option<Instant>,
    modified: Option<SystemTime>,
}

/// The forwarder.
pub(crate) struct Forwarder {
    file: PathBuf,
    /// Never asked: ourselves.
    own: IpAddr,
    upstream: Mutex<Upstream>,
    cache: Mutex<HashMap<Key, Cached>>,
    slots: Semaphore,
}

/// Name servers of a resolv.conf.
fn name_servers(text: &str, own: IpAddr) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let rest = line.trim().strip_prefix("nameserver")?;
        rest.split_whitespace().next()?.split('%').next()?.parse::<IpAddr>().ok()
    };
    text.lines().filter_map(address).filter(|a| *a != own).take(3).map(|a| SocketAddr::new(a, 53)).collect()
}

impl Forwarder {
    pub(crate) fn new(file: PathBuf, own: IpAddr) -> Self {
        Self { file, own, upstream: Mutex::default(), cache: Mutex::default(), slots: Semaphore::new(IN_FLIGHT) }
    }

    fn servers(&self) -> Arc<[SocketAddr]> {
        let mut upstream = self.upstream.lock();
        if upstream.checked.is_some_and(|c| c.elapsed() < RECHECK) {
            return upstream.servers.clone();
        }
        upstream.checked = Some(Instant::now());
        let modified = std::fs::metadata(&self.file).and_then(|m| m.modified()).ok();
        if modified != upstream.modified || modified.is_none() {
            upstream.modified = modified;
            let text = std::fs::read_to_string(&self.file).unwrap_or_default();
            upstream.servers = name_servers(&text, self.own).into();
        }
        upstream.servers.clone()
    }

    /// The answer in the cache, with its time to live counted down.
    pub(crate) fn cached(&self, query: &Message) -> Option<Message> {
        let key = key(query)?;
        let (message, age) = {
            let cache = self.cache.lock();
            let entry = cache.get(&key)?;
            let age = u32::try_from(entry.stored.elapsed().as_secs()).unwrap_or(u32::MAX);
            (entry.ttl > age).then(|| (entry.message.clone(), age))?
        };
        let mut response = Message::clone(&message);
        let records = response.answers.iter_mut().chain(&mut response.authorities).chain(&mut response.additionals);
        records.for_each(|r| r.ttl = r.ttl.saturating_sub(age));
        Some(adopt(response, query))
    }

    fn store(&self, query: &Message, response: &Message) {
        let Some(key) = key(query) else { return };
        let ttl = lifetime(response);
        if ttl == 0 || response.metadata.truncation {
            return;
        }
        let mut cache = self.cache.lock();
        if cache.len() >= CACHE_MAX {
            cache.retain(|_, c| c.stored.elapsed().as_secs() < u64::from(c.ttl));
        }
        if cache.len() >= CACHE_MAX {
            // Nothing has run out: drop some, in the map's own random order.
            let victims: Vec<Key> = cache.keys().take(CACHE_MAX / 8).cloned().collect();
            victims.iter().for_each(|k| drop(cache.remove(k)));
        }
        cache.insert(key, Cached { message: Arc::new(response.clone()), stored: Instant::now(), ttl });
    }

    /// Asks upstream; `None` when nobody gave a usable answer.
    pub(crate) async fn resolve(&self, query: &Message) -> Option<Message> {
        if let Some(hit) = self.cached(query) {
            return Some(hit);
        }
        let _slot = self.slots.acquire().await.ok()?;
        let servers = self.servers();
        let mut last = None;
        for server in std::iter::repeat_n(servers.iter(), ROUNDS).flatten() {
            let Some(response) = ask(query, *server).await else { continue };
            let code = response.metadata.response_code;
            if matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
                self.store(query, &response);
                return Some(adopt(response, query));
            }
            last = Some(adopt(response, query));
        }
        last
    }
}

fn key(query: &Message) -> Option<Key> {
    let question = query.queries.first()?;
    Some(Key {
        name: question.name().to_lowercase(),
        kind: question.query_type(),
        dnssec: query.edns.as_ref().is_some_and(|e| e.flags().dnssec_ok),
        checking_disabled: query.metadata.checking_disabled,
    })
}

/// Gives an answer the identity of the query it is for.
fn adopt(mut response: Message, query: &Message) -> Message {
    response.metadata.id = query.metadata.id;
    response.metadata.recursion_desired = query.metadata.recursion_desired;
    response.metadata.recursion_available = true;
    response.queries.clone_from(&query.queries);
    if query.edns.is_none() {
        response.edns = None;
    }
    response
}

/// Seconds an answer may be kept: the least of its records, or what the SOA says of names that do not exist.
fn lifetime(response: &Message) -> u32 {
    let least = response.answers.iter().map(|r| r.ttl).min();
    let negative = || {
        let soa = response.authorities.iter().find_map(|r| match &r.data {
            RData::SOA(soa) => Some(soa.minimum.min(r.ttl)),
            _ => None,
        });
        soa.unwrap_or(TTL_NEGATIVE)
    };
    least.unwrap_or_else(negative).min(TTL_MAX)
}

async fn ask(query: &Message, server: SocketAddr) -> Option<Message> {
    let mut question = query.clone();
    question.metadata.id = rand::random();
    let bytes = question.to_vec().ok()?;
    let fits = |m: &Message| m.metadata.id == question.metadata.id && m.queries == question.queries;
    let answer = timeout(PATIENCE, over_udp(&bytes, server, fits)).await.ok().flatten()?;
    if !answer.metadata.truncation {
        return Some(answer);
    }
    let whole = timeout(PATIENCE, over_tcp(&bytes, server)).await.ok().flatten().filter(fits);
    Some(whole.unwrap_or(answer))
}

async fn over_udp(bytes: &[u8], server: SocketAddr, fits: impl Fn(&Message) -> bool) -> Option<Message> {
    let any: IpAddr = if server.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect(server).await.ok()?;
    socket.send(bytes).await.ok()?;
    let mut buffer = vec![0; 4096];
    loop {
        let len = socket.recv(&mut buffer).await.ok()?;
        match Message::from_vec(&buffer[..len]) {
            Ok(message) if fits(&message) => return Some(message),
            _ => {}
        }
    }
}

async fn over_tcp(bytes: &[u8], server: SocketAddr) -> Option<Message> {
    let mut stream = TcpStream::connect(server).await.ok()?;
    let mut framed = u16::try_from(bytes.len()).ok()?.to_be_bytes().to_vec();
    framed.extend_from_slice(bytes);
    stream.write_all(&framed).await.ok()?;
    let len = stream.read_u16().await.ok()?;
    let mut answer = vec![0; usize::from(len)];
    stream.read_exact(&mut answer).await.ok()?;
    Message::from_vec(&answer).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::{
        op::{MessageType, OpCode, Query},
        rr::{Record, rdata::A},
    };

    #[test]
    fn resolv_conf_is_read_and_we_never_ask_ourselves() {
        let text =
            "# x\nsearch a b\nnameserver 10.96.0.10\nnameserver 192.0.2.1\n nameserver fe80::1%eth0\noptions ndots:5\n";
        let servers = name_servers(text, "10.96.0.10".parse().unwrap());
        assert_eq!(servers, ["192.0.2.1:53".parse().unwrap(), "[fe80::1]:53".parse().unwrap()]);
    }

    #[tokio::test]
    async fn answers_come_from_upstream_once() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let serve = tokio::spawn(async move {
            let mut buffer = [0; 512];
            let (len, from) = server.recv_from(&mut buffer).await.unwrap();
            let mut message = Message::from_vec(&buffer[..len]).unwrap().into_response();
            let name = message.queries[0].name().clone();
            message.answers.push(Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 7))));
            server.send_to(&message.to_vec().unwrap(), from).await.unwrap();
        });
        let forwarder = Forwarder::new("/nonexistent".into(), "10.96.0.10".parse().unwrap());
        *forwarder.upstream.lock() =
            Upstream { servers: [address].into(), checked: Some(Instant::now()), modified: None };
        let mut query = Message::new(9, MessageType::Query, OpCode::Query);
        query.add_query(Query::query(Name::from_ascii("example.com.").unwrap(), RecordType::A));
        let first = forwarder.resolve(&query).await.unwrap();
        assert_eq!((first.metadata.id, first.answers.len()), (9, 1));
        serve.await.unwrap();
        query.metadata.id = 10;
        let second = forwarder.resolve(&query).await.unwrap();
        assert_eq!((second.metadata.id, second.answers), (10, first.answers));
    }
}
