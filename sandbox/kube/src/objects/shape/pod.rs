//! The fields of pods.

use super::{METADATA, QUANTITIES, Shape, TEXTS, Type};
use Type::{Any, Flag, Keyed, List, NumberOrText, Object, Quantity, Text, Whole};

pub(super) const POD: Shape = &[
    ("apiVersion", Text),
    ("kind", Text),
    ("metadata", Object(METADATA)),
    ("spec", Object(SPEC)),
    ("status", Object(STATUS)),
];

const SPEC: Shape = &[
    ("volumes", Keyed("name", VOLUME)),
    ("initContainers", Keyed("name", CONTAINER)),
    ("containers", Keyed("name", CONTAINER)),
    ("ephemeralContainers", Keyed("name", EPHEMERAL_CONTAINER)),
    ("restartPolicy", Text),
    ("terminationGracePeriodSeconds", Whole),
    ("activeDeadlineSeconds", Whole),
    ("dnsPolicy", Text),
    ("nodeSelector", TEXTS),
    ("serviceAccountName", Text),
    ("serviceAccount", Text),
    ("automountServiceAccountToken", Flag),
    ("nodeName", Text),
    ("hostNetwork", Flag),
    ("hostPID", Flag),
    ("hostIPC", Flag),
    ("shareProcessNamespace", Flag),
    ("securityContext", Object(POD_SECURITY)),
    ("imagePullSecrets", Keyed("name", NAME)),
    ("hostname", Text),
    ("subdomain", Text),
    ("affinity", Any),
    ("schedulerName", Text),
    ("tolerations", List(&Object(TOLERATION))),
    ("hostAliases", Keyed("ip", HOST_ALIAS)),
    ("priorityClassName", Text),
    ("priority", Whole),
    ("dnsConfig", Object(DNS)),
    ("readinessGates", List(&Any)),
    ("runtimeClassName", Text),
    ("enableServiceLinks", Flag),
    ("preemptionPolicy", Text),
    ("overhead", QUANTITIES),
    ("topologySpreadConstraints", Keyed("topologyKey", SPREAD)),
    ("setHostnameAsFQDN", Flag),
    ("os", Object(NAME)),
    ("hostUsers", Flag),
    ("schedulingGates", Keyed("name", NAME)),
    ("resourceClaims", Keyed("name", CLAIM)),
    ("resources", Object(RESOURCES)),
];

const NAME: Shape = &[("name", Text)];

const SPREAD: Shape = &[
    ("maxSkew", Whole),
    ("topologyKey", Text),
    ("whenUnsatisfiable", Text),
    ("labelSelector", Any),
    ("minDomains", Whole),
    ("nodeAffinityPolicy", Text),
    ("nodeTaintsPolicy", Text),
    ("matchLabelKeys", List(&Text)),
];

const CLAIM: Shape = &[
    ("name", Text),
    ("resourceClaimName", Text),
    ("resourceClaimTemplateName", Text),
];

const TOLERATION: Shape = &[
    ("key", Text),
    ("operator", Text),
    ("value", Text),
    ("effect", Text),
    ("tolerationSeconds", Whole),
];

const HOST_ALIAS: Shape = &[("ip", Text), ("hostnames", List(&Text))];

const DNS: Shape = &[
    ("nameservers", List(&Text)),
    ("searches", List(&Text)),
    ("options", List(&Object(&[("name", Text), ("value", Text)]))),
];

const SELINUX: Shape = &[
    ("user", Text),
    ("role", Text),
    ("type", Text),
    ("level", Text),
];

const PROFILE: Shape = &[("type", Text), ("localhostProfile", Text)];

const WINDOWS: Shape = &[
    ("gmsaCredentialSpecName", Text),
    ("gmsaCredentialSpec", Text),
    ("runAsUserName", Text),
    ("hostProcess", Flag),
];

const POD_SECURITY: Shape = &[
    ("seLinuxOptions", Object(SELINUX)),
    ("windowsOptions", Object(WINDOWS)),
    ("runAsUser", Whole),
    ("runAsGroup", Whole),
    ("runAsNonRoot", Flag),
    ("supplementalGroups", List(&Whole)),
    ("supplementalGroupsPolicy", Text),
    ("fsGroup", Whole),
    ("fsGroupChangePolicy", Text),
    ("sysctls", List(&Object(&[("name", Text), ("value", Text)]))),
    ("seccompProfile", Object(PROFILE)),
    ("appArmorProfile", Object(PROFILE)),
    ("seLinuxChangePolicy", Text),
];

