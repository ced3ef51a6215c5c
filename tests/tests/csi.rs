//! CSI volumes, with a driver that speaks real gRPC on real sockets.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, process::Child};

use isopod_tests::{Cluster, Net, eventually, host::binaries};
use serde_json::Value;

const DRIVER: &str = "mock.csi.test";

/// A driver on the cluster's host.
struct Driver {
    process: Child,
    data: String,
    log: std::path::PathBuf,
}

impl Driver {
    fn start(c: &Cluster, name: &str, words: &[&str]) -> Self {
        let data = format!("/var/lib/{name}");
        let program = binaries().join("mock-csi");
        let mut args = vec![name, data.as_str()];
        args.extend(words);
        let process = c.host.spawn("csi.log", program.to_str().unwrap(), &args);
        Self { process, log: c.host.path(&format!("{data}/log")), data }
    }

    /// The requests so far that contain all these words.
    fn asked(&self, words: &[&str]) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().filter(|l| words.iter().all(|w| l.contains(w))).map(str::to_owned).collect()
    }

    #[track_caller]
    fn wait(&self, words: &[&str]) -> String {
        eventually(&format!("a request with {words:?}"), || {
            self.asked(words).pop().ok_or_else(|| fs::read_to_string(&self.log))
        })
    }

    fn stop(mut self, c: &Cluster) {
        c.host.must(&format!("kill $(cat {}/pid)", self.data));
        self.process.wait().unwrap();
    }
}

fn volume(name: &str, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: {name}}}\nspec:\n  capacity: {{storage: 1Gi}}\n  \
         accessModes: [ReadWriteOnce]\n  storageClassName: ''\n  claimRef: {{namespace: default, name: {name}}}\n  \
         csi: {{driver: {DRIVER}, volumeHandle: handle-{name}, fsType: ext4, volumeAttributes: {{content: of-{name}}}{more}}}\n\
         ---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: {name}}}\nspec:\n  accessModes: [ReadWriteOnce]\n  \
         storageClassName: ''\n  resources: {{requests: {{storage: 1Gi}}}}\n  volumeName: {name}\n"
    )
}

fn pod(name: &str, claim: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  \
         securityContext: {{fsGroup: 4711}}\n  \
         containers: [{{name: c, image: 'busybox:1', command: [sleep, '1000'], volumeMounts: [{{name: v, mountPath: /v}}]}}]\n  \
         volumes: [{{name: v, persistentVolumeClaim: {{claimName: {claim}}}}}]\n"
    )
}

/// What a Summary says of a pod's volume.
fn pod_volume(summary: &Value, pod: &str, volume: &str) -> Value {
    let pods = summary["pods"].as_array().unwrap();
    let pod = pods.iter().find(|p| p["podRef"]["name"] == pod).unwrap();
    pod["volume"].as_array().unwrap().iter().find(|v| v["name"] == volume).cloned().unwrap_or_default()
}

fn left(c: &Cluster) -> String {
    c.host.must("grep /var/lib/kubelet /proc/self/mountinfo; find /var/lib/kubelet/pods /var/lib/kubelet/plugins/kubernetes.io -name vol_data.json 2>/dev/null; true")
}

