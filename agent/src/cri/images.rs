//! The image service over CRI: the agent's own images.

use std::{collections::HashMap, sync::Arc};

use base64::Engine;
use tonic::{Request, Response, Status};

use super::{Items, one_by_one, stats, view};
use crate::{
    context::Context,
    grpc::proto::cri::{
        AuthConfig, ContainerState, Image, ImageFilter, ImageFsInfoRequest, ImageFsInfoResponse, ImageSpec,
        ImageStatusRequest, ImageStatusResponse, Int64Value, ListImagesRequest, ListImagesResponse, PullImageRequest,
        PullImageResponse, RemoveImageRequest, RemoveImageResponse, StreamImagesRequest, StreamImagesResponse,
        image_service_server::ImageService,
    },
    images::{DockerConfig, ImageHandle, ImageInfo, PullPolicy, RegistryAuth},
};

/// The service.
pub(super) struct Images {
    pub(super) ctx: Arc<Context>,
}

fn name(spec: Option<&ImageSpec>) -> Result<&str, Status> {
    let name = spec.map(|s| s.image.as_str()).filter(|i| !i.is_empty());
    name.ok_or_else(|| Status::invalid_argument("no image is named"))
}

impl Images {
    fn find(&self, name: &str) -> Result<Option<ImageHandle>, Status> {
        self.ctx.images.find(name).map_err(|e| Status::invalid_argument(e.to_string()))
    }

    fn image(&self, info: &ImageInfo) -> Image {
        let (repo_digests, repo_tags) = info.names.iter().cloned().partition(|n| n.contains('@'));
        let handle = self.ctx.images.find(&info.id).ok().flatten();
        let user = handle.and_then(|h| h.config.config().as_ref()?.user().clone()).unwrap_or_default();
        let user = user.split(':').next().unwrap_or_default();
        let uid = user.parse().ok();
        Image {
            id: info.id.clone(),
            repo_tags,
            repo_digests,
            size: info.size.max(1),
            uid: uid.map(|value| Int64Value { value }),
            username: if uid.is_none() { user.into() } else { String::new() },
            spec: None,
            pinned: info.names.iter().any(|n| Some(n.as_str()) == self.ctx.config.own_image.as_deref()),
        }
    }

    fn listed(&self, filter: Option<ImageFilter>) -> Result<Vec<Image>, Status> {
        Ok(match filter.and_then(|f| f.image).map(|i| i.image).filter(|i| !i.is_empty()) {
            Some(name) => self.info(&name)?.into_iter().map(|(i, _)| self.image(&i)).collect(),
            None => self.ctx.images.list().iter().map(|i| self.image(i)).collect(),
        })
    }

    fn info(&self, name: &str) -> Result<Option<(ImageInfo, ImageHandle)>, Status> {
        let Some(handle) = self.find(name)? else { return Ok(None) };
        Ok(self.ctx.images.list().into_iter().find(|i| i.id == handle.id).map(|info| (info, handle)))
    }
}