const SECURITY: Shape = &[
    (
        "capabilities",
        Object(&[("add", List(&Text)), ("drop", List(&Text))]),
    ),
    ("privileged", Flag),
    ("seLinuxOptions", Object(SELINUX)),
    ("windowsOptions", Object(WINDOWS)),
    ("runAsUser", Whole),
    ("runAsGroup", Whole),
    ("runAsNonRoot", Flag),
    ("readOnlyRootFilesystem", Flag),
    ("allowPrivilegeEscalation", Flag),
    ("procMount", Text),
    ("seccompProfile", Object(PROFILE)),
    ("appArmorProfile", Object(PROFILE)),
];

const CONTAINER: Shape = &[
    ("name", Text),
    ("image", Text),
    ("command", List(&Text)),
    ("args", List(&Text)),
    ("workingDir", Text),
    ("ports", Keyed("containerPort", PORT)),
    ("envFrom", List(&Object(ENV_FROM))),
    ("env", Keyed("name", ENV)),
    ("resources", Object(RESOURCES)),
    ("resizePolicy", List(&Any)),
    ("restartPolicy", Text),
    ("volumeMounts", Keyed("mountPath", MOUNT)),
    (
        "volumeDevices",
        Keyed("devicePath", &[("name", Text), ("devicePath", Text)]),
    ),
    ("livenessProbe", Object(PROBE)),
    ("readinessProbe", Object(PROBE)),
    ("startupProbe", Object(PROBE)),
    (
        "lifecycle",
        Object(&[
            ("postStart", Object(HANDLER)),
            ("preStop", Object(HANDLER)),
            ("stopSignal", Text),
        ]),
    ),
    ("terminationMessagePath", Text),
    ("terminationMessagePolicy", Text),
    ("imagePullPolicy", Text),
    ("securityContext", Object(SECURITY)),
    ("stdin", Flag),
    ("stdinOnce", Flag),
    ("tty", Flag),
];

/// They are refused; what they are is not looked at.
const EPHEMERAL_CONTAINER: Shape = &[("name", Text)];

const PORT: Shape = &[
    ("name", Text),
    ("hostPort", Whole),
    ("containerPort", Whole),
    ("protocol", Text),
    ("hostIP", Text),
];

const REFERENCE: Shape = &[("name", Text), ("optional", Flag)];

const ENV_FROM: Shape = &[
    ("prefix", Text),
    ("configMapRef", Object(REFERENCE)),
    ("secretRef", Object(REFERENCE)),
];

const FIELD_REF: Shape = &[("apiVersion", Text), ("fieldPath", Text)];

const RESOURCE_REF: Shape = &[
    ("containerName", Text),
    ("resource", Text),
    ("divisor", Quantity),
];

const KEY_REF: Shape = &[("name", Text), ("key", Text), ("optional", Flag)];

const ENV: Shape = &[
    ("name", Text),
    ("value", Text),
    (
        "valueFrom",
        Object(&[
            ("fieldRef", Object(FIELD_REF)),
            ("resourceFieldRef", Object(RESOURCE_REF)),
            ("configMapKeyRef", Object(KEY_REF)),
            ("secretKeyRef", Object(KEY_REF)),
        ]),
    ),
];

const RESOURCES: Shape = &[
    ("limits", QUANTITIES),
    ("requests", QUANTITIES),
    (
        "claims",
        List(&Object(&[("name", Text), ("request", Text)])),
    ),
];

const MOUNT: Shape = &[
    ("name", Text),
    ("readOnly", Flag),
    ("recursiveReadOnly", Text),
    ("mountPath", Text),
    ("subPath", Text),
    ("mountPropagation", Text),
    ("subPathExpr", Text),
];

const EXEC: Shape = &[("command", List(&Text))];

const HTTP_GET: Shape = &[
    ("path", Text),
    ("port", NumberOrText),
    ("host", Text),
    ("scheme", Text),
    (
        "httpHeaders",
        List(&Object(&[("name", Text), ("value", Text)])),
    ),
];

const TCP: Shape = &[("port", NumberOrText), ("host", Text)];

