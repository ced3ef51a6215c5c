//! Pod specs in the form upstream's internal types print: Go field names, every field present, in declaration order.
//!
//! Messages of immutable pod specs show this form, as JSON or as a unified diff of its indented lines:
//! ```text
//! @@ -40,7 +40,7 @@
//!  "NodeSelector": null,
//! - "ServiceAccountName": "default",
//! + "ServiceAccountName": "",
//! ```

use std::{collections::HashMap, sync::LazyLock};

use serde_json::{Map, Value, json};

/// `struct: GoName=jsonName:kind ...`. Kinds: `s` string, `i` number, `b` boolean, `*` as it is or null, `S(x)` struct,
/// `P(x)` pointer to struct, `L(x)` list of struct, `+(x)` embedded struct.
const STRUCTS: &str = "
PodSpec: Volumes=volumes:L(Volume) InitContainers=initContainers:L(Container) Containers=containers:L(Container) EphemeralContainers=ephemeralContainers:L(Ephemeral) RestartPolicy=restartPolicy:s TerminationGracePeriodSeconds=terminationGracePeriodSeconds:* ActiveDeadlineSeconds=activeDeadlineSeconds:* DNSPolicy=dnsPolicy:s NodeSelector=nodeSelector:* ServiceAccountName=serviceAccountName:s AutomountServiceAccountToken=automountServiceAccountToken:* NodeName=nodeName:s SecurityContext=securityContext:P(PodSecurity) ImagePullSecrets=imagePullSecrets:L(Local) Hostname=hostname:s Subdomain=subdomain:s SetHostnameAsFQDN=setHostnameAsFQDN:* Affinity=affinity:P(Affinity) SchedulerName=schedulerName:s Tolerations=tolerations:L(Toleration) HostAliases=hostAliases:L(HostAlias) PriorityClassName=priorityClassName:s Priority=priority:* PreemptionPolicy=preemptionPolicy:* DNSConfig=dnsConfig:P(DNSConfig) ReadinessGates=readinessGates:L(ReadinessGate) RuntimeClassName=runtimeClassName:* Overhead=overhead:* EnableServiceLinks=enableServiceLinks:* TopologySpreadConstraints=topologySpreadConstraints:L(Spread) OS=os:P(OS) SchedulingGates=schedulingGates:L(Gate) ResourceClaims=resourceClaims:L(Claim) Resources=resources:P(Resources) HostnameOverride=hostnameOverride:* SchedulingGroup=schedulingGroup:*
PodSecurity: HostNetwork=hostNetwork:b HostPID=hostPID:b HostIPC=hostIPC:b ShareProcessNamespace=shareProcessNamespace:* HostUsers=hostUsers:* SELinuxOptions=seLinuxOptions:P(SELinux) WindowsOptions=windowsOptions:P(Windows) RunAsUser=runAsUser:* RunAsGroup=runAsGroup:* RunAsNonRoot=runAsNonRoot:* SupplementalGroups=supplementalGroups:* SupplementalGroupsPolicy=supplementalGroupsPolicy:* FSGroup=fsGroup:* FSGroupChangePolicy=fsGroupChangePolicy:* Sysctls=sysctls:L(Sysctl) SeccompProfile=seccompProfile:P(Profile) AppArmorProfile=appArmorProfile:P(Profile) SELinuxChangePolicy=seLinuxChangePolicy:*
Container: Name=name:s Image=image:s Command=command:* Args=args:* WorkingDir=workingDir:s Ports=ports:L(Port) EnvFrom=envFrom:L(EnvFrom) Env=env:L(Env) Resources=resources:S(Resources) ResizePolicy=resizePolicy:L(Resize) RestartPolicy=restartPolicy:* RestartPolicyRules=restartPolicyRules:* VolumeMounts=volumeMounts:L(Mount) VolumeDevices=volumeDevices:L(Device) LivenessProbe=livenessProbe:P(Probe) ReadinessProbe=readinessProbe:P(Probe) StartupProbe=startupProbe:P(Probe) Lifecycle=lifecycle:P(Lifecycle) TerminationMessagePath=terminationMessagePath:s TerminationMessagePolicy=terminationMessagePolicy:s ImagePullPolicy=imagePullPolicy:s SecurityContext=securityContext:P(Security) Stdin=stdin:b StdinOnce=stdinOnce:b TTY=tty:b
Ephemeral: +(Container) TargetContainerName=targetContainerName:s
Resources: Limits=limits:* Requests=requests:* Claims=claims:L(ResourceClaim)
ResourceClaim: Name=name:s Request=request:s
Port: Name=name:s HostPort=hostPort:i ContainerPort=containerPort:i Protocol=protocol:s HostIP=hostIP:s
Env: Name=name:s Value=value:s ValueFrom=valueFrom:P(EnvSource)
EnvSource: FieldRef=fieldRef:P(FieldRef) ResourceFieldRef=resourceFieldRef:P(ResourceRef) ConfigMapKeyRef=configMapKeyRef:P(KeyRef) SecretKeyRef=secretKeyRef:P(KeyRef) FileKeyRef=fileKeyRef:P(FileRef)
FieldRef: APIVersion=apiVersion:s FieldPath=fieldPath:s
ResourceRef: ContainerName=containerName:s Resource=resource:s Divisor=divisor:s
KeyRef: Name=name:s Key=key:s Optional=optional:*
FileRef: VolumeName=volumeName:s Path=path:s Key=key:s Optional=optional:*
EnvFrom: Prefix=prefix:s ConfigMapRef=configMapRef:P(OptionalRef) SecretRef=secretRef:P(OptionalRef)
OptionalRef: Name=name:s Optional=optional:*
Resize: ResourceName=resourceName:s RestartPolicy=restartPolicy:s
Mount: Name=name:s ReadOnly=readOnly:b RecursiveReadOnly=recursiveReadOnly:* MountPath=mountPath:s SubPath=subPath:s MountPropagation=mountPropagation:* SubPathExpr=subPathExpr:s
Device: Name=name:s DevicePath=devicePath:s
Probe: +(Handler) InitialDelaySeconds=initialDelaySeconds:i TimeoutSeconds=timeoutSeconds:i PeriodSeconds=periodSeconds:i SuccessThreshold=successThreshold:i FailureThreshold=failureThreshold:i TerminationGracePeriodSeconds=terminationGracePeriodSeconds:*
Handler: Exec=exec:P(Exec) HTTPGet=httpGet:P(HTTPGet) TCPSocket=tcpSocket:P(TCPSocket) GRPC=grpc:P(GRPC)
Exec: Command=command:*
HTTPGet: Path=path:s Port=port:* Host=host:s Scheme=scheme:s HTTPHeaders=httpHeaders:L(NameValue)
TCPSocket: Port=port:* Host=host:s
GRPC: Port=port:i Service=service:*
NameValue: Name=name:s Value=value:s
Lifecycle: PostStart=postStart:P(Hook) PreStop=preStop:P(Hook) StopSignal=stopSignal:*
Hook: Exec=exec:P(Exec) HTTPGet=httpGet:P(HTTPGet) TCPSocket=tcpSocket:P(TCPSocket) Sleep=sleep:P(Sleep)
Sleep: Seconds=seconds:i
Security: Capabilities=capabilities:P(Capabilities) Privileged=privileged:* SELinuxOptions=seLinuxOptions:P(SELinux) WindowsOptions=windowsOptions:P(Windows) RunAsUser=runAsUser:* RunAsGroup=runAsGroup:* RunAsNonRoot=runAsNonRoot:* ReadOnlyRootFilesystem=readOnlyRootFilesystem:* AllowPrivilegeEscalation=allowPrivilegeEscalation:* ProcMount=procMount:* SeccompProfile=seccompProfile:P(Profile) AppArmorProfile=appArmorProfile:P(Profile)
Capabilities: Add=add:* Drop=drop:*
SELinux: User=user:s Role=role:s Type=type:s Level=level:s
Windows: GMSACredentialSpecName=gmsaCredentialSpecName:* GMSACredentialSpec=gmsaCredentialSpec:* RunAsUserName=runAsUserName:* HostProcess=hostProcess:*
Profile: Type=type:s LocalhostProfile=localhostProfile:*
Sysctl: Name=name:s Value=value:s
Local: Name=name:s
Toleration: Key=key:s Operator=operator:s Value=value:s Effect=effect:s TolerationSeconds=tolerationSeconds:*
HostAlias: IP=ip:s Hostnames=hostnames:*
DNSConfig: Nameservers=nameservers:* Searches=searches:* Options=options:L(DNSOption)
DNSOption: Name=name:s Value=value:*
ReadinessGate: ConditionType=conditionType:s
OS: Name=name:s
Gate: Name=name:s
Claim: Name=name:s ResourceClaimName=resourceClaimName:* ResourceClaimTemplateName=resourceClaimTemplateName:*
Spread: MaxSkew=maxSkew:i TopologyKey=topologyKey:s WhenUnsatisfiable=whenUnsatisfiable:s LabelSelector=labelSelector:* MinDomains=minDomains:* NodeAffinityPolicy=nodeAffinityPolicy:* NodeTaintsPolicy=nodeTaintsPolicy:* MatchLabelKeys=matchLabelKeys:*
Affinity: NodeAffinity=nodeAffinity:P(NodeAffinity) PodAffinity=podAffinity:P(PodAffinity) PodAntiAffinity=podAntiAffinity:P(PodAffinity)
NodeAffinity: RequiredDuringSchedulingIgnoredDuringExecution=requiredDuringSchedulingIgnoredDuringExecution:P(NodeSelector) PreferredDuringSchedulingIgnoredDuringExecution=preferredDuringSchedulingIgnoredDuringExecution:L(PreferredNode)
NodeSelector: NodeSelectorTerms=nodeSelectorTerms:L(NodeTerm)
NodeTerm: MatchExpressions=matchExpressions:L(NodeRequirement) MatchFields=matchFields:L(NodeRequirement)
NodeRequirement: Key=key:s Operator=operator:s Values=values:*
PreferredNode: Weight=weight:i Preference=preference:S(NodeTerm)
PodAffinity: RequiredDuringSchedulingIgnoredDuringExecution=requiredDuringSchedulingIgnoredDuringExecution:L(PodTerm) PreferredDuringSchedulingIgnoredDuringExecution=preferredDuringSchedulingIgnoredDuringExecution:L(PreferredPod)
PodTerm: LabelSelector=labelSelector:* Namespaces=namespaces:* TopologyKey=topologyKey:s NamespaceSelector=namespaceSelector:* MatchLabelKeys=matchLabelKeys:* MismatchLabelKeys=mismatchLabelKeys:*
PreferredPod: Weight=weight:i PodAffinityTerm=podAffinityTerm:S(PodTerm)
Volume: Name=name:s HostPath=hostPath:P(HostPath) EmptyDir=emptyDir:P(EmptyDir) GCEPersistentDisk=gcePersistentDisk:* AWSElasticBlockStore=awsElasticBlockStore:* GitRepo=gitRepo:* Secret=secret:P(SecretVolume) NFS=nfs:P(NFS) ISCSI=iscsi:* Glusterfs=glusterfs:* PersistentVolumeClaim=persistentVolumeClaim:P(PVCVolume) RBD=rbd:* Quobyte=quobyte:* FlexVolume=flexVolume:* Cinder=cinder:* CephFS=cephfs:* Flocker=flocker:* DownwardAPI=downwardAPI:P(DownwardVolume) FC=fc:* AzureFile=azureFile:* ConfigMap=configMap:P(ConfigVolume) VsphereVolume=vsphereVolume:* AzureDisk=azureDisk:* PhotonPersistentDisk=photonPersistentDisk:* Projected=projected:P(Projected) PortworxVolume=portworxVolume:* ScaleIO=scaleIO:* StorageOS=storageos:* CSI=csi:* Ephemeral=ephemeral:* Image=image:*
HostPath: Path=path:s Type=type:*
EmptyDir: Medium=medium:s SizeLimit=sizeLimit:*
SecretVolume: SecretName=secretName:s Items=items:L(KeyPath) DefaultMode=defaultMode:* Optional=optional:*
ConfigVolume: Name=name:s Items=items:L(KeyPath) DefaultMode=defaultMode:* Optional=optional:*
KeyPath: Key=key:s Path=path:s Mode=mode:*
PVCVolume: ClaimName=claimName:s ReadOnly=readOnly:b
DownwardVolume: Items=items:L(DownwardFile) DefaultMode=defaultMode:*
DownwardFile: Path=path:s FieldRef=fieldRef:P(FieldRef) ResourceFieldRef=resourceFieldRef:P(ResourceRef) Mode=mode:*
Projected: Sources=sources:L(Projection) DefaultMode=defaultMode:*
Projection: Secret=secret:P(SecretProjection) DownwardAPI=downwardAPI:P(DownwardProjection) ConfigMap=configMap:P(SecretProjection) ServiceAccountToken=serviceAccountToken:P(TokenProjection) ClusterTrustBundle=clusterTrustBundle:* PodCertificate=podCertificate:*
SecretProjection: Name=name:s Items=items:L(KeyPath) Optional=optional:*
DownwardProjection: Items=items:L(DownwardFile)
VolumeAffinity: Required=required:P(NodeSelector)
VolumeSource: GCEPersistentDisk=gcePersistentDisk:* AWSElasticBlockStore=awsElasticBlockStore:* HostPath=hostPath:P(HostPath) Glusterfs=glusterfs:* NFS=nfs:P(NFS) RBD=rbd:* Quobyte=quobyte:* ISCSI=iscsi:* FlexVolume=flexVolume:* Cinder=cinder:* CephFS=cephfs:* FC=fc:* Flocker=flocker:* AzureFile=azureFile:* VsphereVolume=vsphereVolume:* AzureDisk=azureDisk:* PhotonPersistentDisk=photonPersistentDisk:* PortworxVolume=portworxVolume:* ScaleIO=scaleIO:* Local=local:P(LocalVolume) StorageOS=storageos:* CSI=csi:P(CSIVolume)
NFS: Server=server:s Path=path:s ReadOnly=readOnly:b
LocalVolume: Path=path:s FSType=fsType:*
CSIVolume: Driver=driver:s VolumeHandle=volumeHandle:s ReadOnly=readOnly:b FSType=fsType:s VolumeAttributes=volumeAttributes:* ControllerPublishSecretRef=controllerPublishSecretRef:P(SecretRef) NodeStageSecretRef=nodeStageSecretRef:P(SecretRef) NodePublishSecretRef=nodePublishSecretRef:P(SecretRef) ControllerExpandSecretRef=controllerExpandSecretRef:P(SecretRef) NodeExpandSecretRef=nodeExpandSecretRef:P(SecretRef)
SecretRef: Name=name:s Namespace=namespace:s
Attachment: Attacher=attacher:s Source=source:S(AttachmentSource) NodeName=nodeName:s
AttachmentSource: PersistentVolumeName=persistentVolumeName:* InlineVolumeSpec=inlineVolumeSpec:*
NodeDriver: Name=name:s NodeID=nodeID:s TopologyKeys=topologyKeys:* Allocatable=allocatable:P(NodeResources)
NodeResources: Count=count:*
ClaimSpec: AccessModes=accessModes:* Selector=selector:* Resources=resources:S(ClaimResources) VolumeName=volumeName:s StorageClassName=storageClassName:* VolumeMode=volumeMode:* DataSource=dataSource:P(ClaimSource) DataSourceRef=dataSourceRef:P(ClaimSourceRef) VolumeAttributesClassName=volumeAttributesClassName:*
ClaimResources: Limits=limits:* Requests=requests:*
ClaimSource: APIGroup=apiGroup:* Kind=kind:s Name=name:s
ClaimSourceRef: APIGroup=apiGroup:* Kind=kind:s Name=name:s Namespace=namespace:*
TokenProjection: Audience=audience:s ExpirationSeconds=expirationSeconds:i Path=path:s
FlowSchemaSpec: PriorityLevelConfiguration=priorityLevelConfiguration:S(Local) MatchingPrecedence=matchingPrecedence:i DistinguisherMethod=distinguisherMethod:P(Distinguisher) Rules=rules:L(FlowRules)
Distinguisher: Type=type:s
FlowRules: Subjects=subjects:L(FlowSubject) ResourceRules=resourceRules:L(FlowResources) NonResourceRules=nonResourceRules:L(FlowPaths)
FlowSubject: Kind=kind:s User=user:P(Local) Group=group:P(Local) ServiceAccount=serviceAccount:P(FlowAccount)
FlowAccount: Namespace=namespace:s Name=name:s
FlowResources: Verbs=verbs:* APIGroups=apiGroups:* Resources=resources:* ClusterScope=clusterScope:b Namespaces=namespaces:*
FlowPaths: Verbs=verbs:* NonResourceURLs=nonResourceURLs:*
LevelSpec: Type=type:s Limited=limited:P(Limited) Exempt=exempt:P(ExemptLevel)
Limited: NominalConcurrencyShares=nominalConcurrencyShares:i LimitResponse=limitResponse:S(LimitResponse) LendablePercent=lendablePercent:* BorrowingLimitPercent=borrowingLimitPercent:*
LimitResponse: Type=type:s Queuing=queuing:P(Queuing)
Queuing: Queues=queues:i HandSize=handSize:i QueueLengthLimit=queueLengthLimit:i
ScopeSelector: MatchExpressions=matchExpressions:L(ScopeRequirement)
ScopeRequirement: ScopeName=scopeName:s Operator=operator:s Values=values:*
DeviceAttribute: IntValue=int:* BoolValue=bool:* StringValue=string:* VersionValue=version:* IntValues=ints:* BoolValues=bools:* StringValues=strings:* VersionValues=versions:*
DeviceClaimSpec: Devices=devices:S(Devices)
Devices: Requests=requests:L(DeviceRequest) Constraints=constraints:L(DeviceConstraint) Config=config:L(DeviceConfig)
DeviceRequest: Name=name:s Exactly=exactly:P(DeviceExactly) FirstAvailable=firstAvailable:L(DeviceSub)
DeviceExactly: DeviceClassName=deviceClassName:s Selectors=selectors:L(DeviceSelector) AllocationMode=allocationMode:s Count=count:i AdminAccess=adminAccess:* Tolerations=tolerations:L(Toleration) Capacity=capacity:P(DeviceCapacities)
DeviceSub: Name=name:s DeviceClassName=deviceClassName:s Selectors=selectors:L(DeviceSelector) AllocationMode=allocationMode:s Count=count:i Tolerations=tolerations:L(Toleration) Capacity=capacity:P(DeviceCapacities)
DeviceSelector: CEL=cel:P(DeviceCel)
DeviceCel: Expression=expression:s
DeviceCapacities: Requests=requests:*
DeviceConstraint: Requests=requests:* MatchAttribute=matchAttribute:* DistinctAttribute=distinctAttribute:*
DeviceConfig: Requests=requests:* Opaque=opaque:P(DeviceOpaque)
DeviceOpaque: Driver=driver:s Parameters=parameters:*
DeviceAllocation: Devices=devices:S(DeviceResults) NodeSelector=nodeSelector:P(NodeSelector) AllocationTimestamp=allocationTimestamp:*
DeviceResults: Results=results:L(DeviceResult) Config=config:L(DeviceResultConfig)
DeviceResult: Request=request:s Driver=driver:s Pool=pool:s Device=device:s AdminAccess=adminAccess:* Tolerations=tolerations:L(Toleration) BindingConditions=bindingConditions:* BindingFailureConditions=bindingFailureConditions:* ShareID=shareID:* ConsumedCapacity=consumedCapacity:*
DeviceResultConfig: Source=source:s Requests=requests:* Opaque=opaque:P(DeviceOpaque)
JobFailurePolicy: Rules=rules:L(JobFailureRule)
JobFailureRule: Action=action:s OnExitCodes=onExitCodes:P(JobExitCodes) OnPodConditions=onPodConditions:L(JobPodCondition)
JobExitCodes: ContainerName=containerName:* Operator=operator:s Values=values:*
JobPodCondition: Type=type:s Status=status:s
JobSuccessPolicy: Rules=rules:L(JobSuccessRule)
JobSuccessRule: SucceededIndexes=succeededIndexes:* SucceededCount=succeededCount:*
Uncounted: Succeeded=succeeded:* Failed=failed:*
ObjectRef: Kind=kind:s Namespace=namespace:s Name=name:s UID=uid:s APIVersion=apiVersion:s ResourceVersion=resourceVersion:s FieldPath=fieldPath:s
EventSource: Component=component:s Host=host:s
ParentRef: Group=group:s Resource=resource:s Namespace=namespace:s Name=name:s
ExemptLevel: NominalConcurrencyShares=nominalConcurrencyShares:* LendablePercent=lendablePercent:*
";

