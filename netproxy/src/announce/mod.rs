//! Addresses of Services that the controllers chose this node for: on a link of the node, as long as its lease holds.
//!
//! In: Services (a condition names the node), and until when the node's lease holds. Out: addresses that the kernel answers
//! ARP and neighbour solicitations for, and word to everybody on the link when they come here. An address ends with the
//! lease: the kernel takes it away when nobody renews it, whatever has become of this process or of its way to the API
//! server. By then no other node has been chosen yet.

mod frames;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::{Duration, Instant},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use isopod_api::announcement;
use k8s_openapi::api::core::v1::Service;
use kube::runtime::watcher;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use rtnetlink::Handle;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    links::{Error, request},
    model::objects::ServiceName,
};

/// Who put an address on a link, as routes are told apart. Kernels before 5.18 do not keep it: there an address that an
/// earlier process left goes with its lease.
const PROTOCOL: AddressProtocol = AddressProtocol::Other(214);
/// How often, and how far apart, everybody is told: a packet may get lost.
const WORDS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// How soon what failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Addresses to announce; `None` before the first list of Services.
pub(crate) type Wanted = Option<BTreeSet<IpAddr>>;

/// Until when this node's lease holds.
pub type Lease = watch::Receiver<Option<Instant>>;

/// What this node was chosen for, by Service.
pub(crate) struct Chosen {
    own: String,
    all: HashMap<ServiceName, Vec<IpAddr>>,
    listing: Option<HashMap<ServiceName, Vec<IpAddr>>>,
    to: watch::Sender<Wanted>,
}

/// The addresses of a Service, if this node is to announce them.
fn addresses(own: &str, service: &Service) -> Vec<IpAddr> {
    let Some(status) = &service.status else { return Vec::new() };
    let ours = status.conditions.iter().flatten().any(|c| {
        c.type_ == announcement::CONDITION && c.status == "True" && announcement::node(&c.message) == Some(own)
    });
    if !ours || service.spec.as_ref().and_then(|s| s.type_.as_deref()) != Some("LoadBalancer") {
        return Vec::new();
    }
    let all = status.load_balancer.as_ref().and_then(|l| l.ingress.as_ref()).into_iter().flatten();
    all.filter_map(|i| i.ip.as_deref()?.parse().ok()).collect()
}

fn name(service: &Service) -> ServiceName {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    ServiceName::new(&part(&service.metadata.namespace), &part(&service.metadata.name))
}

impl Chosen {
    pub(crate) fn new(own: &str) -> (Self, watch::Receiver<Wanted>) {
        let (to, wanted) = watch::channel(None);
        (Self { own: own.to_owned(), all: HashMap::new(), listing: None, to }, wanted)
    }

    /// Takes in an event of the Services' watch.
    pub(crate) fn see(&mut self, event: &watcher::Event<Service>) {
        match event {
            watcher::Event::Init => self.listing = Some(HashMap::new()),
            watcher::Event::InitApply(service) => {
                let addresses = addresses(&self.own, service);
                if !addresses.is_empty() {
                    self.listing.get_or_insert_default().insert(name(service), addresses);
                }
                return;
            }
            watcher::Event::InitDone => self.all = self.listing.take().unwrap_or_default(),
            watcher::Event::Apply(service) => {
                let addresses = addresses(&self.own, service);
                if addresses.is_empty() {
                    self.all.remove(&name(service));
                } else {
                    self.all.insert(name(service), addresses);
                }
            }
            watcher::Event::Delete(service) => drop(self.all.remove(&name(service))),
        }
        if self.listing.is_none() {
            let now = Some(self.all.values().flatten().copied().collect());
            self.to.send_if_modified(|before| std::mem::replace(before, now.clone()) != now);
        }
    }
}

fn address(message: &AddressMessage) -> Option<IpNet> {
    let prefix = message.header.prefix_len;
    message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Address(address) => IpNet::new(*address, prefix).ok(),
        _ => None,
    })
}

fn is_announced(message: &AddressMessage) -> bool {
    message.attributes.contains(&AddressAttribute::Protocol(PROTOCOL))
}

async fn present(handle: &Handle) -> Result<Vec<AddressMessage>, Error> {
    handle.address().get().execute().try_collect().await.map_err(request("list addresses"))
}

