//! The image service of a node: [`ImageService`] over the store, the registries and the archive directory.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use futures::{FutureExt, future::BoxFuture};
use oci_spec::distribution::Reference;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Semaphore;

use crate::rate::Rate;

use super::{
    Begun, DockerConfig, ImageError, ImageHandle, ImageInfo, ImageService, PullPolicy, archive, assemble, credentials,
    error::Error, providers::Providers, pull, store,
};

/// Most layers downloaded at once on a node.
pub(super) const PARALLEL_DOWNLOADS: usize = 6;

/// Images on this machine's disk. Cheap to clone.
#[derive(Clone)]
pub struct LocalImages {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) store: store::Store,
    /// `etc/isopod/certs.d`: containerd's hosts.toml per registry.
    pub(super) hosts_dir: PathBuf,
    /// Docker config.json with the node's own credentials; may be absent.
    pub(super) node_credentials: PathBuf,
    pub(super) downloads: Semaphore,
    /// One pull per image name, and one download per blob, at a time; later callers find its result in the store.
    pulls: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    in_use: Mutex<BTreeSet<String>>,
    verification: RwLock<Verification>,
    /// Places for pulls, where their number is limited.
    places: RwLock<Option<Arc<Semaphore>>>,
    rate: RwLock<Option<Rate>>,
    /// The directory of image archives, read by one at a time.
    archives: tokio::sync::Mutex<Option<PathBuf>>,
    pub(super) providers: RwLock<Arc<Providers>>,
}

impl Inner {
    /// Waits for one's turn with an image's name or a blob's digest.
    pub(super) async fn turn(&self, what: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut pulls = self.pulls.lock();
            pulls.retain(|_, turn| Arc::strong_count(turn) > 1);
            pulls.entry(what.to_owned()).or_default().clone()
        };
        turn.lock_owned().await
    }
}

/// Which images that are here already a pod may only use with credentials that their registry has accepted before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Verification {
    /// None.
    Never,
    /// Those that were pulled.
    #[default]
    NotPreloaded,
    /// Those that were pulled, and preloaded ones that are not in this list (`registry/path` or `registry/path/*`).
    NotAllowed(Vec<String>),
    /// All.
    Always,
}

/// Whether a pattern covers an image's name.
fn allows(pattern: &str, name: &str) -> bool {
    let bare = name.split('@').next().unwrap_or(name);
    let bare = match bare.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => path,
        _ => bare,
    };
    match pattern.strip_suffix("/*") {
        Some(prefix) => bare.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/')),
        None => bare == pattern,
    }
}

/// Parses an image name with Docker's defaults (`docker.io/library/`, `:latest`).
pub(super) fn parse_reference(name: &str) -> Result<Reference, Error> {
    name.parse().map_err(|why| Error::InvalidName { name: name.to_owned(), why: format!("{why}") })
}

impl LocalImages {
    /// Opens (and makes, when absent) the store at `root`; leftovers of an earlier crash are removed.
    pub fn open(root: &Path, hosts_dir: PathBuf, node_credentials: PathBuf) -> Result<Self, ImageError> {
        let store = store::Store::open(root)?;
        Ok(Self {
            inner: Arc::new(Inner {
                store,
                hosts_dir,
                node_credentials,
                downloads: Semaphore::new(PARALLEL_DOWNLOADS),
                pulls: Mutex::new(HashMap::new()),
                in_use: Mutex::default(),
                verification: RwLock::default(),
                places: RwLock::default(),
                rate: RwLock::default(),
                archives: tokio::sync::Mutex::default(),
                providers: RwLock::default(),
            }),
        })
    }

    /// Makes the image `name` whose only content is the executable at `path`, as `/FILE_NAME` and as entrypoint.
    pub async fn assemble(&self, name: &str, path: &Path, file_name: &str) -> Result<ImageHandle, ImageError> {
        let (inner, name, path) = (self.inner.clone(), name.to_owned(), path.to_owned());
        let file_name = file_name.to_owned();
        Ok(blocking(move || assemble::assemble(&inner.store, &name, &path, &file_name)).await?)
    }

    /// Programs to ask for credentials.
    pub(crate) fn ask(&self, providers: Arc<Providers>) {
        *self.inner.providers.write() = providers;
    }

    /// Whether pods have to show credentials for images that are here already.
    pub fn verify(&self, verification: Verification) {
        *self.inner.verification.write() = verification;
    }

    /// Most pulls at one time; later ones wait.
    pub fn limit_pulls(&self, most: Option<usize>) {
        *self.inner.places.write() = most.map(|n| Arc::new(Semaphore::new(n.max(1))));
    }

    /// Pulls per second and their burst; those beyond fail and are tried again with back-off.
    pub(crate) fn limit_rate(&self, rate: Option<Rate>) {
        *self.inner.rate.write() = rate;
    }

