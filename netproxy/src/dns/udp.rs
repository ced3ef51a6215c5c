//! The UDP socket: threads that take queries in batches and send the answers in batches.
//!
//! They wait in the kernel; a query costs no allocation, and under load many share one system call.

use std::{
    io::{IoSlice, IoSliceMut},
    net::UdpSocket,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{self, MsgFlags, MultiHeaders, Shutdown, SockaddrStorage},
};
use tokio::{runtime::Handle, sync::Semaphore};

use super::{
    query::Query,
    reply::udp_limit,
    server::{Server, Step},
};

/// Messages per system call.
const BATCH: usize = 32;
/// Longest query: nobody sends more than a name and some options.
const QUERY_MAX: usize = 2048;
/// Answers are built in buffers of this size, which grow once at most.
const ANSWER: usize = 1280;
const THREADS_MAX: usize = 4;
/// Queries waiting for upstream; what comes beyond is not answered, clients ask again.
const PENDING: usize = 4096;

/// The receiving threads; they end with this.
pub(crate) struct Receivers {
    socket: Arc<UdpSocket>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Receivers {
    /// Starts threads on a socket in blocking mode.
    pub(crate) fn start(server: &Arc<Server>, socket: UdpSocket) -> std::io::Result<Self> {
        let count = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        let mut all = Self { socket: Arc::new(socket), stop: Arc::default(), threads: Vec::new() };
        let pending = Arc::new(Semaphore::new(PENDING));
        for number in 0..count {
            let one = Receiver {
                server: server.clone(),
                socket: all.socket.clone(),
                runtime: Handle::current(),
                pending: pending.clone(),
            };
            let stop = all.stop.clone();
            let thread = std::thread::Builder::new().name(format!("dns-{number}")).spawn(move || one.run(&stop))?;
            all.threads.push(thread);
        }
        Ok(all)
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes who waits in it; a socket without a peer says that it is not connected, and does it all the same.
        let _ = socket::shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

struct Receiver {
    server: Arc<Server>,
    socket: Arc<UdpSocket>,
    runtime: Handle,
    pending: Arc<Semaphore>,
}

/// The queries of one call.
struct Batch {
    buffers: Box<[[u8; QUERY_MAX]; BATCH]>,
    from: [Option<(SockaddrStorage, usize)>; BATCH],
}

/// Their answers, as many as are ready.
struct Answers {
    buffers: [Vec<u8>; BATCH],
    to: [Option<SockaddrStorage>; BATCH],
    count: usize,
}

impl Receiver {
    fn run(self, stop: &AtomicBool) {
        // Sending leaves pointers to its addresses in them: not to be received with.
        let [mut receiving, mut sending] = [(); 2].map(|()| MultiHeaders::preallocate(BATCH, None));
        let mut queries = Batch { buffers: Box::new([[0; QUERY_MAX]; BATCH]), from: [None; BATCH] };
        let mut answers =
            Answers { buffers: std::array::from_fn(|_| Vec::with_capacity(ANSWER)), to: [None; BATCH], count: 0 };
        while !stop.load(Ordering::Acquire) {
            match queries.receive(&self.socket, &mut receiving) {
                Ok(count) => {
                    self.answer(&queries, count, &mut answers);
                    answers.send(&self.socket, &mut sending);
                }
                Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "DNS queries not received");
                    // Not about one query: give it time to pass.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn answer(&self, queries: &Batch, count: usize, answers: &mut Answers) {
        answers.count = 0;
        let zone = self.server.zone.read();
        for (bytes, from) in queries.buffers.iter().zip(&queries.from).take(count) {
            let Some((from, len)) = from else { continue };
            let out = &mut answers.buffers[answers.count];
            match self.server.step(&zone, &bytes[..*len], udp_limit, out) {
                Step::Done if out.is_empty() => {}
                Step::Done => {
                    answers.to[answers.count] = Some(*from);
                    answers.count += 1;
                }
                Step::Upstream(query, target) => self.ask(query, target, *from),
            }
        }
        drop(zone);
        self.server.count(answers.buffers[..answers.count].iter());
    }

    /// Leaves a query to the asynchronous part.
    fn ask(&self, query: Box<Query>, target: Option<String>, from: SockaddrStorage) {
        let Ok(slot) = self.pending.clone().try_acquire_owned() else { return };
        let (server, socket) = (self.server.clone(), self.socket.clone());
        self.runtime.spawn(async move {
            let mut out = Vec::with_capacity(ANSWER);
            server.finish(&query, target, udp_limit(&query), &mut out).await;
            server.count(std::iter::once(&out));
            // A full send buffer loses the answer, as a full link would.
            let _ = socket::sendto(socket.as_raw_fd(), &out, &from, MsgFlags::MSG_DONTWAIT);
            drop(slot);
        });
    }
}

impl Batch {
    /// Waits for a query and takes what else is there.
    fn receive(&mut self, socket: &UdpSocket, headers: &mut MultiHeaders<SockaddrStorage>) -> nix::Result<usize> {
        let mut slices = self.buffers.each_mut().map(|b| [IoSliceMut::new(b)]);
        let fd = socket.as_raw_fd();
        let results = socket::recvmmsg(fd, headers, slices.iter_mut(), MsgFlags::MSG_WAITFORONE, None)?;
        let mut count = 0;
        for message in results {
            self.from[count] = message.address.map(|from| (from, message.bytes));
            count += 1;
        }
        Ok(count)
    }
}

impl Answers {
    fn send(&self, socket: &UdpSocket, headers: &mut MultiHeaders<SockaddrStorage>) {
        let slices = self.buffers.each_ref().map(|b| [IoSlice::new(b)]);
        let mut at = 0;
        while at < self.count {
            let part = slices[at..self.count].iter();
            match socket::sendmmsg(socket.as_raw_fd(), headers, part, &self.to[at..self.count], [], MsgFlags::empty()) {
                Ok(sent) => at += sent.count().max(1),
                Err(Errno::EINTR) => {}
                Err(error) => {
                    // The first one cannot be sent; the others may.
                    tracing::debug!(%error, "DNS answer not sent");
                    at += 1;
                }
            }
        }
    }
}