#[test]
fn volumes_are_staged_published_grown_and_taken_down_also_across_restarts() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    c.apply(&format!(
        "apiVersion: storage.k8s.io/v1\nkind: CSIDriver\nmetadata: {{name: {DRIVER}}}\nspec:\n  attachRequired: false\n  \
         podInfoOnMount: true\n  volumeLifecycleModes: [Persistent, Ephemeral]\n  fsGroupPolicy: File\n  \
         tokenRequests: [{{audience: vault, expirationSeconds: 3600}}]\n"
    ));
    c.k("create secret generic stage --from-literal=key=opensesame");
    c.apply(&format!(
        "{}{}",
        volume("a", ", nodeStageSecretRef: {namespace: default, name: stage}"),
        pod("early", "a")
    ));
    // No driver yet: the pod waits, is told why, and comes up as soon as there is one.
    eventually("FailedMount", || {
        let events = c.k("get events --field-selector reason=FailedMount");
        if events.contains("not found in the list of registered CSI drivers") { Ok(()) } else { Err(events) }
    });
    let driver = Driver::start(&c, DRIVER, &["stage", "expand", "stats"]);
    driver.wait(&["RegistrationStatus", "plugin_registered: true"]);
    c.wait_ready("early");
    let csi_node = c.wait_field("csinode one", ".spec.drivers[0]", |d| d.contains(DRIVER));
    for part in ["\"nodeID\":\"mock.csi.test-of-one\"", "\"count\":7", "topology.mock.csi.test/zone"] {
        assert!(csi_node.contains(part), "{part}: {csi_node}");
    }
    c.wait_field("node one", ".metadata.annotations.csi\\.volume\\.kubernetes\\.io/nodeid", |a| a.contains("of-one"));
    c.wait_field("node one", ".metadata.labels.topology\\.mock\\.csi\\.test/zone", |l| l == "here");
    assert_eq!(c.k("exec early -- cat /v/content"), "of-a");
    assert_eq!(c.k("exec early -- stat -c %g /v").trim(), "4711");
    assert!(driver.wait(&["NodeStageVolumeRequest", "handle-a"]).contains("opensesame"));
    let published = driver.wait(&["NodePublishVolumeRequest", "handle-a"]);
    for part in ["pod.name\": \"early\"", "serviceAccount.tokens", "vault", "ephemeral\": \"false\"", "globalmount"] {
        assert!(published.contains(part), "{part}: {published}");
    }
    // What it has used is asked of the driver, and told under the claim's name.
    let summary = serde_json::from_str(&c.k("get --raw /api/v1/nodes/one/proxy/stats/summary")).unwrap();
    let told = pod_volume(&summary, "early", "v");
    assert_eq!((&told["usedBytes"], &told["pvcRef"]["name"]), (&300.into(), &"a".into()), "{told}");
    assert!(driver.wait(&["NodeGetVolumeStatsRequest"]).contains("globalmount"));
    let metrics = c.k("get --raw /api/v1/nodes/one/proxy/metrics");
    let line = "kubelet_volume_stats_available_bytes{namespace=\"default\",persistentvolumeclaim=\"a\"} 700";
    assert!(metrics.lines().any(|l| l == line), "{metrics}");
    // A second pod shares what is staged.
    c.apply(&pod("second", "a"));
    c.wait_ready("second");
    assert_eq!(driver.asked(&["NodeStageVolumeRequest"]).len(), 1);
    // An inline volume lives and dies with its pod.
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: inline}}\nspec:\n  restartPolicy: Never\n  \
         containers: [{{name: c, image: 'busybox:1', command: [cat, /v/content], volumeMounts: [{{name: v, mountPath: /v}}]}}]\n  \
         volumes: [{{name: v, csi: {{driver: {DRIVER}, readOnly: true, volumeAttributes: {{content: inline}}}}}}]\n"
    ));
    c.wait_field("pod inline", ".status.phase", |p| p == "Succeeded");
    assert_eq!(c.k("logs inline"), "inline");
    let inline = driver.wait(&["NodePublishVolumeRequest", "ephemeral\": \"true\""]);
    assert!(inline.contains("readonly: true") && inline.contains("volume_id: \"csi-"), "{inline}");
    c.k("delete pod inline");
    driver.wait(&["NodeUnpublishVolumeRequest", "volume_id: \"csi-"]);
    // The agent restarts: nothing is asked again, the pod goes on.
    let before = driver.asked(&["NodePublishVolumeRequest"]).len();
    c.kill_agent();
    c.up();
    c.wait_ready("early");
    assert_eq!(c.k("exec early -- cat /v/content"), "of-a");
    assert_eq!(driver.asked(&["NodePublishVolumeRequest"]).len(), before);
    // It grows: an external resizer has grown the volume, the node does the rest.
    c.k("patch pv a --type merge -p '{\"spec\":{\"capacity\":{\"storage\":\"2Gi\"}}}'");
    let grown = driver.wait(&["NodeExpandVolumeRequest"]);
    assert!(grown.contains("required_bytes: 2147483648"), "{grown}");
    c.wait_field("pvc a", ".status.capacity.storage", |s| s == "2Gi");
    eventually("FileSystemResizeSuccessful", || {
        let events = c.k("get events --field-selector reason=FileSystemResizeSuccessful");
        if events.contains("MountVolume.NodeExpandVolume succeeded for volume \"a\" 2Gi") {
            Ok(())
        } else {
            Err(events)
        }
    });
    // The volume stays staged until its last pod is gone.
    c.k("delete pod early");
    driver.wait(&["NodeUnpublishVolumeRequest", "handle-a"]);
    assert_eq!(driver.asked(&["NodeUnstageVolumeRequest"]).len(), 0);
    // The agent dies, the pod is deleted meanwhile; the driver has restarted too.
    c.kill_agent();
    driver.stop(&c);
    c.host.must("rm -rf /var/lib/kubelet/plugins_registry/*");
    c.up();
    c.k("delete pod second --wait=false");
    let driver = Driver::start(&c, DRIVER, &["stage", "expand"]);
    driver.wait(&["NodeUnstageVolumeRequest", "handle-a"]);
    eventually("nothing of it left", || Some(left(&c)).filter(|l| !l.is_empty()).map_or(Ok(()), Err));
    c.k("wait --for=delete pod/second --timeout=60s");
    driver.stop(&c);
}