    /// Whether a pod with these secrets may use an image that is here, or has to ask the registry.
    fn may_use(&self, name: &str, reference: &Reference, secrets: &[DockerConfig]) -> Result<bool, Error> {
        let with = self.inner.store.pulled_with(&reference.whole());
        let preloaded = match &*self.inner.verification.read() {
            Verification::Never => return Ok(true),
            Verification::NotPreloaded => true,
            Verification::NotAllowed(list) => list.iter().any(|l| allows(l, name)),
            Verification::Always => false,
        };
        if with.is_empty() {
            return Ok(preloaded);
        }
        if with.contains(store::ANYBODY) {
            return Ok(true);
        }
        let node = credentials::read(&self.inner.node_credentials)?;
        Ok(!with.is_disjoint(&credentials::marks(reference, secrets, &node)))
    }

    async fn ensure_image(
        &self,
        name: &str,
        policy: PullPolicy,
        secrets: Vec<DockerConfig>,
        begun: Begun,
    ) -> Result<ImageHandle, Error> {
        let asked = Instant::now();
        let reference = parse_reference(name)?;
        let mut present = self.inner.store.lookup(&reference.whole())?;
        if present.is_none() && policy != PullPolicy::Always {
            self.read_archives(Some(reference.whole())).await?;
            present = self.inner.store.lookup(&reference.whole())?;
        }
        let usable = present.is_some() && self.may_use(name, &reference, &secrets)?;
        match (policy, present.filter(|_| usable)) {
            (PullPolicy::IfNotPresent | PullPolicy::Never, Some(image)) => return Ok(image),
            (PullPolicy::Never, None) => return Err(Error::NeverPull(name.to_owned())),
            _ => {}
        }
        begun();
        let _turn = self.inner.turn(&reference.whole()).await;
        if policy == PullPolicy::IfNotPresent
            && self.may_use(name, &reference, &secrets)?
            && let Some(image) = self.inner.store.lookup(&reference.whole())?
        {
            return Ok(image);
        }
        let places = self.inner.places.read().clone();
        let _place = match &places {
            Some(places) => places.acquire().await.ok(),
            None => None,
        };
        if self.inner.rate.read().as_ref().is_some_and(|r| r.take().is_err()) {
            return Err(Error::Rate);
        }
        let mut image = pull::pull(&self.inner, name, &reference, &secrets).await?;
        if let Some(pulled) = &mut image.pulled {
            pulled.including_waiting = asked.elapsed();
        }
        Ok(image)
    }
}

impl LocalImages {
    /// Loads archives: those that may have the image `wanted`, or all whose images are not here.
    async fn read_archives(&self, wanted: Option<String>) -> Result<(), Error> {
        let one_at_a_time = self.inner.archives.lock().await;
        let Some(dir) = one_at_a_time.clone() else { return Ok(()) };
        let inner = self.inner.clone();
        let outcomes = blocking(move || Ok(archive::load_directory(&inner.store, &dir, wanted.as_deref()))).await?;
        for (path, outcome) in outcomes {
            match outcome {
                Ok(names) => tracing::info!(path = %path.display(), ?names, "image archive loaded"),
                Err(error) => tracing::error!(path = %path.display(), "{}", ImageError::from(error)),
            }
        }
        Ok(())
    }
}

/// Runs blocking work off the async threads; a panic in it goes on here.
pub(super) async fn blocking<T: Send + 'static>(
    task: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(task).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

impl ImageService for LocalImages {
    fn ensure<'a>(
        &'a self,
        image: &'a str,
        policy: PullPolicy,
        pull_secrets: Vec<DockerConfig>,
        begun: Begun,
    ) -> BoxFuture<'a, Result<ImageHandle, ImageError>> {
        async move { Ok(self.ensure_image(image, policy, pull_secrets, begun).await?) }.boxed()
    }

    fn find(&self, image: &str) -> Result<Option<ImageHandle>, ImageError> {
        if let Some(found) = self.inner.store.by_id(image)? {
            return Ok(Some(found));
        }
        Ok(self.inner.store.lookup(&parse_reference(image)?.whole())?)
    }

    fn in_use(&self, ids: Vec<String>) {
        *self.inner.in_use.lock() = ids.into_iter().collect();
    }

    fn remove(&self, id: &str) -> Result<u64, ImageError> {
        if self.inner.in_use.lock().contains(id) {
            return Ok(0);
        }
        Ok(self.inner.store.remove(id)?)
    }

    fn changes(&self) -> tokio::sync::watch::Receiver<()> {
        self.inner.store.changes()
    }

    fn list(&self) -> Vec<ImageInfo> {
        self.inner.store.list()
    }

    fn load_archives<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, Result<(), ImageError>> {
        async move {
            *self.inner.archives.lock().await = Some(dir.to_owned());
            Ok(self.read_archives(None).await?)
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::allows;

    #[test]
    fn allowlists_name_images_and_trees() {
        for (pattern, name, want) in [
            ("r.example:5000/app", "r.example:5000/app:1", true),
            ("r.example:5000/app", "r.example:5000/app@sha256:0", true),
            ("r.example:5000/app", "r.example:5000/app/other", false),
            ("r.example/team/*", "r.example/team/app", true),
            ("r.example/team/*", "r.example/teammate/app", false),
        ] {
            assert_eq!(allows(pattern, name), want, "{pattern} {name}");
        }
    }
}