const HANDLER: Shape = &[
    ("exec", Object(EXEC)),
    ("httpGet", Object(HTTP_GET)),
    ("tcpSocket", Object(TCP)),
    ("sleep", Object(&[("seconds", Whole)])),
];

const PROBE: Shape = &[
    ("exec", Object(EXEC)),
    ("httpGet", Object(HTTP_GET)),
    ("tcpSocket", Object(TCP)),
    ("grpc", Object(&[("port", Whole), ("service", Text)])),
    ("initialDelaySeconds", Whole),
    ("timeoutSeconds", Whole),
    ("periodSeconds", Whole),
    ("successThreshold", Whole),
    ("failureThreshold", Whole),
    ("terminationGracePeriodSeconds", Whole),
];

const ITEM: Shape = &[("key", Text), ("path", Text), ("mode", Whole)];

const DOWNWARD_ITEM: Shape = &[
    ("path", Text),
    ("fieldRef", Object(FIELD_REF)),
    ("resourceFieldRef", Object(RESOURCE_REF)),
    ("mode", Whole),
];

const PROJECTION: Shape = &[
    ("name", Text),
    ("items", List(&Object(ITEM))),
    ("optional", Flag),
];

/// Sources that are refused are there by name only, so that a message can say so.
const VOLUME: Shape = &[
    ("name", Text),
    ("hostPath", Object(&[("path", Text), ("type", Text)])),
    (
        "emptyDir",
        Object(&[("medium", Text), ("sizeLimit", Quantity)]),
    ),
    (
        "configMap",
        Object(&[
            ("name", Text),
            ("items", List(&Object(ITEM))),
            ("defaultMode", Whole),
            ("optional", Flag),
        ]),
    ),
    (
        "secret",
        Object(&[
            ("secretName", Text),
            ("items", List(&Object(ITEM))),
            ("defaultMode", Whole),
            ("optional", Flag),
        ]),
    ),
    (
        "downwardAPI",
        Object(&[
            ("items", List(&Object(DOWNWARD_ITEM))),
            ("defaultMode", Whole),
        ]),
    ),
    (
        "projected",
        Object(&[
            (
                "sources",
                List(&Object(&[
                    ("secret", Object(PROJECTION)),
                    ("configMap", Object(PROJECTION)),
                    (
                        "downwardAPI",
                        Object(&[("items", List(&Object(DOWNWARD_ITEM)))]),
                    ),
                    ("serviceAccountToken", Any),
                    ("clusterTrustBundle", Any),
                ])),
            ),
            ("defaultMode", Whole),
        ]),
    ),
    ("persistentVolumeClaim", Any),
    ("csi", Any),
    ("ephemeral", Any),
    ("image", Any),
    ("nfs", Any),
    ("iscsi", Any),
    ("fc", Any),
    ("gitRepo", Any),
    ("azureDisk", Any),
    ("azureFile", Any),
    ("awsElasticBlockStore", Any),
    ("gcePersistentDisk", Any),
    ("cephfs", Any),
    ("cinder", Any),
    ("flexVolume", Any),
    ("flocker", Any),
    ("glusterfs", Any),
    ("photonPersistentDisk", Any),
    ("portworxVolume", Any),
    ("quobyte", Any),
    ("rbd", Any),
    ("scaleIO", Any),
    ("storageos", Any),
    ("vsphereVolume", Any),
];

const CONDITION: Shape = &[
    ("type", Text),
    ("status", Text),
    ("observedGeneration", Whole),
    ("lastProbeTime", Any),
    ("lastTransitionTime", Any),
    ("reason", Text),
    ("message", Text),
];

/// Clients send it back as they got it, and it is not theirs to change.
const STATUS: Shape = &[
    ("observedGeneration", Whole),
    ("phase", Text),
    ("conditions", Keyed("type", CONDITION)),
    ("message", Text),
    ("reason", Text),
    ("nominatedNodeName", Text),
    ("hostIP", Text),
    ("hostIPs", List(&Any)),
    ("podIP", Text),
    ("podIPs", Keyed("ip", &[("ip", Text)])),
    ("startTime", Any),
    ("initContainerStatuses", List(&Any)),
    ("containerStatuses", List(&Any)),
    ("ephemeralContainerStatuses", List(&Any)),
    ("qosClass", Text),
    ("resize", Text),
    ("resourceClaimStatuses", List(&Any)),
];