/// The credentials a caller gives, under the registry they are for.
fn credentials(image: &str, auth: &AuthConfig) -> Result<Option<DockerConfig>, Status> {
    let (mut username, mut password) = (auth.username.clone(), auth.password.clone());
    if !auth.auth.is_empty() {
        let bad = |_| Status::invalid_argument("auth is not base64 of USER:PASSWORD");
        let decoded = base64::engine::general_purpose::STANDARD.decode(auth.auth.trim()).map_err(bad)?;
        let text = String::from_utf8_lossy(&decoded).trim_end_matches('\0').to_string();
        (username, password) = text.split_once(':').map(|(u, p)| (u.into(), p.into())).unwrap_or((text, String::new()));
    }
    if username.is_empty() && auth.identity_token.is_empty() {
        return Ok(None);
    }
    let first = image.split('/').next().unwrap_or_default();
    let is_host = image.contains('/') && (first.contains(['.', ':']) || first == "localhost");
    let registry = match auth.server_address.as_str() {
        "" if is_host => first.to_string(),
        "" => "docker.io".to_string(),
        address => address.to_string(),
    };
    let identity_token = Some(auth.identity_token.clone()).filter(|t| !t.is_empty());
    Ok(Some(DockerConfig { auths: [(registry, RegistryAuth { username, password, identity_token })].into() }))
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(&self, r: Request<ListImagesRequest>) -> Result<Response<ListImagesResponse>, Status> {
        Ok(Response::new(ListImagesResponse { images: self.listed(r.into_inner().filter)? }))
    }

    type StreamImagesStream = Items<StreamImagesResponse>;

    async fn stream_images(
        &self,
        r: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let all = self.listed(r.into_inner().filter)?.into_iter();
        one_by_one(all.map(|image| StreamImagesResponse { image: Some(image) }).collect())
    }

    async fn image_status(&self, r: Request<ImageStatusRequest>) -> Result<Response<ImageStatusResponse>, Status> {
        let r = r.into_inner();
        let Some((info, handle)) = self.info(name(r.image.as_ref())?)? else {
            return Ok(Response::new(ImageStatusResponse::default()));
        };
        let mut more = HashMap::new();
        if r.verbose {
            let text = serde_json::json!({"chainID": "", "imageSpec": handle.config.as_ref()}).to_string();
            more.insert("info".to_string(), text);
        }
        Ok(Response::new(ImageStatusResponse { image: Some(self.image(&info)), info: more }))
    }

    async fn pull_image(&self, r: Request<PullImageRequest>) -> Result<Response<PullImageResponse>, Status> {
        let r = r.into_inner();
        let name = name(r.image.as_ref())?;
        let secrets = match &r.auth {
            Some(auth) => credentials(name, auth)?.into_iter().collect(),
            None => Vec::new(),
        };
        let pulled = self.ctx.images.ensure(name, PullPolicy::Always, secrets, Arc::new(|| {})).await;
        let handle = pulled.map_err(|e| Status::unknown(e.to_string()))?;
        Ok(Response::new(PullImageResponse { image_ref: handle.id }))
    }

    async fn remove_image(&self, r: Request<RemoveImageRequest>) -> Result<Response<RemoveImageResponse>, Status> {
        let r = r.into_inner();
        if let Some(handle) = self.find(name(r.image.as_ref())?)? {
            let containers = view::all(&self.ctx).into_iter().flat_map(|g| g.containers);
            // Its layers are what they stand on.
            if let Some(c) =
                containers.filter(|c| c.image_id == handle.id).find(|c| c.state != ContainerState::ContainerExited)
            {
                return Err(Status::failed_precondition(format!("image {} is used by container {}", handle.id, c.id)));
            }
            self.ctx.images.remove(&handle.id).map_err(|e| Status::internal(e.to_string()))?;
            if self.find(&handle.id)?.is_some() {
                return Err(Status::failed_precondition(format!("image {} is in use", handle.id)));
            }
        }
        Ok(Response::new(RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Result<Response<ImageFsInfoResponse>, Status> {
        let paths = &self.ctx.config.paths;
        let images = self.ctx.images.list().iter().map(|i| i.size).sum();
        let containers = self.ctx.stats.disk(paths.pods());
        let of =
            |path: std::path::PathBuf, bytes, inodes| stats::file_system(path.display().to_string(), bytes, inodes);
        Ok(Response::new(ImageFsInfoResponse {
            image_filesystems: vec![of(paths.image_store(), images, 0)],
            container_filesystems: vec![of(paths.pods(), containers.bytes, containers.inodes)],
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_for_the_images_registry() {
        let plain = AuthConfig { username: "u".into(), password: "p".into(), ..AuthConfig::default() };
        let coded = AuthConfig { auth: "dTpwOnE=".into(), ..AuthConfig::default() };
        let key = |image: &str, auth: &AuthConfig| {
            let config = credentials(image, auth).unwrap().unwrap();
            let (key, auth) = config.auths.into_iter().next().unwrap();
            (key, auth.password)
        };
        assert_eq!(key("r.test:5000/a/b:1", &plain), ("r.test:5000".into(), "p".into()));
        assert_eq!(key("busybox", &coded), ("docker.io".into(), "p:q".into()));
        assert_eq!(credentials("busybox", &AuthConfig::default()).unwrap(), None);
        let bad = AuthConfig { auth: "%".into(), ..AuthConfig::default() };
        assert!(credentials("busybox", &bad).is_err());
    }
}
