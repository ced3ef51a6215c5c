//! The thread that owns the model and the kernel's tables.
//!
//! Inputs: parsed objects from the watches, and wishes to verify. Outputs: the kernel's tables, the DNS zone, the counts
//! for health checks. Everything that waits when it wakes is taken into one transaction; nothing here is asynchronous.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::RwLock;
use tokio::sync::{mpsc, watch};

use crate::{
    conntrack,
    dns::zone::Zone,
    metrics::Metrics,
    model::{
        objects::{Place, Service, ServiceName, Slice},
        shadow::{Shadow, cancel_out},
    },
    monitor::{Ears, Heard},
    nft::{
        element::Element,
        kernel::{Error, Kernel},
        skeleton::Settings,
    },
    policy::{
        model::Policies,
        objects::{Labels, Name, Pod, Policy},
    },
};

/// Verifications in a row, before it is left for later.
const VERIFICATIONS: usize = 5;

/// Services whose names change at once.
const ZONE_PART: usize = 64;

/// Something that happened.
#[derive(Debug)]
pub(crate) enum Input {
    /// A list begins: what is not in it is gone at its end.
    ServicesBegin,
    Service(Box<Service>),
    ServiceGone(ServiceName),
    ServicesEnd,
    SlicesBegin,
    Slice(Box<Slice>),
    SliceGone {
        namespace: Arc<str>,
        name: Arc<str>,
    },
    SlicesEnd,
    Place(Place),
    Policy(PolicyInput),
    /// Somebody else touched our table, or a change failed a moment ago.
    Verify(Heard),
}

/// What policies are made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PolicyKind {
    Policies,
    Pods,
    Namespaces,
}

/// Something that happened to policies, or to pods and namespaces: those are told of only once there is a policy.
#[derive(Debug)]
pub(crate) enum PolicyInput {
    Begin(PolicyKind),
    Policy(Box<Policy>),
    PolicyGone(Name),
    Pod(Box<Pod>),
    PodGone(Name),
    Namespace(Arc<str>, Labels),
    NamespaceGone(Arc<str>),
    End(PolicyKind),
}

/// What others may watch.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    /// Changes not in the kernel since then; `None`: all is well.
    pub(crate) failing_since: Option<Instant>,
    /// Health check ports: service and number of its endpoints here.
    pub(crate) health_checks: Vec<(u16, ServiceName, usize)>,
    /// Port of the netlink socket our changes come from.
    pub(crate) netlink_port: u32,
}

/// One kind of object while its list comes in.
#[derive(Debug)]
struct Listing<T> {
    seen: Option<HashSet<T>>,
    complete: bool,
}

impl<T> Default for Listing<T> {
    fn default() -> Self {
        Self { seen: None, complete: false }
    }
}

impl<T: Eq + std::hash::Hash> Listing<T> {
    fn note(&mut self, item: T) {
        if let Some(seen) = &mut self.seen {
            seen.insert(item);
        }
    }
}

/// The thread's state.
pub(crate) struct Sync {
    shadow: Shadow,
    /// Which service a slice belonged to; a slice may change that.
    slice_owner: std::collections::HashMap<(Arc<str>, Arc<str>), ServiceName>,
    services: Listing<ServiceName>,
    slices: Listing<(Arc<str>, Arc<str>)>,
    /// When the changes of endpoints happened that are not in the kernel yet.
    triggers: Vec<jiff::Timestamp>,
    policies: Policies,
    /// By [`PolicyKind`]; namespaces are names without a namespace.
    policy_lists: [Listing<Name>; 3],
    settings: Settings,
    ears: Option<Ears>,
    kernel: Option<Kernel>,
    zone: Arc<RwLock<Zone>>,
    metrics: Arc<Metrics>,
    report: watch::Sender<Report>,
    /// What others touched, not compared yet.
    heard: Heard,
}

impl Sync {
    pub(crate) fn new(
        place: Place,
        (settings, ears): (Settings, Option<Ears>),
        zone: Arc<RwLock<Zone>>,
        metrics: Arc<Metrics>,
        report: watch::Sender<Report>,
    ) -> Self {
        Self {
            policies: Policies::new(&place.node),
            policy_lists: Default::default(),
            shadow: Shadow::new(place),
            slice_owner: Default::default(),
            services: Listing::default(),
            slices: Listing::default(),
            triggers: Vec::new(),
            settings,
            ears,
            kernel: None,
            zone,
            metrics,
            report,
            heard: Heard::default(),
        }
    }

