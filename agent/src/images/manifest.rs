//! What a manifest says: one image, or a list of images for several kinds of machines.

use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, Os};

/// A manifest.
pub(super) enum Manifest {
    Image(Box<ImageManifest>),
    Index(Box<ImageIndex>),
}

impl Manifest {
    /// Reads one; lists are told by what is in them, as their media types are not always there.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let value: serde_json::Value = serde_json::from_slice(bytes)?;
        if value.get("manifests").is_some() {
            serde_json::from_value(value).map(Box::new).map(Self::Index)
        } else {
            serde_json::from_value(value).map(Box::new).map(Self::Image)
        }
    }
}

/// This machine's architecture, as images call it.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// This machine's entry of a list: no variant or the plainest one first; else one that says nothing of machines.
pub(super) fn here(index: &ImageIndex) -> Option<&Descriptor> {
    let arch = Arch::from(architecture());
    let fits =
        |d: &&Descriptor| d.platform().as_ref().is_some_and(|p| *p.os() == Os::Linux && *p.architecture() == arch);
    let variant = |d: &&Descriptor| d.platform().as_ref().and_then(|p| p.variant().clone()).unwrap_or_default();
    let all = index.manifests();
    all.iter().filter(fits).min_by_key(variant).or_else(|| all.iter().find(|d| d.platform().is_none()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_entry_for_this_machine_is_found() {
        let entry = |n: u8, platform: Value| {
            let digest = format!("sha256:{n:064}");
            let mut d = json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": n});
            if !platform.is_null() {
                d["platform"] = platform;
            }
            d
        };
        let of = |os: &str, arch: &str| json!({"os": os, "architecture": arch});
        let chosen = |entries: Vec<Value>| {
            let list = json!({"schemaVersion": 2, "manifests": entries}).to_string();
            let Ok(Manifest::Index(index)) = Manifest::parse(list.as_bytes()) else { panic!("{list}") };
            here(&index).map(Descriptor::size)
        };
        let mut v3 = of("linux", architecture());
        v3["variant"] = json!("v3");
        let (other, own) = (of("linux", "s390x"), of("linux", architecture()));
        let all = vec![entry(1, Value::Null), entry(2, other.clone()), entry(3, v3), entry(4, own)];
        assert_eq!(chosen(all.clone()), Some(4));
        assert_eq!(chosen(all[..3].to_vec()), Some(3));
        assert_eq!(chosen(all[..2].to_vec()), Some(1));
        assert_eq!(chosen(vec![entry(5, of("windows", architecture())), entry(2, other)]), None);
    }
}