/// The link an address belongs on: the one whose network it is of, else that of the node's own address.
fn link(present: &[AddressMessage], own: &[IpAddr], wanted: IpAddr) -> Option<u32> {
    let of_links = present.iter().filter(|m| !is_announced(m) && m.header.scope == AddressScope::Universe);
    let known: Vec<(u32, IpNet)> = of_links.filter_map(|m| Some((m.header.index, address(m)?))).collect();
    let near = known.iter().filter(|(_, net)| net.contains(&wanted) && net.addr() != wanted);
    let near = near.max_by_key(|(_, net)| net.prefix_len());
    near.or_else(|| known.iter().find(|(_, net)| own.contains(&net.addr()))).map(|(link, _)| *link)
}

/// Puts an address on a link for so long, or lets it stay.
async fn add(handle: &Handle, link: u32, address: IpAddr, left: Duration) -> Result<(), Error> {
    let prefix = if address.is_ipv4() { 32 } else { 128 };
    let mut add = handle.address().add(link, address, prefix).replace();
    let mut life = CacheInfo::default();
    // Never this node's own choice of an address to send from.
    (life.ifa_valid, life.ifa_preferred) = (u32::try_from(left.as_secs()).unwrap_or(u32::MAX), 0);
    let message = add.message_mut();
    message.attributes.push(AddressAttribute::CacheInfo(life));
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
    message.attributes.push(AddressAttribute::Protocol(PROTOCOL));
    add.execute().await.map_err(request(format!("add address {address}")))
}

async fn remove(handle: &Handle, message: AddressMessage) -> Result<(), Error> {
    let what = format!("remove address {}", address(&message).map(|a| a.addr().to_string()).unwrap_or_default());
    handle.address().del(message).execute().await.map_err(request(what))
}

/// Removes everything announced here.
pub(crate) async fn cleanup(handle: &Handle) -> Result<(), Error> {
    for message in present(handle).await?.into_iter().filter(is_announced) {
        remove(handle, message).await?;
    }
    Ok(())
}

/// Tells everybody on the link, more than once.
fn tell(link: u32, address: IpAddr) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        for _ in 0..WORDS {
            if let Err(error) = frames::send(link, address) {
                tracing::warn!(%address, %error, "nobody is told that a Service's address is here now");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }))
}

/// What is announced, and who still tells of it.
#[derive(Default)]
struct Announcer {
    held: BTreeMap<IpAddr, AbortOnDropHandle<()>>,
    until: Option<Instant>,
}

impl Announcer {
    /// Brings the links to what is wanted.
    async fn apply(
        &mut self,
        handle: &Handle,
        own: &[IpAddr],
        wanted: &BTreeSet<IpAddr>,
        until: Option<Instant>,
    ) -> Result<(), Error> {
        let now = Instant::now();
        // The kernel has taken away what it held until then.
        if std::mem::replace(&mut self.until, until).is_none_or(|before| before <= now) {
            self.held.clear();
        }
        let left = until.map(|u| u.saturating_duration_since(now)).filter(|left| left.as_secs() > 0);
        let present = present(handle).await?;
        for message in present.iter().filter(|m| is_announced(m)) {
            let Some(address) = address(message).map(|net| net.addr()) else { continue };
            if !wanted.contains(&address) {
                self.held.remove(&address);
                remove(handle, message.clone()).await?;
                tracing::info!(%address, "a Service's address is not here any more");
            }
        }
        self.held.retain(|address, _| wanted.contains(address));
        let Some(left) = left else { return Ok(()) };
        for address in wanted {
            let Some(link) = link(&present, own, *address) else {
                tracing::warn!(%address, "no link for a Service's address");
                continue;
            };
            add(handle, link, *address, left).await?;
            if !self.held.contains_key(address) {
                tracing::info!(%address, "a Service's address is here now");
                self.held.insert(*address, tell(link, *address));
            }
        }
        Ok(())
    }
}

/// Announces until the senders are gone.
pub(crate) async fn run(handle: Handle, own: Vec<IpAddr>, mut wanted: watch::Receiver<Wanted>, mut lease: Lease) {
    let (mut announcer, mut failed) = (Announcer::default(), false);
    loop {
        // Cancel-safe: all only wait.
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() {
                return;
            },
            changed = lease.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(RETRY), if failed => {}
        }
        let (addresses, until) = (wanted.borrow_and_update().clone(), *lease.borrow_and_update());
        let Some(addresses) = addresses else { continue };
        let outcome = announcer.apply(&handle, &own, &addresses, until).await;
        failed = outcome.is_err();
        if let Err(error) = outcome {
            tracing::warn!(error = %crate::sync::Chain(&error), "addresses of Services not announced");
        }
    }
}
