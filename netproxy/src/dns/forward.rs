//! Asking other name servers.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

use super::{
    CLASS_IN, SERVER_FAILURE,
    cache::Cache,
    query::{LABELS_MAX, Query},
    reply::{fail, repeat},
    upstream::Upstream,
};

/// Queries upstream at the same time.
const IN_FLIGHT: usize = 512;
const PATIENCE: Duration = Duration::from_secs(2);
const ROUNDS: usize = 2;
/// Payload we take over UDP.
const PAYLOAD: u16 = 1232;

/// The forwarder.
pub(crate) struct Forwarder {
    pub(crate) upstream: Upstream,
    pub(crate) cache: Cache,
    slots: Semaphore,
}

impl Forwarder {
    pub(crate) fn new(upstream: Upstream) -> Self {
        Self { upstream, cache: Cache::default(), slots: Semaphore::new(IN_FLIGHT) }
    }

    /// Writes what others say to a query, or that nobody could say anything.
    pub(crate) async fn resolve(&self, query: &Query, limit: usize, out: &mut Vec<u8>) {
        let Ok(_slot) = self.slots.acquire().await else { return fail(query, SERVER_FAILURE, out) };
        // Somebody else may have asked while this one waited.
        if self.cache.answer(query, limit, out) {
            return;
        }
        match self.ask_all(query).await {
            Some(answer) => {
                self.cache.store(query, &answer.0, &answer.1);
                repeat(query, &answer.1, &[], 0, limit, out);
            }
            None => fail(query, SERVER_FAILURE, out),
        }
    }

    /// The first usable answer; else the last one of a server that could not help. As a message, and as its bytes.
    async fn ask_all(&self, query: &Query) -> Option<(Message, Vec<u8>)> {
        let servers = {
            let mut room = [""; LABELS_MAX];
            self.upstream.servers(query.labels(&mut room).unwrap_or_default())
        };
        let question = question(query)?;
        let mut last = None;
        for server in std::iter::repeat_n(servers.iter(), ROUNDS).flatten() {
            let Some(mut answer) = ask(&question, *server).await else { continue };
            let usable = matches!(answer.metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain);
            // EDNS is between neighbours: ours to upstream, theirs to us.
            answer.edns = None;
            let Ok(bytes) = answer.to_vec() else { continue };
            last = Some((answer, bytes));
            if usable {
                break;
            }
        }
        last
    }
}

/// The question as we ask it.
fn question(query: &Query) -> Option<Message> {
    let mut bytes = vec![0; super::query::HEADER];
    bytes[5] = 1;
    bytes.extend_from_slice(query.lower());
    bytes.extend_from_slice(&query.kind.to_be_bytes());
    bytes.extend_from_slice(&CLASS_IN.to_be_bytes());
    let mut message = Message::from_vec(&bytes).ok()?;
    message.metadata.message_type = MessageType::Query;
    message.metadata.op_code = OpCode::Query;
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = query.checking_disabled;
    let mut edns = Edns::new();
    edns.set_max_payload(PAYLOAD);
    edns.set_dnssec_ok(query.edns.is_some_and(|e| e.dnssec_ok));
    message.edns = Some(edns);
    Some(message)
}

async fn ask(question: &Message, server: SocketAddr) -> Option<Message> {
    let mut question = question.clone();
    question.metadata.id = rand::random();
    let mut bytes = question.to_vec().ok()?;
    let fits = |m: &Message| {
        let own = m.metadata.id == question.metadata.id && m.metadata.message_type == MessageType::Response;
        own && m.queries == question.queries
    };
    let mut answer = timeout(PATIENCE, over_udp(&bytes, server, fits)).await.ok().flatten()?;
    if matches!(answer.metadata.response_code, ResponseCode::FormErr | ResponseCode::NotImp) {
        // A server from before EDNS.
        question.edns = None;
        bytes = question.to_vec().ok()?;
        answer = timeout(PATIENCE, over_udp(&bytes, server, fits)).await.ok().flatten()?;
    }
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