type Field = (&'static str, &'static str, &'static str);

static TABLE: LazyLock<HashMap<&'static str, Vec<Field>>> = LazyLock::new(|| {
    let mut table = HashMap::new();
    for line in STRUCTS.lines().filter(|l| !l.is_empty()) {
        let Some((name, rest)) = line.split_once(": ") else { continue };
        let fields = rest
            .split(' ')
            .filter_map(|field| match field.strip_prefix("+(") {
                Some(embedded) => Some(("+", "", embedded.trim_end_matches(')'))),
                None => {
                    let (names, kind) = field.split_once(':')?;
                    let (go, json_name) = names.split_once('=')?;
                    Some((go, json_name, kind))
                }
            })
            .collect();
        table.insert(name, fields);
    }
    table
});

fn fill(out: &mut Map<String, Value>, name: &str, v: &Value) {
    for (go, json_name, kind) in TABLE.get(name).map(Vec::as_slice).unwrap_or_default() {
        if *go == "+" {
            fill(out, kind, v);
            continue;
        }
        let field = &v[*json_name];
        let inner = kind.get(2..kind.len().saturating_sub(1)).unwrap_or_default();
        let value = match kind.as_bytes()[0] {
            b's' => field.as_str().map_or(json!(""), |s| json!(s)),
            b'i' => field.as_i64().map_or(json!(0), |n| json!(n)),
            b'b' => json!(field.as_bool().unwrap_or_default()),
            b'S' => of(inner, field),
            b'P' if field.is_null() => Value::Null,
            b'P' => of(inner, field),
            b'L' => field
                .as_array()
                .filter(|l| !l.is_empty())
                .map_or(Value::Null, |l| l.iter().map(|v| of(inner, v)).collect()),
            _ => super::template::sorted(field),
        };
        out.insert((*go).to_owned(), value);
    }
}

