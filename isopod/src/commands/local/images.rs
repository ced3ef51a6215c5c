//! `isopod images`: the images of this machine.

use anyhow::Result;
use isopod_agent::Paths;
use serde_json::Value;

use super::{Node, ask, text};

pub(crate) fn run(paths: &Paths) -> Result<()> {
    let (node, pods) = ask(async {
        let node = Node::connect(paths).await?;
        Ok((node.get(&format!("/api/v1/nodes/{}", node.name)).await?, node.pods().await?))
    })?;
    // One from an archive has no digest: then the name counts, which a pod may have shortened.
    let named =
        |name: &String, asked: &str| name == asked || name.strip_suffix(asked).is_some_and(|n| n.ends_with('/'));
    let users = |names: &[String]| {
        let all = pods.iter().filter(|p| {
            let statuses = ["containerStatuses", "initContainerStatuses"].map(|l| p["status"][l].as_array());
            let uses = |c: &Value| names.iter().any(|n| c["imageID"] == n.as_str() || named(n, text(&c["image"])));
            statuses.into_iter().flatten().flatten().any(uses)
        });
        all.count()
    };
    let images = node["status"]["images"].as_array().cloned().unwrap_or_default();
    let rows: Vec<[String; 4]> = images
        .iter()
        .map(|i| {
            let names: Vec<String> = i["names"].as_array().into_iter().flatten().map(|n| text(n).to_owned()).collect();
            let tag = names.iter().find(|n| !n.contains('@')).or(names.first()).cloned().unwrap_or_default();
            let digest = names.iter().find_map(|n| n.split_once("@sha256:")).map(|(_, d)| d.chars().take(12).collect());
            let mb = i["sizeBytes"].as_f64().unwrap_or(0.0) / 1e6;
            [tag, digest.unwrap_or_else(|| "<none>".to_owned()), format!("{mb:.1} MB"), users(&names).to_string()]
        })
        .collect();
    crate::table::print(["IMAGE", "DIGEST", "SIZE", "PODS"], &rows);
    Ok(())
}