#[test]
fn a_volume_that_is_attached_waits_for_its_attachment() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let driver = Driver::start(&c, DRIVER, &[]);
    c.apply(&format!("{}{}", volume("a", ""), pod("waits", "a")));
    let attachment = eventually("a VolumeAttachment", || {
        let name = c.k("get volumeattachments -o jsonpath='{.items[*].metadata.name}'");
        if name.starts_with("csi-") { Ok(name) } else { Err(name) }
    });
    assert_eq!(c.get(&format!("volumeattachment {attachment}"))["spec"]["attacher"], DRIVER);
    assert_eq!(driver.asked(&["NodePublishVolumeRequest"]).len(), 0);
    // The driver's external attacher says so.
    let status = "{\"status\":{\"attached\":true,\"attachmentMetadata\":{\"device\":\"/dev/of-a\"}}}";
    c.k(&format!("patch volumeattachment {attachment} --subresource status --type merge -p '{status}'"));
    c.wait_ready("waits");
    assert!(driver.wait(&["NodePublishVolumeRequest"]).contains("/dev/of-a"));
    assert_eq!(driver.asked(&["NodeStageVolumeRequest"]).len(), 0);
    let unique = format!("kubernetes.io/csi/{DRIVER}^handle-a");
    c.wait_field("node one", ".status.volumesInUse", |v| v.contains(&unique));
    c.wait_field("node one", ".status.volumesAttached[*].name", |v| v.contains(&unique));
    c.k("delete pod waits");
    eventually("detached", || {
        let all = c.k("get volumeattachments -o name");
        if all.is_empty() { Ok(()) } else { Err(all) }
    });
    c.wait_field("node one", ".status.volumesAttached", |v| v.is_empty());
    assert_eq!(left(&c), "");
    // A volume that is a device.
    c.apply(&format!(
        "apiVersion: storage.k8s.io/v1\nkind: CSIDriver\nmetadata: {{name: {DRIVER}}}\nspec: {{attachRequired: false}}\n"
    ));
    let block = volume("disk", "").replace("  volumeName", "  volumeMode: Block\n  volumeName");
    c.apply(
        &block.replace("  storageClassName: ''\n  claimRef", "  volumeMode: Block\n  storageClassName: ''\n  claimRef"),
    );
    c.apply(
        &pod("raw", "disk")
            .replace("volumeMounts: [{name: v, mountPath: /v}]", "volumeDevices: [{name: v, devicePath: /dev/disk}]"),
    );
    c.wait_ready("raw");
    assert_eq!(c.k("exec raw -- stat -c '%F %t %T' /dev/disk").trim(), "block special file 7 0");
    c.apply(&pod("wrong", "disk"));
    let path = ".status.containerStatuses[0].state.waiting.message";
    c.wait_field("pod wrong", path, |m| m.contains("volumeMode Block, but is specified in volumeMounts"));
    // A disk that is not there.
    c.apply(&format!(
        "apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: nodisk}}\nspec:\n  capacity: {{storage: 1Gi}}\n  \
         accessModes: [ReadWriteOnce]\n  volumeMode: Block\n  storageClassName: ''\n  local: {{path: /dev/no-such-disk}}\n  \
         claimRef: {{namespace: default, name: nodisk}}\n  nodeAffinity: {{required: {{nodeSelectorTerms: [{{matchExpressions: \
         [{{key: kubernetes.io/hostname, operator: In, values: [one]}}]}}]}}}}\n\
         ---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: nodisk}}\nspec:\n  accessModes: [ReadWriteOnce]\n  \
         volumeMode: Block\n  storageClassName: ''\n  resources: {{requests: {{storage: 1Gi}}}}\n  volumeName: nodisk\n{}",
        pod("diskless", "nodisk")
            .replace("volumeMounts: [{name: v, mountPath: /v}]", "volumeDevices: [{name: v, devicePath: /dev/disk}]")
    ));
    eventually("FailedMapVolume", || {
        let events = c.k("get events --field-selector involvedObject.name=diskless,reason=FailedMapVolume");
        if events.contains("MapVolume.SetUpDevice failed for volume \"v\"") { Ok(()) } else { Err(events) }
    });
    c.k("delete pod raw wrong diskless");
    eventually("nothing of it left", || Some(left(&c)).filter(|l| !l.is_empty()).map_or(Ok(()), Err));
    // A driver that refuses is heard.
    c.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: refused}}\nspec:\n  \
         containers: [{{name: c, image: 'busybox:1', volumeMounts: [{{name: v, mountPath: /v}}]}}]\n  \
         volumes: [{{name: v, csi: {{driver: {DRIVER}, volumeAttributes: {{fail: 'no disks today'}}}}}}]\n"
    ));
    eventually("FailedMount", || {
        let events = c.k("get events --field-selector involvedObject.name=refused,reason=FailedMount");
        if events.contains("not supported by driver") { Ok(()) } else { Err(events) }
    });
    c.k(&format!("delete csidriver {DRIVER}"));
    c.apply(&format!(
        "apiVersion: storage.k8s.io/v1\nkind: CSIDriver\nmetadata: {{name: {DRIVER}}}\nspec: {{volumeLifecycleModes: [Ephemeral]}}\n"
    ));
    eventually("FailedMount", || {
        let events = c.k("get events --field-selector involvedObject.name=refused,reason=FailedMount");
        if events.contains("code = Internal desc = no disks today") { Ok(()) } else { Err(events) }
    });
    c.k("delete pod refused --grace-period=0 --force");
    driver.stop(&c);
}