fn of(name: &str, v: &Value) -> Value {
    let mut out = Map::new();
    fill(&mut out, name, v);
    Value::Object(out)
}

/// A pod spec.
pub(crate) fn pod_spec(spec: &Value) -> Value {
    // The namespaces of the host belong to the security context internally.
    let mut spec = spec.clone();
    if spec["securityContext"].is_null() && spec.is_object() {
        spec["securityContext"] = json!({});
    }
    for field in ["hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace", "hostUsers"] {
        let value = spec[field].clone();
        if !value.is_null() {
            spec["securityContext"][field] = value;
        }
    }
    of("PodSpec", &spec)
}

/// A struct of the table above by its name.
pub(crate) fn named(name: &str, v: &Value) -> Value {
    of(name, v)
}

/// The spec of a persistent volume claim.
pub(crate) fn claim_spec(spec: &Value) -> Value {
    of("ClaimSpec", spec)
}

/// A container.
pub(crate) fn container(v: &Value) -> Value {
    of("Ephemeral", v)
}

/// A pod template: metadata inline, then `Spec`.
pub(crate) fn pod_template(template: &Value) -> Value {
    let mut out = Map::new();
    for (key, value) in template["metadata"].as_object().into_iter().flatten() {
        if !value.is_null() {
            out.insert(key.clone(), super::template::sorted(value));
        }
    }
    out.insert("Spec".to_owned(), pod_spec(&template["spec"]));
    Value::Object(out)
}

