//! The control-plane image, made of this node's own executable: nothing is pulled to run the control plane.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt, path::Path};

use super::{
    ImageHandle,
    error::{Error, store_error},
    service::parse_reference,
    store::{Digest, Image, Store},
};

/// Makes (or finds) the image. Its layer is named after the executable's identity on disk, so that an unchanged
/// executable costs one `stat`.
pub(super) fn assemble(store: &Store, name: &str, path: &Path, file_name: &str) -> Result<ImageHandle, Error> {
    let name = parse_reference(name)?.whole();
    let meta = fs::metadata(path).map_err(store_error("stat", path))?;
    let identity = format!(
        "executable {file_name} {} {} {} {}",
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime_nsec() + meta.mtime()
    );
    let diff_id = Digest::of(identity.as_bytes());
    let config = serde_json::json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Entrypoint": [format!("/{file_name}")], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [diff_id.to_string()] },
    })
    .to_string();
    let image = Image {
        config: Digest::of(config.as_bytes()),
        layers: vec![diff_id.clone()],
        size: meta.size(),
        repo_digests: BTreeSet::new(),
        pulled_with: BTreeSet::new(),
    };
    if let Some(present) = store.lookup(&name)?
        && present.id == image.config.to_string()
        && store.has_layer(&diff_id)
    {
        return Ok(present);
    }
    if !store.has_layer(&diff_id) {
        let dir = store.scratch("layer");
        let target = dir.join(file_name);
        fs::create_dir(&dir).map_err(store_error("create", &dir))?;
        // One inode is one copy in the page cache for agent and control plane. A container cannot reach it: layers are lower
        // directories of an overlay, and opening one of their files for writing copies it up first.
        if fs::hard_link(path, &target).is_err() {
            fs::copy(path, &target).map_err(store_error("copy to", &target))?;
        }
        store.add_layer(&diff_id, &dir, meta.size())?;
    }
    store.add_image(std::slice::from_ref(&name), image.clone(), config.as_bytes())?;
    store.handle(&name, &image, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_executable_is_the_same_image() {
        let dir = tempfile::tempdir().unwrap();
        let executable = dir.path().join("bin");
        fs::write(&executable, "one").unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let first = assemble(&store, "isopod.local/isopod:v1", &executable, "isopod").unwrap();
        assert_eq!(fs::read_to_string(first.layers[0].join("isopod")).unwrap(), "one");
        assert_eq!(assemble(&store, "isopod.local/isopod:v1", &executable, "isopod").unwrap().id, first.id);
        fs::remove_file(&executable).unwrap();
        fs::write(&executable, "another").unwrap();
        let second = assemble(&store, "isopod.local/isopod:v1", &executable, "isopod").unwrap();
        assert_ne!(second.id, first.id);
        assert_eq!(fs::read_to_string(second.layers[0].join("isopod")).unwrap(), "another");
    }
}