    /// Runs until every sender of inputs is gone. The rules stay.
    pub(crate) fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        while let Some(first) = inputs.blocking_recv() {
            self.take(first);
            while let Ok(next) = inputs.try_recv() {
                self.take(next);
            }
            if self.services.complete && self.slices.complete && (self.kernel.is_some() || self.policies_known()) {
                self.settle();
            }
        }
    }

    /// Takes an input into the model.
    pub(crate) fn take(&mut self, input: Input) {
        match input {
            Input::ServicesBegin => self.services.seen = Some(HashSet::new()),
            Input::Service(service) => {
                self.metrics.service_changes.inc();
                self.metrics.services_pending.inc();
                if let Some(seen) = &mut self.services.seen {
                    seen.insert(service.name.clone());
                }
                self.shadow.set_service(*service);
            }
            Input::ServiceGone(name) => {
                self.metrics.service_changes.inc();
                self.metrics.services_pending.inc();
                self.shadow.remove_service(&name);
            }
            Input::ServicesEnd => {
                let seen = self.services.seen.take().unwrap_or_default();
                self.shadow.retain_services(|n| seen.contains(n));
                self.services.complete = true;
            }
            Input::SlicesBegin => self.slices.seen = Some(HashSet::new()),
            Input::Slice(slice) => self.take_slice(*slice),
            Input::SliceGone { namespace, name } => {
                self.metrics.endpoint_changes.inc();
                self.metrics.endpoints_pending.inc();
                if let Some(service) = self.slice_owner.remove(&(namespace, name.clone())) {
                    self.shadow.remove_slice(&service, &name);
                }
            }
            Input::SlicesEnd => {
                let seen = self.slices.seen.take().unwrap_or_default();
                self.slice_owner.retain(|id, _| seen.contains(id));
                self.shadow.retain_slices(|ns, name| seen.contains(&(ns.into(), name.into())));
                self.slices.complete = true;
            }
            Input::Place(place) => self.shadow.set_place(place),
            Input::Policy(input) => self.take_policy(input),
            Input::Verify(heard) => self.heard.join(heard),
        }
    }

    /// Whether what pods may do is known: before, nothing is taken from what the kernel still has of an earlier process.
    fn policies_known(&self) -> bool {
        let complete = |kind: PolicyKind| self.policy_lists[kind as usize].complete;
        complete(PolicyKind::Policies)
            && (self.policies.is_empty() || complete(PolicyKind::Pods) && complete(PolicyKind::Namespaces))
    }

    fn take_policy(&mut self, input: PolicyInput) {
        let [policies, pods, namespaces] = &mut self.policy_lists;
        match input {
            PolicyInput::Begin(kind) => self.policy_lists[kind as usize].seen = Some(HashSet::new()),
            PolicyInput::Policy(policy) => {
                policies.note(policy.name.clone());
                self.policies.set_policy(*policy);
            }
            PolicyInput::PolicyGone(name) => self.policies.remove_policy(&name),
            PolicyInput::Pod(pod) => {
                pods.note(pod.name.clone());
                self.policies.set_pod(*pod);
            }
            PolicyInput::PodGone(name) => self.policies.remove_pod(&name),
            PolicyInput::Namespace(name, labels) => {
                namespaces.note(Name::new("", &name));
                self.policies.set_namespace(name, labels);
            }
            PolicyInput::NamespaceGone(name) => self.policies.remove_namespace(&name),
            PolicyInput::End(kind) => {
                let list = &mut self.policy_lists[kind as usize];
                let seen = list.seen.take().unwrap_or_default();
                list.complete = true;
                match kind {
                    PolicyKind::Policies => self.policies.retain_policies(|n| seen.contains(n)),
                    PolicyKind::Pods => self.policies.retain_pods(|n| seen.contains(n)),
                    PolicyKind::Namespaces => {
                        self.policies.retain_namespaces(|n| seen.contains(&Name::new("", n)));
                    }
                }
            }
        }
    }

    fn take_slice(&mut self, slice: Slice) {
        self.metrics.endpoint_changes.inc();
        self.metrics.endpoints_pending.inc();
        // What was there before this process tells nothing about it.
        self.triggers.extend(slice.changed.filter(|_| self.slices.complete));
        let id = (slice.service.namespace.clone(), Arc::from(&*slice.name));
        if let Some(seen) = &mut self.slices.seen {
            seen.insert(id.clone());
        }
        let owner = slice.service.clone();
        match self.slice_owner.insert(id.clone(), owner.clone()) {
            Some(before) if before != owner => self.shadow.remove_slice(&before, &id.1),
            _ => {}
        }
        self.shadow.set_slice(slice);
    }

    /// Brings the kernel and DNS to what the model says.
    pub(crate) fn settle(&mut self) {
        let heard = std::mem::take(&mut self.heard);
        let dirty: Vec<ServiceName> = self.shadow.dirty().iter().cloned().collect();
        let policy_waits = self.policies.is_dirty() && self.policies_known();
        if dirty.is_empty() && !policy_waits && heard.is_nothing() && self.kernel.is_some() {
            return;
        }
        let started = Instant::now();
        self.metrics.queued();
        let full = self.kernel.is_none();
        match self.program(heard) {
            Ok(()) => {
                self.metrics.synced(started.elapsed().as_secs_f64(), full);
                let now = jiff::Timestamp::now();
                for since in std::mem::take(&mut self.triggers) {
                    self.metrics.programmed(now.duration_since(since).as_secs_f64().max(0.0));
                }
                let (internal, external) = self.shadow.without_local();
                self.metrics.without_local(internal, external);
                self.publish(None);
            }
            Err(error) => {
                tracing::error!(error = %Chain(&error), "service rules not up to date; trying again");
                self.metrics.failures.inc();
                self.kernel = None;
                let since = self.report.borrow().failing_since.unwrap_or(started);
                self.publish(Some(since));
            }
        }
        // In parts: queries are answered meanwhile.
        for names in dirty.chunks(ZONE_PART) {
            let mut zone = self.zone.write();
            for name in names {
                zone.update(name, self.shadow.service(name).map(Arc::as_ref), self.shadow.slices(name));
            }
        }
        self.zone.write().set_ready();
    }

    fn publish(&self, failing_since: Option<Instant>) {
        let health_checks = self.shadow.health_checks();
        let netlink_port = self.kernel.as_ref().map_or(0, Kernel::port);
        self.report.send_replace(Report { failing_since, health_checks, netlink_port });
    }

    fn program(&mut self, heard: Heard) -> Result<(), Error> {
        let policies = self.policies.is_dirty() && self.policies_known();
        if self.kernel.is_none() {
            self.shadow.catch_up();
            if policies {
                self.policies.flush(&mut Vec::new(), &mut Vec::new());
            }
            self.start()?;
            return self.verify(Heard::default());
        }
        let mut delta = self.shadow.flush();
        if policies {
            self.policies.flush(&mut delta.removed, &mut delta.added);
            cancel_out(&mut delta);
        }
        let Some(kernel) = &mut self.kernel else { return Ok(()) };
        if !delta.is_empty() {
            kernel.apply(&delta)?;
            tracing::debug!(added = delta.added.len(), removed = delta.removed.len(), "service maps changed");
        }
        self.verify(heard)?;
        if !delta.stale.is_empty() {
            match conntrack::forget(&delta.stale) {
                Ok(count) => tracing::debug!(count, "stale UDP flows forgotten"),
                Err(error) => tracing::warn!(%error, "stale UDP flows not forgotten"),
            }
        }
        Ok(())
    }

    /// Compares the kernel's table with the model when somebody else may have changed it. Whoever does so while it is
    /// being repaired is not heard, only noticed: then once more.
    fn verify(&mut self, mut heard: Heard) -> Result<(), Error> {
        let Some(kernel) = &mut self.kernel else { return Ok(()) };
        for _ in 0..VERIFICATIONS {
            if kernel.take_doubt() {
                heard = Heard::everything();
            }
            if heard.is_nothing() {
                return Ok(());
            }
            let difference = kernel.verify(&std::mem::take(&mut heard), &wanted(&self.shadow, &self.policies))?;
            if difference.removed + difference.added > 0 {
                self.metrics.repairs.inc();
                tracing::warn!(?difference, "somebody changed our nftables elements: repaired");
            }
        }
        if kernel.take_doubt() { Err(Error::Restless) } else { Ok(()) }
    }

    /// First load, or a new beginning after a failure: whatever is in the kernel becomes what it should be.
    fn start(&mut self) -> Result<(), Error> {
        let started = Instant::now();
        let mut kernel = Kernel::open(self.settings.clone(), self.ears.clone())?;
        let difference = kernel.reconcile(&wanted(&self.shadow, &self.policies))?;
        self.kernel = Some(kernel);
        tracing::info!(
            services = self.shadow.service_count(),
            added = difference.added,
            removed = difference.removed,
            millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "service rules loaded"
        );
        Ok(())
    }
}

/// Every element that should be in the kernel.
fn wanted(shadow: &Shadow, policies: &Policies) -> impl Fn(&mut dyn FnMut(Element)) {
    |emit| {
        shadow.elements(emit);
        policies.elements(emit);
    }
}

/// How soon a failed change is tried again.
pub(crate) const RETRY: Duration = Duration::from_secs(1);

/// An error with its sources on one line.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
