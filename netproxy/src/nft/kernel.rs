//! The tables in the kernel: loading the skeleton, changing elements.
//!
//! One blocking netlink socket, used by one thread. The nft program runs only to load rules; elements never pass
//! through it.

use std::{
    cell::Cell,
    collections::{HashMap, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    io::{self, Write},
    net::IpAddr,
    process::{Command, Stdio},
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};

use super::{
    element::{Element, ElementKey, Family, Value},
    raw,
    skeleton::{self, Chains, Settings},
    verify::{Difference, Suspects},
    wire::{self, Batch},
};
use crate::{
    model::objects::{Backend, Protocol},
    model::plan::Frontend,
    model::shadow::{Delta, Needed},
    monitor::{Ears, Heard},
};

/// Bytes of elements per transaction when everything is loaded; a single change is always one transaction.
const TRANSACTION_MAX: usize = 1 << 20;
/// What may wait to be sent: a single change is one transaction, however large.
const SEND_ROOM: usize = 16 << 20;
/// What is read at once: more than the kernel ever sends.
const ROOM: usize = 64 << 10;
/// Elements from which on a change is quicker when nobody listens.
const MANY: usize = 1000;
/// The map of clients and their endpoints, which rules write.
pub(super) const AFFINITY: &str = "affinity";

/// Why the kernel's tables could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The nft program is missing.
    #[error("nft not found: apt-get install nftables")]
    NoNft,
    /// The nft program could not be run.
    #[error("run nft")]
    RunNft(#[source] io::Error),
    /// The nft program refused the ruleset.
    #[error("nft refused the ruleset: {0}")]
    Ruleset(String),
    /// A netlink socket could not be used.
    #[error("{0} netlink socket")]
    Socket(&'static str, #[source] io::Error),
    /// Others change rules all the time.
    #[error("others change nftables faster than our table can be compared")]
    Restless,
    /// The kernel refused a change.
    #[error("kernel refused a change of table {table}")]
    Refused {
        /// Table.
        table: String,
        /// What it answered.
        #[source]
        source: io::Error,
    },
}

/// The kernel's side of the proxy.
pub(crate) struct Kernel {
    socket: Socket,
    port: u32,
    pub(super) settings: Settings,
    pub(super) families: Vec<Family>,
    chains: Chains,
    /// Of the rules as they were loaded; 0: not yet.
    pub(super) digest: u64,
    ears: Option<Ears>,
    /// Transactions since the ears were shut.
    sent: Cell<u32>,
    /// Somebody else may have changed something that nobody heard of.
    doubt: bool,
    /// Bytes of elements per transaction when much is changed.
    pub(super) transaction_max: usize,
    /// Called after each transaction.
    #[cfg(test)]
    pub(super) after: Option<Look>,
}

/// A look at the kernel between two transactions.
#[cfg(test)]
type Look = Box<dyn Fn(&Kernel) + Send>;

/// Calls its argument with every element that should be in the kernel.
pub(crate) type Wanted<'a> = dyn Fn(&mut dyn FnMut(Element)) + Sync + 'a;

/// Runs nft with a ruleset on its standard input.
pub(crate) fn run_nft(text: &str) -> Result<(), Error> {
    let spawn = |program: &str| {
        Command::new(program)
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
    };
    let mut child = match spawn("nft") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => spawn("/usr/sbin/nft"),
        other => other,
    }
    .map_err(|e| if e.kind() == io::ErrorKind::NotFound { Error::NoNft } else { Error::RunNft(e) })?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that stops reading says why on its standard error.
        let _ = stdin.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().map_err(Error::RunNft)?;
    if output.status.success() {
        return Ok(());
    }
    let lines = String::from_utf8_lossy(&output.stderr);
    Err(Error::Ruleset(lines.lines().filter(|l| !l.trim().is_empty()).take(3).collect::<Vec<_>>().join("; ")))
}

/// Families this network namespace has.
fn families() -> Vec<Family> {
    let v6 = std::fs::exists("/proc/thread-self/net/if_inet6").unwrap_or(false);
    Family::ALL.into_iter().filter(|f| *f == Family::V4 || v6).collect()
}

impl Kernel {
    /// Opens the socket; changes nothing. `ears` are shut while much is changed.
    pub(crate) fn open(settings: Settings, ears: Option<Ears>) -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(|e| Error::Socket("open", e))?;
        let address = socket.bind_auto().map_err(|e| Error::Socket("bind", e))?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(|e| Error::Socket("connect", e))?;
        // Batches are sent whole; without the privilege small ones still pass.
        let _ = setsockopt(&socket, sockopt::SndBufForce, &SEND_ROOM);
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20));
        let port = address.port_number();
        let (families, chains) = (families(), Chains::default());
        Ok(Self {
            socket,
            port,
            settings,
            families,
            chains,
            digest: 0,
            ears,
            sent: Cell::new(0),
            doubt: false,
            transaction_max: TRANSACTION_MAX,
            #[cfg(test)]
            after: None,
        })
    }

    /// The port that notifications of our own changes carry.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Makes the rules as they should be, keeping what elements there are, then the elements.
    pub(crate) fn reconcile(&mut self, wanted: &Wanted<'_>) -> Result<Difference, Error> {
        self.quietly(|kernel| {
            let existing = kernel.all_chains()?;
            kernel.load_rules(&existing, wanted)?;
            kernel.correct(&Heard::everything(), wanted)
        })
    }

    /// The chains of each family's table.
    pub(super) fn all_chains(&self) -> Result<Vec<Vec<String>>, Error> {
        self.families.iter().map(|f| self.existing_chains(*f)).collect()
    }

    pub(super) fn load_rules(&mut self, existing: &[Vec<String>], wanted: &Wanted<'_>) -> Result<(), Error> {
        // Chains for whatever was ever applied are known.
        if self.digest == 0 {
            let mut needed = Needed::default();
            wanted(&mut |element| needed.see(&element));
            for chain in existing.iter().flatten().filter_map(|name| name.parse().ok()) {
                needed.see_chain(&chain);
            }
            self.chains.grow(needed.picks, &needed.timeouts);
        }
        let render = |(f, names): (&Family, &Vec<_>)| skeleton::render(*f, &self.settings, &self.chains, names);
        let text: String = self.families.iter().zip(existing).map(render).collect();
        match self.run(&text) {
            Err(Error::Ruleset(why)) if existing.iter().any(|names| !names.is_empty()) => {
                tracing::info!(why, "replacing the whole nftables table: its maps have another shape");
                let mut elements = Vec::new();
                self.with_entries(wanted, &mut |element| elements.push(element));
                let replace = |f: &Family| skeleton::render_replacement(*f, &self.settings, &self.chains, &elements);
                self.run(&self.families.iter().map(replace).collect::<String>())?;
            }
            other => other?,
        }
        self.write_raw(&self.chains.timeouts)?;
        self.digest = self.rules_digest()?;
        Ok(())
    }

    /// What leads from numbers to chains.
    fn entries(&self) -> impl Iterator<Item = Element> {
        self.families.iter().flat_map(|f| self.chains.entries(&Chains::NONE, *f))
    }

    /// Everything that should be in the maps: what leads from numbers to chains, then what the model wants.
    pub(crate) fn with_entries(&self, wanted: &Wanted<'_>, emit: &mut dyn FnMut(Element)) {
        self.entries().for_each(&mut *emit);
        wanted(emit);
    }

    /// Fills empty maps; returns with how many elements. While the kernel takes a transaction in, a thread writes the next.
    pub(super) fn load(&self, maps: &Suspects, wanted: &Wanted<'_>) -> Result<usize, Error> {
        let (entries, table, full) = (self.entries().collect::<Vec<_>>(), &*self.settings.table, self.transaction_max);
        std::thread::scope(|scope| {
            let (tell, told) = std::sync::mpsc::sync_channel(1);
            let writer = scope.spawn(move || {
                let (mut batch, mut count) = (Batch::default(), 0);
                // Nobody takes it any more when the kernel has refused one.
                let send = |batch: Batch| drop(tell.send(batch.encode(table)));
                let mut emit = |element: Element| {
                    if maps.has(element.family, element.map) {
                        count += 1;
                        batch.add(&element);
                        if batch.size() > full {
                            send(std::mem::take(&mut batch));
                        }
                    }
                };
                entries.into_iter().for_each(&mut emit);
                wanted(&mut emit);
                if !batch.is_empty() {
                    send(batch);
                }
                count
            });
            told.into_iter().try_for_each(|(bytes, last)| self.transact(&bytes, last))?;
            Ok(writer.join().unwrap_or_default())
        })
    }

    /// Changes much. For each element the kernel writes a notification when somebody listens, which takes longer than the
    /// change: our own ears are shut meanwhile, and the generation tells whether somebody else said anything.
    pub(super) fn quietly<T>(&mut self, body: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        let Some(ears) = self.ears.take() else { return body(self) };
        ears.shut().map_err(|e| Error::Socket("leave a group of the", e))?;
        let before = self.generation();
        self.sent.set(0);
        let outcome = body(self);
        ears.open().map_err(|e| Error::Socket("join a group of the", e))?;
        self.ears = Some(ears);
        // Each transaction is a generation.
        self.doubt |= self.generation()? != before?.wrapping_add(self.sent.get());
        outcome
    }

    /// Runs nft: one transaction.
    fn run(&self, text: &str) -> Result<(), Error> {
        run_nft(text)?;
        self.sent.set(self.sent.get() + 1);
        Ok(())
    }

    /// The next messages. The kernel makes as many of a dump as there is room for; for each lot it walks the set from its
    /// beginning.
    fn receive(&self) -> Result<Vec<u8>, Error> {
        let mut buffer = Vec::with_capacity(ROOM);
        self.socket.recv(&mut buffer, 0).map_err(|e| Error::Socket("read", e))?;
        Ok(buffer)
    }

    /// Number of the ruleset's last change, whoever made it.
    fn generation(&self) -> Result<u32, Error> {
        let mut request = Vec::new();
        let head = (wire::nft(wire::MSG_GETGEN), wire::NLM_F_REQUEST, 1);
        wire::message(&mut request, head, (0, 0), |_| {});
        self.socket.send(&request, 0).map_err(|e| Error::Socket("send on", e))?;
        let answer = self.receive()?;
        let id = wire::messages(&answer).find_map(|m| wire::attribute(m.body, 1)?.first_chunk().copied());
        Ok(id.map_or(0, u32::from_be_bytes))
    }

    /// Whether somebody else may have changed something while nobody listened, once.
    pub(crate) fn take_doubt(&mut self) -> bool {
        std::mem::take(&mut self.doubt)
    }

    /// Applies a delta: more chains if needed, elements in one transaction, then what clients were remembered.
    pub(crate) fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        self.ensure_chains(&delta.added)?;
        self.change(&delta.removed, &delta.added)?;
        if !delta.affinity.is_empty() {
            self.forget_clients(&delta.affinity)?;
        }
        Ok(())
    }

    fn ensure_chains(&mut self, added: &[Element]) -> Result<(), Error> {
        let mut needed = Needed::default();
        added.iter().for_each(|e| needed.see(e));
        let mut chains = self.chains.clone();
        if !chains.grow(needed.picks, &needed.timeouts) {
            return Ok(());
        }
        let more = |f: &Family| skeleton::render_more(*f, &self.settings, &self.chains, &chains);
        let text: String = self.families.iter().map(more).collect();
        let entries: Vec<Element> = self.families.iter().flat_map(|f| chains.entries(&self.chains, *f)).collect();
        self.quietly(|kernel| {
            kernel.run(&text)?;
            kernel.write_raw(&chains.timeouts)?;
            kernel.change_all(&[], &entries)
        })?;
        self.chains = chains;
        self.digest = self.rules_digest()?;
        Ok(())
    }

    /// Writes the rules that nft cannot write.
    fn write_raw(&self, timeouts: &[u32]) -> Result<(), Error> {
        let (bytes, last) = raw::rules(&self.settings.table, &self.families, timeouts);
        self.transact(&bytes, last)
    }

    /// One transaction, unless there is so much to add that it is a first load.
    pub(super) fn change(&mut self, removed: &[Element], added: &[Element]) -> Result<(), Error> {
        if removed.len() + added.len() < MANY {
            return self.change_all(removed, added);
        }
        self.quietly(|kernel| kernel.change_all(removed, added))
    }

    /// Elements that are replaced are so in one transaction, and what nothing leads to any more goes last: however many
    /// transactions there are, each leaves all Services whole. Only ranges go first, for the kernel lets none overlap.
    fn change_all(&self, removed: &[Element], added: &[Element]) -> Result<(), Error> {
        let ours = |e: &&Element| self.families.contains(&e.family);
        let (ranges, others): (Vec<_>, Vec<_>) =
            removed.iter().filter(ours).partition(|e| matches!(e.value, Value::Until(_)));
        let mut batch = Batch::default();
        for range in ranges {
            batch.remove(range);
            self.send_full(&mut batch)?;
        }
        let mut old: HashMap<ElementKey, &Element> = others.into_iter().map(|e| (e.id(), e)).collect();
        for element in added.iter().filter(ours) {
            if let Some(before) = old.remove(&element.id()) {
                batch.remove(before);
            }
            batch.add(element);
            self.send_full(&mut batch)?;
        }
        for element in old.into_values() {
            batch.remove(element);
            self.send_full(&mut batch)?;
        }
        if batch.is_empty() { Ok(()) } else { self.send(batch) }
    }

    fn send_full(&self, batch: &mut Batch) -> Result<(), Error> {
        if batch.size() > self.transaction_max { self.send(std::mem::take(batch)) } else { Ok(()) }
    }

    fn send(&self, batch: Batch) -> Result<(), Error> {
        let (bytes, last) = batch.encode(&self.settings.table);
        self.transact(&bytes, last)
    }

    /// Sends a transaction and waits for its answer; errors of single messages come before it.
    fn transact(&self, bytes: &[u8], last: u32) -> Result<(), Error> {
        self.socket.send(bytes, 0).map_err(|e| Error::Socket("send on", e))?;
        let mut failed = None;
        loop {
            let answer = self.receive()?;
            for message in wire::messages(&answer).filter(|m| m.kind == wire::NLMSG_ERROR) {
                if message.errno() != 0 {
                    failed.get_or_insert(message.errno());
                }
                // An error of the whole transaction carries the first message's number and nothing follows.
                if message.sequence == last || message.sequence == 0 {
                    self.sent.set(self.sent.get() + u32::from(failed.is_none()));
                    #[cfg(test)]
                    self.after.iter().for_each(|after| after(self));
                    return failed.map_or(Ok(()), |errno| self.refused(errno));
                }
            }
        }
    }

    fn refused<T>(&self, errno: i32) -> Result<T, Error> {
        Err(Error::Refused { table: self.settings.table.clone(), source: io::Error::from_raw_os_error(errno) })
    }

    /// Runs a dump; `each` sees every message. A table that is not there reads as empty.
    pub(super) fn read_all(
        &self,
        request: &[u8],
        mut each: impl FnMut(&wire::Received<'_>),
    ) -> Result<Consistency, Error> {
        self.socket.send(request, 0).map_err(|e| Error::Socket("send on", e))?;
        let mut consistency = Consistency::Whole;
        loop {
            let answer = self.receive()?;
            for message in wire::messages(&answer) {
                if message.flags & wire::NLM_F_DUMP_INTR != 0 {
                    consistency = Consistency::Interrupted;
                }
                match message.kind {
                    wire::NLMSG_DONE => return Ok(consistency),
                    wire::NLMSG_ERROR if message.errno() == nix::libc::ENOENT => return Ok(consistency),
                    wire::NLMSG_ERROR => return self.refused(message.errno()),
                    _ => each(&message),
                }
            }
        }
    }

    /// As `read_all`, again until nobody changed anything meanwhile.
    pub(super) fn read_consistent<T: Default>(
        &self,
        request: &[u8],
        mut each: impl FnMut(&mut T, &wire::Received<'_>),
    ) -> Result<T, Error> {
        loop {
            let mut found = T::default();
            if self.read_all(request, |m| each(&mut found, m))? == Consistency::Whole {
                return Ok(found);
            }
        }
    }

    /// Bodies of the messages about our table's chains or rules.
    fn list(&self, kind: u16, family: Family) -> Result<Vec<Vec<u8>>, Error> {
        let mut request = Vec::new();
        let head = (wire::nft(kind), wire::NLM_F_REQUEST | wire::NLM_F_DUMP, 1);
        let own = self.settings.table.as_str();
        wire::message(&mut request, head, (family.number(), 0), |m| wire::put_string(m, 1, own));
        self.read_consistent(&request, |list: &mut Vec<Vec<u8>>, m| {
            if wire::attribute(m.body, 1).map(wire::text) == Some(own) {
                list.push(m.body.to_vec());
            }
        })
    }

    fn existing_chains(&self, family: Family) -> Result<Vec<String>, Error> {
        let bodies = self.list(wire::MSG_GETCHAIN, family)?;
        Ok(bodies.iter().filter_map(|b| Some(wire::text(wire::attribute(b, 3)?).to_owned())).collect())
    }

    pub(super) fn rules_digest(&self) -> Result<u64, Error> {
        let mut hasher = DefaultHasher::new();
        for family in &self.families {
            self.list(wire::MSG_GETRULE, *family)?.hash(&mut hasher);
        }
        Ok(hasher.finish())
    }

    /// Deletes remembered clients whose endpoint is no longer one of their frontend's.
    fn forget_clients(&self, check: &HashMap<Frontend, std::collections::HashSet<Backend>>) -> Result<(), Error> {
        for family in self.families.clone() {
            let request = wire::dump_elements(&self.settings.table, AFFINITY, family);
            let mut stale = Vec::new();
            self.read_all(&request, |message| {
                for raw in wire::raw_elements(message.body) {
                    let Some((frontend, at_node)) = sticky_frontend(family, raw.key) else { continue };
                    let Some(keep) = check.get(&frontend).or_else(|| check.get(&at_node)) else { continue };
                    let to = if let wire::Data::Value(to) = raw.data { backend(family, to) } else { None };
                    if !to.is_some_and(|b| keep.contains(&b)) {
                        stale.push(raw.key.to_vec());
                    }
                }
            })?;
            // One by one: a client whose time is up meanwhile must not spoil the rest.
            for key in stale {
                let bytes = wire::delete_raw(&self.settings.table, AFFINITY, family, std::slice::from_ref(&key));
                match self.transact(&bytes, 1) {
                    Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(nix::libc::ENOENT) => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// Removes our tables.
    pub(crate) fn destroy(&self) -> Result<(), Error> {
        for family in self.families.clone() {
            let bytes = wire::single(wire::MSG_DELTABLE, family, |m| wire::put_string(m, 1, &self.settings.table));
            match self.transact(&bytes, 1) {
                Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(nix::libc::ENOENT) => {}
                other => other?,
            }
        }
        Ok(())
    }
}

#[derive(PartialEq, Eq)]
pub(super) enum Consistency {
    Whole,
    Interrupted,
}

fn address(family: Family, bytes: &[u8]) -> Option<(IpAddr, &[u8])> {
    match family {
        Family::V4 => bytes.split_first_chunk::<4>().map(|(a, rest)| (IpAddr::from(*a), rest)),
        Family::V6 => bytes.split_first_chunk::<16>().map(|(a, rest)| (IpAddr::from(*a), rest)),
    }
}

/// The frontend in a key of `affinity` (client, address, protocol, port), as an address and as a node port.
fn sticky_frontend(family: Family, key: &[u8]) -> Option<(Frontend, Frontend)> {
    let (_, rest) = address(family, key)?;
    let (to, rest) = address(family, rest)?;
    let protocol =
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| rest.first() == Some(&(*p as u8)))?;
    let port = u16::from_be_bytes(*rest.get(4..)?.first_chunk()?);
    Some((Frontend::Address(to, protocol, port), Frontend::NodePort(family, protocol, port)))
}

fn backend(family: Family, data: &[u8]) -> Option<Backend> {
    let (to, rest) = address(family, data)?;
    Some(Backend::new(to, u16::from_be_bytes(*rest.first_chunk()?)))
}