/// The unified diff of two values printed with an indent of one space.
pub(crate) fn diff(old: &Value, new: &Value) -> String {
    let (a, b) = (lines(old), lines(new));
    unified(&a, &b)
}

fn lines(v: &Value) -> Vec<String> {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    if serde::Serialize::serialize(v, &mut serializer).is_err() {
        return Vec::new();
    }
    String::from_utf8_lossy(&out).lines().map(str::to_owned).collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Op {
    Keep(usize, usize),
    Remove(usize, usize),
    Add(usize, usize),
}

fn script(a: &[String], b: &[String]) -> Vec<Op> {
    // Where both ends could take a line, the longer end gets it.
    let equal = |pairs: &mut dyn Iterator<Item = (&String, &String)>| pairs.take_while(|(x, y)| x == y).count();
    let mut head = equal(&mut a.iter().zip(b));
    let mut tail = equal(&mut a.iter().rev().zip(b.iter().rev()));
    if tail >= head {
        let rest = a.len().min(b.len()) - tail;
        head = head.min(rest);
    } else {
        tail = tail.min(a.len().min(b.len()) - head);
    }
    let (am, bm) = (&a[head..a.len() - tail], &b[head..b.len() - tail]);
    let mut longest = vec![vec![0u32; bm.len() + 1]; am.len() + 1];
    for i in (0..am.len()).rev() {
        for j in (0..bm.len()).rev() {
            longest[i][j] =
                if am[i] == bm[j] { longest[i + 1][j + 1] + 1 } else { longest[i + 1][j].max(longest[i][j + 1]) };
        }
    }
    let mut ops: Vec<Op> = (0..head).map(|i| Op::Keep(i, i)).collect();
    let (mut i, mut j) = (0, 0);
    while i < am.len() || j < bm.len() {
        if i < am.len() && j < bm.len() && am[i] == bm[j] {
            ops.push(Op::Keep(head + i, head + j));
            (i, j) = (i + 1, j + 1);
        } else if i < am.len() && (j == bm.len() || longest[i + 1][j] >= longest[i][j + 1]) {
            ops.push(Op::Remove(head + i, head + j));
            i += 1;
        } else {
            ops.push(Op::Add(head + i, head + j));
            j += 1;
        }
    }
    ops.extend((0..tail).map(|k| Op::Keep(a.len() - tail + k, b.len() - tail + k)));
    ops
}

fn unified(a: &[String], b: &[String]) -> String {
    const CONTEXT: usize = 3;
    let ops = script(a, b);
    let changed: Vec<usize> = (0..ops.len()).filter(|i| !matches!(ops[*i], Op::Keep(..))).collect();
    let mut out = String::new();
    let mut at = 0;
    while at < changed.len() {
        let mut last = at;
        while last + 1 < changed.len() && changed[last + 1] - changed[last] <= 2 * CONTEXT {
            last += 1;
        }
        let (from, to) = (changed[at].saturating_sub(CONTEXT), (changed[last] + CONTEXT + 1).min(ops.len()));
        hunk(&mut out, &ops[from..to], a, b);
        at = last + 1;
    }
    out
}

fn hunk(out: &mut String, ops: &[Op], a: &[String], b: &[String]) {
    let (first_a, first_b) = match ops.first() {
        Some(Op::Keep(i, j) | Op::Remove(i, j) | Op::Add(i, j)) => (*i, *j),
        None => return,
    };
    let len_a = ops.iter().filter(|o| !matches!(o, Op::Add(..))).count();
    let len_b = ops.iter().filter(|o| !matches!(o, Op::Remove(..))).count();
    let range = |first: usize, len: usize| match len {
        0 => format!("{first},0"),
        1 => format!("{}", first + 1),
        _ => format!("{},{len}", first + 1),
    };
    out.push_str(&format!("@@ -{} +{} @@\n", range(first_a, len_a), range(first_b, len_b)));
    for op in ops {
        let (sign, line) = match op {
            Op::Keep(i, _) => (' ', &a[*i]),
            Op::Remove(i, _) => ('-', &a[*i]),
            Op::Add(_, j) => ('+', &b[*j]),
        };
        out.push(sign);
        out.push_str(line);
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_there() {
        let spec = pod_spec(&json!({"containers": [{"name": "c", "image": "i"}], "hostNetwork": true}));
        assert_eq!(spec["SecurityContext"]["HostNetwork"], true);
        assert_eq!(spec["Containers"][0]["TTY"], false);
        assert_eq!(spec["Volumes"], Value::Null);
        assert_eq!(spec.as_object().and_then(|m| m.keys().next().cloned()).as_deref(), Some("Volumes"));
    }

    #[test]
    fn diff_has_three_lines_of_context() {
        let old = json!({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7, "h": 8, "i": 9});
        let mut new = old.clone();
        new["e"] = json!("x");
        let want = "@@ -3,7 +3,7 @@\n  \"b\": 2,\n  \"c\": 3,\n  \"d\": 4,\n- \"e\": 5,\n+ \"e\": \"x\",\n  \"f\": 6,\n  \"g\": 7,\n  \"h\": 8,\n";
        assert_eq!(diff(&old, &new), want);
    }
}
