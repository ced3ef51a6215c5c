//! Manifests of many kinds, what is wrong with them, and how that is said; then updates and what they may not change.

use isopod_api::{gvk::Gvk, meta, resources, schema};
use serde_json::{Value, json};

use super::strategy_for;
use crate::{admission::testing::FakeObjects, authn::UserInfo, registry::strategy::Context};

/// A whole object of a kind, to which a row of a table brings its changes.
fn base(kind: &str) -> Value {
    let template = json!({"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let selector = json!({"matchLabels": {"app": "a"}});
    let job = json!({"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}});
    let (version, body) = match kind {
        "Pod" => ("v1", json!({"spec": template["spec"]})),
        "Service" => ("v1", json!({"spec": {"ports": [{"port": 80}]}})),
        "PersistentVolume" => (
            "v1",
            json!({"spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "nfs": {"server": "s", "path": "/"}}}),
        ),
        "PersistentVolumeClaim" => {
            ("v1", json!({"spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}))
        }
        "Deployment" | "DaemonSet" | "StatefulSet" => {
            ("apps/v1", json!({"spec": {"selector": selector, "template": template}}))
        }
        "CronJob" => ("batch/v1", json!({"spec": {"schedule": "* * * * *", "jobTemplate": {"spec": job}}})),
        "Ingress" => ("networking.k8s.io/v1", json!({"spec": {"rules": [{"host": "a.b"}]}})),
        "IngressClass" => ("networking.k8s.io/v1", json!({"spec": {"controller": "a.b/c"}})),
        "NetworkPolicy" => ("networking.k8s.io/v1", json!({"spec": {"podSelector": {}}})),
        "HorizontalPodAutoscaler" => (
            "autoscaling/v2",
            json!({"spec": {"maxReplicas": 3, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "a"}}}),
        ),
        "PodDisruptionBudget" => ("policy/v1", json!({"spec": {"selector": selector}})),
        "StorageClass" => ("storage.k8s.io/v1", json!({"provisioner": "a.b"})),
        "CSIDriver" => ("storage.k8s.io/v1", json!({"spec": {}})),
        "CSINode" => ("storage.k8s.io/v1", json!({"spec": {"drivers": [{"name": "d", "nodeID": "n"}]}})),
        "VolumeAttributesClass" => ("storage.k8s.io/v1", json!({"driverName": "a.b", "parameters": {"a": "b"}})),
        "VolumeAttachment" => (
            "storage.k8s.io/v1",
            json!({"spec": {"attacher": "a", "nodeName": "n", "source": {"persistentVolumeName": "p"}}}),
        ),
        "RuntimeClass" => ("node.k8s.io/v1", json!({"handler": "h"})),
        "ClusterRole" => ("rbac.authorization.k8s.io/v1", json!({"rules": []})),
        "RoleBinding" => {
            ("rbac.authorization.k8s.io/v1", json!({"roleRef": {"kind": "Role", "name": "r"}, "subjects": []}))
        }
        "DeviceClass" => ("resource.k8s.io/v1", json!({"spec": {}})),
        "ResourceClaim" => (
            "resource.k8s.io/v1",
            json!({"spec": {"devices": {"requests": [{"name": "r", "exactly": {"deviceClassName": "c"}}]}}}),
        ),
        "ResourceSlice" => (
            "resource.k8s.io/v1",
            json!({"spec": {"driver": "d", "allNodes": true, "pool": {"name": "p", "resourceSliceCount": 1, "generation": 0}}}),
        ),
        other => panic!("no base of {other}"),
    };
    let mut out = body;
    out["apiVersion"] = json!(version);
    out["kind"] = json!(kind);
    out["metadata"] = json!({"name": "a", "namespace": "n"});
    out
}

/// The base with a JSON merge patch.
fn changed(kind: &str, patch: &Value) -> Value {
    fn merge(to: &mut Value, patch: &Value) {
        let Value::Object(changes) = patch else { return *to = patch.clone() };
        if !to.is_object() {
            *to = json!({});
        }
        for (key, value) in changes {
            match value {
                Value::Null => drop(to.as_object_mut().unwrap().remove(key)),
                _ => merge(&mut to[key.as_str()], value),
            }
        }
    }
    let mut out = base(kind);
    merge(&mut out, patch);
    out
}

/// What the server would answer to a create, or to an update of `old`.
pub(super) fn errors(mut new: Value, old: Option<Value>) -> Vec<String> {
    let gvk = Gvk::of(&new);
    let gvr = resources::by_gvk(&gvk).unwrap().gvr();
    let strategy = strategy_for(&gvr);
    let whole = |v: &mut Value| {
        schema::default(schema::lookup(&gvk).unwrap(), v);
        strategy.default(v);
    };
    whole(&mut new);
    let (objects, user) = (FakeObjects::default(), UserInfo::default());
    let (namespace, name) = (meta::namespace(&new).to_owned(), meta::name(&new).to_owned());
    let cx = Context {
        gvr: &gvr,
        subresource: "",
        namespace: &namespace,
        name: &name,
        user: &user,
        objects: &objects,
        dry_run: false,
    };
    let found = match old {
        None => strategy.validate(&cx, &new),
        Some(mut old) => {
            whole(&mut old);
            strategy.validate_update(&cx, &new, &old)
        }
    };
    found.iter().map(|e| e.to_string().lines().next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn new_objects() {
    let label = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
    let backend = json!({"service": {"name": "s", "port": {"number": 80}}});
    for (kind, patch, want) in [
        ("Pod", json!({}), ""),
        (
            "Pod",
            json!({"spec": {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
                {"matchLabelKeys": ["a"], "mismatchLabelKeys": ["a"], "labelSelector": {}}]}}}}),
            "spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].matchLabelKeys[0]: Invalid value: \"a\": exists in both matchLabelKeys and mismatchLabelKeys; \
             spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey: Required value: can not be empty; \
             spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey: Invalid value: \"\": name part must be non-empty; \
             spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey: Invalid value: \"\": name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')",
        ),
        (
            "Pod",
            json!({"spec": {"securityContext": {"seccompProfile": {"type": "RuntimeDefault", "localhostProfile": "p"}}}}),
            "spec.securityContext.seccompProfile.localhostProfile: Invalid value: {\"Type\":\"RuntimeDefault\",\"LocalhostProfile\":\"p\"}: can only be set when seccomp type is Localhost",
        ),
        (
            "Pod",
            json!({"spec": {"containers": [{"name": "c", "image": " i", "resources": {"claims": [{"name": "x"}]},
                "resizePolicy": [{"resourceName": "x", "restartPolicy": "NotRequired"}]}]}}),
            "spec.containers[0].resources.claims[0]: Not found: \"x\": must be one of the names in pod.spec.resourceClaims which is empty; \
             spec.containers[0].resizePolicy: Unsupported value: \"x\": supported values: \"cpu\", \"memory\"; \
             spec.containers[0].image: Invalid value: \" i\": must not have leading or trailing whitespace",
        ),
        ("Service", json!({}), ""),
        (
            "Service",
            json!({"spec": {"externalName": "A_", "type": "ExternalName", "clusterIPs": ["10.0.0.1"]}}),
            "spec.clusterIPs: Forbidden: may not be set for ExternalName services; \
             spec.externalName: Invalid value: \"A_\": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
        ),
        (
            "Service",
            json!({"spec": {"sessionAffinity": "X", "ports": [{"port": 70000, "targetPort": 1, "name": "a"}, {"port": 1, "name": "a", "nodePort": 7}]}}),
            "spec.ports[0].port: Invalid value: 70000: must be between 1 and 65535, inclusive; \
             spec.ports[1].name: Duplicate value: \"a\"; \
             spec.sessionAffinity: Unsupported value: \"X\": supported values: \"ClientIP\", \"None\"; \
             spec.ports[1].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
        ("Ingress", json!({}), ""),
        (
            "Ingress",
            json!({"spec": {"rules": null}}),
            "spec: Invalid value: null: either `defaultBackend` or `rules` must be specified",
        ),
        (
            "Ingress",
            json!({"spec": {"rules": [{"host": "1.2.3.4", "http": {"paths": [
                {"path": "x", "pathType": "Exact", "backend": {"service": {"name": "A_"}}},
                {"path": "/", "backend": backend}, {"path": "/", "pathType": "X", "backend": {"resource": {"kind": "K"}}}]}}]}}),
            &format!(
                "spec.rules[0].host: Invalid value: \"1.2.3.4\": must be a DNS name, not an IP address; \
                 spec.rules[0].http.paths[0].path: Invalid value: \"x\": must be an absolute path; \
                 spec.rules[0].http.paths[0].backend.service.name: Invalid value: \"A_\": {label}; \
                 spec.rules[0].http.paths[0].backend: Required value: port name or number is required; \
                 spec.rules[0].http.paths[1].pathType: Required value: pathType must be specified; \
                 spec.rules[0].http.paths[2].pathType: Unsupported value: \"X\": supported values: \"Exact\", \"ImplementationSpecific\", \"Prefix\"; \
                 spec.rules[0].http.paths[2].backend.resource.name: Required value: name is required"
            ),
        ),
        (
            "IngressClass",
            json!({"spec": {"controller": "x", "parameters": {"kind": "K", "name": "n", "scope": "Namespace"}}}),
            "spec.controller: Invalid value: \"x\": must be a domain-prefixed path (such as \"acme.io/foo\"); \
             spec.parameters.namespace: Required value: `parameters.scope` is set to 'Namespace'",
        ),
        (
            "NetworkPolicy",
            json!({"spec": {"policyTypes": ["X"], "ingress": [{"from": [{}, {"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}],
                "ports": [{"port": 80, "endPort": 7}, {"endPort": 7}, {"protocol": "X"}]}]}}),
            "spec.ingress[0].ports[0].endPort: Invalid value: 80: must be greater than or equal to `port`; \
             spec.ingress[0].ports[1].endPort: Invalid value: 7: may not be specified when `port` is not specified; \
             spec.ingress[0].ports[2].protocol: Unsupported value: \"X\": supported values: \"TCP\", \"UDP\", \"SCTP\"; \
             spec.ingress[0].from[0]: Required value: must specify a peer; \
             spec.ingress[0].from[1].ipBlock.except[0]: Invalid value: \"11.0.0.0/16\": must be a strict subset of `cidr`; \
             spec.ingress[0].from[1]: Forbidden: may not specify both ipBlock and another peer; \
             spec.policyTypes[0]: Unsupported value: \"X\": supported values: \"Ingress\", \"Egress\"",
        ),
        (
            "PersistentVolume",
            json!({"spec": {"nfs": null, "local": {"path": "/a/.."}, "volumeAttributesClassName": ""}}),
            "spec.local.path: Invalid value: \"/a/..\": must not contain '..'; \
             spec.nodeAffinity: Required value: Local volume requires node affinity; \
             spec.volumeAttributesClassName: Required value: an empty string is disallowed; \
             spec.csi: Required value: has to be specified when using volumeAttributesClassName",
        ),
        (
            "PersistentVolumeClaim",
            json!({"spec": {"dataSource": {"kind": "X", "name": "n"}, "dataSourceRef": {"kind": "PersistentVolumeClaim", "name": "n"}}}),
            "spec.dataSource: Invalid value: \"X\": must be 'PersistentVolumeClaim' when referencing the default apiGroup; \
             spec: Invalid value: {}: must match dataSourceRef",
        ),
        (
            "StatefulSet",
            json!({"spec": {"podManagementPolicy": "X", "updateStrategy": {"type": "OnDelete", "rollingUpdate": {"partition": 1}}}}),
            "spec.podManagementPolicy: Invalid value: \"X\": must be 'OrderedReady' or 'Parallel'; \
             spec.updateStrategy.rollingUpdate: Invalid value: {\"Partition\":1,\"MaxUnavailable\":null}: only allowed for updateStrategy 'RollingUpdate'",
        ),
        (
            "DaemonSet",
            json!({"spec": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": 1, "maxSurge": 1}}}}),
            "spec.updateStrategy.rollingUpdate.maxSurge: Invalid value: 1: may not be set when maxUnavailable is non-zero",
        ),
        (
            "CronJob",
            json!({"spec": {"timeZone": "Local", "jobTemplate": {"spec": {"template": {"spec": {"restartPolicy": "Always"}}}}}}),
            "spec.timeZone: Invalid value: \"Local\": timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones; \
             spec.jobTemplate.spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\"",
        ),
        (
            "HorizontalPodAutoscaler",
            json!({"spec": {"minReplicas": 5, "metrics": [{"type": "Pods", "pods": {"metric": {"name": "m"}, "target": {"type": "Value", "value": "1"}}}]}}),
            "spec.maxReplicas: Invalid value: 3: must be greater than or equal to `minReplicas`; \
             spec.metrics[0].pods.target.averageValue: Required value: must specify a positive target averageValue",
        ),
        (
            "PodDisruptionBudget",
            json!({"spec": {"minAvailable": "101%", "unhealthyPodEvictionPolicy": "X"}}),
            "spec.minAvailable: Invalid value: \"101%\": must not be greater than 100%; \
             spec.unhealthyPodEvictionPolicy: Unsupported value: \"X\": supported values: \"AlwaysAllow\", \"IfHealthyBudget\"",
        ),
        (
            "CSIDriver",
            json!({"metadata": {"name": "A_"}, "spec": {"volumeLifecycleModes": ["X"], "tokenRequests": [{"audience": "a"}, {"audience": "a"}]}}),
            "spec.tokenRequests[1].audience: Duplicate value: \"a\"; \
             spec.volumeLifecycleModes: Unsupported value: \"X\": supported values: \"Persistent\", \"Ephemeral\"",
        ),
        (
            "CSINode",
            json!({"spec": {"drivers": [{"name": "d", "nodeID": "n", "topologyKeys": ["a", "a"]}]}}),
            "spec.drivers[0]: Duplicate value: \"a\"",
        ),
        (
            "VolumeAttributesClass",
            json!({"parameters": null}),
            "parameters: Required value: must contain at least one key/value pair",
        ),
        (
            "VolumeAttachment",
            json!({"spec": {"source": {"persistentVolumeName": ""}}}),
            "spec.source.persistentVolumeName: Required value: must specify non empty persistentVolumeName; \
             spec.source.persistentVolumeName: Invalid value: \"\": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
        ),
        (
            "RuntimeClass",
            json!({"overhead": {"podFixed": {"memory": "-1"}}, "scheduling": {"tolerations": [{"operator": "X", "key": "a"}]}}),
            "overhead.limits[memory]: Invalid value: \"-1\": must be greater than or equal to 0; \
             scheduling.tolerations[0].operator: Unsupported value: \"X\": supported values: \"Equal\", \"Exists\"",
        ),
        (
            "RuntimeClass",
            json!({"scheduling": {"tolerations": [{"key": "a", "operator": "Exists"}, {"key": "a", "operator": "Exists"}]}}),
            "scheduling.tolerations[1]: Duplicate value: {\"Key\":\"a\",\"Operator\":\"Exists\",\"Value\":\"\",\"Effect\":\"\",\"TolerationSeconds\":null}",
        ),
        (
            "ClusterRole",
            json!({"aggregationRule": {}, "rules": [{"verbs": ["get"], "nonResourceURLs": ["/x"], "resources": ["y"]}]}),
            "rules[0].nonResourceURLs: Invalid value: [\"/x\"]: rules cannot apply to both regular resources and non-resource URLs; \
             aggregationRule.clusterRoleSelectors: Required value: at least one clusterRoleSelector required if aggregationRule is non-nil",
        ),
        (
            "DeviceClass",
            json!({"spec": {"selectors": [{}, {"cel": {"expression": "device.driver"}}, {"cel": {"expression": "device.driver == 'd' && device.attributes['d'].x"}}],
                "config": [{}], "extendedResourceName": "cpu"}}),
            "spec.selectors[0].cel: Required value; \
             spec.selectors[1].cel.expression: Invalid value: \"device.driver\": must evaluate to bool or the unknown type, not string; \
             spec.config[0].opaque: Required value; \
             spec.extendedResourceName: Invalid value: \"cpu\": must be a valid extended resource name",
        ),
        (
            "ResourceClaim",
            json!({"spec": {"devices": {"requests": [{"name": "r"}, {"name": "r", "exactly": {"tolerations": [{"operator": "X"}]}}],
                "constraints": [{"requests": ["r", "x"], "matchAttribute": "a"}], "config": [{"opaque": {"driver": "d", "parameters": []}}]}}}),
            "spec.devices.requests[0]: Required value: exactly one of `exactly` or `firstAvailable` is required; \
             spec.devices.requests[1].exactly.deviceClassName: Required value; \
             spec.devices.requests[1].exactly.tolerations[0].operator: Unsupported value: \"X\": supported values: \"Equal\", \"Exists\"; \
             spec.devices.requests[1]: Duplicate value: \"r\"; \
             spec.devices.constraints[0].requests[1]: Invalid value: \"x\": must be the name of a request in the claim or the name of a request and a subrequest separated by '/'; \
             spec.devices.constraints[0].matchAttribute: Invalid value: \"a\": a fully qualified name must be a domain and a name separated by a slash; \
             spec.devices.config[0].opaque.parameters: Invalid value: \"<value omitted>\": must be a valid JSON object",
        ),
        (
            "ResourceSlice",
            json!({"spec": {"nodeName": "n", "pool": {"name": "", "resourceSliceCount": 0}, "devices": [
                {"name": "d", "allNodes": true, "attributes": {"v": {"version": "1.0"}, "a": {"int": 1, "bool": true}}, "bindingConditions": ["a"]}]}}),
            "spec.pool.name: Required value; \
             spec.pool.resourceSliceCount: Invalid value: 0: must be greater than zero; \
             spec: Invalid value: \"{`nodeName`, `allNodes`}\": exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required, but multiple fields are set; \
             spec.devices[0].attributes[a]: Invalid value: {\"IntValue\":1,\"BoolValue\":true,\"StringValue\":null,\"VersionValue\":null,\"IntValues\":null,\"BoolValues\":null,\"StringValues\":null,\"VersionValues\":null}: exactly one value must be specified; \
             spec.devices[0].attributes[v].version: Invalid value: \"1.0\": must be a string compatible with semver.org spec 2.0.0; \
             spec.devices[0]: Invalid value: null: `nodeName`, `nodeSelector` and `allNodes` can only be set if `perDeviceNodeSelection` is set to true in the ResourceSlice spec; \
             spec.devices[0].bindingFailureConditions: Invalid value: null: bindingFailureConditions are required to use bindingConditions",
        ),
    ] {
        assert_eq!(errors(changed(kind, &patch), None).join("; "), want, "{kind} {patch}");
    }
}

#[test]
fn changed_objects() {
    let local = json!({"nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "Exists"}]}]});
    for (kind, before, after, want) in [
        ("Deployment", json!({}), json!({"spec": {"replicas": 5}}), ""),
        (
            "Deployment",
            json!({}),
            json!({"spec": {"selector": {"matchLabels": {"app": "a", "b": "c"}}, "template": {"metadata": {"labels": {"b": "c"}}}}}),
            "spec.selector: Invalid value: {\"matchLabels\":{\"app\":\"a\",\"b\":\"c\"}}: field is immutable",
        ),
        (
            "StatefulSet",
            json!({}),
            json!({"spec": {"serviceName": "x"}}),
            "spec: Forbidden: updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
        ),
        (
            "PersistentVolume",
            json!({}),
            json!({"spec": {"volumeMode": "Block", "nfs": {"path": "/b"}}}),
            "spec.persistentvolumesource: Forbidden: spec.persistentvolumesource is immutable after creation; \
             volumeMode: Invalid value: \"Block\": field is immutable",
        ),
        ("PersistentVolume", json!({}), json!({"spec": {"nodeAffinity": {"required": local}}}), ""),
        (
            "PersistentVolume",
            json!({"spec": {"nodeAffinity": {"required": local}}}),
            json!({}),
            "nodeAffinity: Invalid value: null: field is immutable, except for updating from beta label to GA",
        ),
        (
            "PersistentVolumeClaim",
            json!({"spec": {"volumeName": "v"}, "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}}}),
            json!({"spec": {"volumeName": "v", "resources": {"requests": {"storage": "500Mi"}}}, "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}}}),
            "spec.resources.requests.storage: Forbidden: field can not be less than status.capacity",
        ),
        (
            "PersistentVolumeClaim",
            json!({"spec": {"volumeName": "v", "resources": {"requests": {"storage": "5Gi"}}}, "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}}}),
            json!({"spec": {"volumeName": "v", "resources": {"requests": {"storage": "2Gi"}}}, "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}}}),
            "",
        ),
        (
            "StorageClass",
            json!({"parameters": {"a": "b"}}),
            json!({"reclaimPolicy": "Retain", "volumeBindingMode": "WaitForFirstConsumer"}),
            "parameters: Forbidden: updates to parameters are forbidden.; \
             reclaimPolicy: Forbidden: updates to reclaimPolicy are forbidden.; \
             volumeBindingMode: Invalid value: \"WaitForFirstConsumer\": field is immutable",
        ),
        (
            "CSIDriver",
            json!({}),
            json!({"spec": {"attachRequired": false}}),
            "spec.attachedRequired: Invalid value: false: field is immutable",
        ),
        (
            "CSINode",
            json!({}),
            json!({"spec": {"drivers": [{"name": "d", "nodeID": "m", "allocatable": {"count": 3}}]}}),
            "spec.drivers: Invalid value: {\"Name\":\"d\",\"NodeID\":\"m\",\"TopologyKeys\":null,\"Allocatable\":null}: field is immutable",
        ),
        (
            "VolumeAttributesClass",
            json!({}),
            json!({"driverName": "A_"}),
            "driverName: Forbidden: updates to driverName are forbidden.; \
             driverName: Invalid value: \"a_\": name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')",
        ),
        (
            "VolumeAttachment",
            json!({}),
            json!({"spec": {"nodeName": "m"}}),
            "spec: Invalid value: {\"Attacher\":\"a\",\"Source\":{\"PersistentVolumeName\":\"p\",\"InlineVolumeSpec\":null},\"NodeName\":\"m\"}: field is immutable",
        ),
        ("RuntimeClass", json!({}), json!({"handler": "x"}), "handler: Invalid value: \"x\": field is immutable"),
        (
            "RoleBinding",
            json!({}),
            json!({"roleRef": {"name": "x"}}),
            "roleRef: Invalid value: {\"APIGroup\":\"rbac.authorization.k8s.io\",\"Kind\":\"Role\",\"Name\":\"x\"}: cannot change roleRef",
        ),
        (
            "ResourceClaim",
            json!({}),
            json!({"spec": {"devices": {"config": [{"opaque": {"driver": "d", "parameters": {}}}]}}}),
            "spec: Invalid value: {\"Devices\":{\"Requests\":[{\"Name\":\"r\",\"Exactly\":{\"DeviceClassName\":\"c\",\"Selectors\":null,\"AllocationMode\":\"ExactCount\",\"Count\":1,\"AdminAccess\":null,\"Tolerations\":null,\"Capacity\":null},\"FirstAvailable\":null}],\"Constraints\":null,\"Config\":[{\"Requests\":null,\"Opaque\":{\"Driver\":\"d\",\"Parameters\":{}}}]}}: field is immutable",
        ),
        (
            "NetworkPolicy",
            json!({}),
            json!({"spec": {"policyTypes": ["X"]}}),
            "spec.policyTypes[0]: Unsupported value: \"X\": supported values: \"Ingress\", \"Egress\"; \
             spec.policyTypes[0]: Unsupported value: \"X\": supported values: \"Ingress\", \"Egress\"",
        ),
        (
            "IngressClass",
            json!({}),
            json!({"spec": {"controller": "a.b/d"}}),
            "spec.controller: Invalid value: \"a.b/d\": field is immutable",
        ),
    ] {
        let found = errors(changed(kind, &after), Some(changed(kind, &before)));
        assert_eq!(found.join("; "), want, "{kind} {before} {after}");
    }
}

#[test]
fn admin_access_is_granted_by_namespaces() {
    use isopod_api::field::Path;

    let gvr = resources::by_gvk(&Gvk::of(&base("ResourceClaim"))).unwrap().gvr();
    let mut claim = base("ResourceClaim");
    claim["spec"]["devices"]["requests"][0]["exactly"]["adminAccess"] = json!(true);
    let status = json!({"allocation": {"devices": {"results": [{}, {"adminAccess": true}]}}});
    let asked = super::dra_claims::has_admin_access(&crate::validation::At::new(Path::new("status"), &status)).unwrap();
    assert_eq!(asked.path.to_string(), "status.allocation.devices.results[1].adminAccess");
    let (objects, user) = (FakeObjects::default(), UserInfo::default());
    let missing = "Internal error: could not retrieve namespace to verify admin access: namespaces \"n\" not found";
    let refused = "Forbidden: admin access to devices requires the `resource.kubernetes.io/admin-access: true` label on the containing namespace";
    for (labels, want) in [
        (None, Some(missing)),
        (Some(json!({})), Some(refused)),
        (Some(json!({"resource.kubernetes.io/admin-access": "true"})), None),
    ] {
        if let Some(labels) = labels {
            objects.put_as("namespaces", json!({"metadata": {"name": "n", "labels": labels}}));
        }
        let (subresource, name, dry_run) = ("", "a", false);
        let cx = Context { gvr: &gvr, subresource, namespace: "n", name, user: &user, objects: &objects, dry_run };
        let found = strategy_for(&gvr).validate(&cx, &claim);
        let shown = found.iter().find(|e| e.field == "spec.devices.requests[0].adminAccess").map(|e| e.body());
        assert_eq!(shown.as_deref(), want);
    }
}
