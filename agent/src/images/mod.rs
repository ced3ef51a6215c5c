//! Images: what the pods need of them.
//!
//! [`ImageService`] is the seam between pods and images: a reference goes in, unpacked layers and the image's
//! configuration come out.

mod archive;
mod assemble;
mod credentials;
mod download;
mod error;
mod hosts;
mod manifest;
mod providers;
mod pull;
mod registry;
mod service;
mod store;
mod unpack;

use std::{collections::BTreeMap, path::Path, path::PathBuf, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use oci_spec::image::ImageConfiguration;

pub(crate) use error::chain;
pub(crate) use providers::{Account, Owner, Providers};
pub use service::{LocalImages, Verification};

/// When to contact the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// Every time.
    Always,
    /// When the image is not on this machine.
    IfNotPresent,
    /// Never.
    Never,
}

/// One registry's credentials.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryAuth {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// OAuth2 identity token, instead of the pair.
    pub identity_token: Option<String>,
}

/// Docker's config.json: credentials by registry (`auths` keys as written).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DockerConfig {
    /// Registry (host, host:port, host/path or URL) to credentials.
    pub auths: BTreeMap<String, RegistryAuth>,
}

/// Called when an image is not here, or must be asked for, and a pull begins; must not block.
pub type Begun = Arc<dyn Fn() + Send + Sync>;

/// How long a pull took and what it brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pulled {
    /// Time of the pull itself.
    pub took: Duration,
    /// Time including waiting for a free slot.
    pub including_waiting: Duration,
    /// Compressed size in bytes.
    pub size: u64,
}

/// An image ready to be run.
#[derive(Debug, Clone)]
pub struct ImageHandle {
    /// Configuration digest, `sha256:...`; what `containerStatuses[].imageID` falls back to.
    pub id: String,
    /// `NAME@sha256:...` (repository digest) or, for an image without one, the id.
    pub digest_reference: String,
    /// The reference as resolved, with its tag (`docker.io/library/busybox:latest`).
    pub reference: String,
    /// Entrypoint, environment, user, ports.
    pub config: Arc<ImageConfiguration>,
    /// Unpacked layers, uppermost first: the overlay's lower directories.
    pub layers: Vec<PathBuf>,
    /// Set when this call pulled it.
    pub pulled: Option<Pulled>,
}

/// One entry of the node's image list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Configuration digest.
    pub id: String,
    /// Tags and repository digests.
    pub names: Vec<String>,
    /// Bytes on disk.
    pub size: u64,
}

/// Why an image is not ready. The variants are the waiting reasons of a container's status; Display is its message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// `ErrImagePull`.
    #[error("{0}")]
    ErrImagePull(String),
    /// `ErrImageNeverPull`.
    #[error("{0}")]
    ErrImageNeverPull(String),
    /// `InvalidImageName`.
    #[error("{0}")]
    InvalidImageName(String),
}

impl ImageError {
    /// The waiting reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::ErrImagePull(_) => "ErrImagePull",
            Self::ErrImageNeverPull(_) => "ErrImageNeverPull",
            Self::InvalidImageName(_) => "InvalidImageName",
        }
    }
}

/// The images of this machine.
pub trait ImageService: Send + Sync + 'static {
    /// Makes `image` ready: finds it, or pulls and unpacks it. Concurrent calls for one image share one pull.
    /// Back-off is the caller's.
    fn ensure<'a>(
        &'a self,
        image: &'a str,
        policy: PullPolicy,
        pull_secrets: Vec<DockerConfig>,
        begun: Begun,
    ) -> BoxFuture<'a, Result<ImageHandle, ImageError>>;

    /// An image that is here, by its id or a name.
    fn find(&self, image: &str) -> Result<Option<ImageHandle>, ImageError>;

    /// Keeps the images with these ids from being collected; replaces the earlier set.
    fn in_use(&self, ids: Vec<String>);

    /// Forgets all names of an image that no container uses and frees layers that no other image has. Bytes freed.
    fn remove(&self, id: &str) -> Result<u64, ImageError>;

    /// Tells of every later change of the list.
    fn changes(&self) -> tokio::sync::watch::Receiver<()>;

    /// All images, largest first.
    fn list(&self) -> Vec<ImageInfo>;

    /// Loads the OCI layouts and docker archives found in `dir`; a bad one is logged and skipped.
    fn load_archives<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, Result<(), ImageError>>;
}
