//! The fields of what is no pod.

use super::{METADATA, QUANTITIES, Shape, TEXTS, Type};
use Type::{Any, Base64, Flag, Keyed, List, Map, Object, Set, Text, Whole};

pub(super) const RUNTIME_CLASS: Shape = &[
    ("apiVersion", Text),
    ("kind", Text),
    ("metadata", Object(METADATA)),
    ("handler", Text),
    ("overhead", Object(&[("podFixed", QUANTITIES)])),
    (
        "scheduling",
        Object(&[("nodeSelector", TEXTS), ("tolerations", List(&Any))]),
    ),
];

pub(super) const CONFIG_MAP: Shape = &[
    ("apiVersion", Text),
    ("kind", Text),
    ("metadata", Object(METADATA)),
    ("immutable", Flag),
    ("data", TEXTS),
    ("binaryData", Map(&Base64)),
];

pub(super) const SECRET: Shape = &[
    ("apiVersion", Text),
    ("kind", Text),
    ("metadata", Object(METADATA)),
    ("immutable", Flag),
    ("data", Map(&Base64)),
    ("stringData", TEXTS),
    ("type", Text),
];

pub(super) const NAMESPACE: Shape = &[
    ("apiVersion", Text),
    ("kind", Text),
    ("metadata", Object(METADATA)),
    ("spec", Object(&[("finalizers", Set)])),
    ("status", Any),
];

const SUBJECT: Shape = &[
    ("kind", Text),
    ("namespace", Text),
    ("name", Text),
    ("uid", Text),
    ("apiVersion", Text),
    ("resourceVersion", Text),
    ("fieldPath", Text),
];

pub(super) const EVENT: Shape = &[
    ("apiVersion", Text),
    ("kind", Text),
    ("metadata", Object(METADATA)),
    ("involvedObject", Object(SUBJECT)),
    ("reason", Text),
    ("message", Text),
    ("source", Object(&[("component", Text), ("host", Text)])),
    ("firstTimestamp", Any),
    ("lastTimestamp", Any),
    ("count", Whole),
    ("type", Text),
    ("eventTime", Any),
    ("series", Any),
    ("action", Text),
    ("related", Object(SUBJECT)),
    ("reportingComponent", Text),
    ("reportingInstance", Text),
];

pub(super) const NODE: Shape = &[
    ("apiVersion", Text),
    ("kind", Text),
    ("metadata", Object(METADATA)),
    (
        "spec",
        Object(&[
            ("podCIDR", Text),
            ("podCIDRs", Set),
            ("providerID", Text),
            ("unschedulable", Flag),
            ("taints", List(&Any)),
            ("configSource", Any),
            ("externalID", Text),
        ]),
    ),
    (
        "status",
        Object(&[
            ("capacity", QUANTITIES),
            ("allocatable", QUANTITIES),
            ("phase", Text),
            (
                "conditions",
                Keyed(
                    "type",
                    &[
                        ("type", Text),
                        ("status", Text),
                        ("lastHeartbeatTime", Any),
                        ("lastTransitionTime", Any),
                        ("reason", Text),
                        ("message", Text),
                    ],
                ),
            ),
            (
                "addresses",
                Keyed("type", &[("type", Text), ("address", Text)]),
            ),
            ("daemonEndpoints", Any),
            ("nodeInfo", Any),
            ("images", List(&Any)),
            ("volumesInUse", List(&Text)),
            ("volumesAttached", List(&Any)),
            ("config", Any),
            ("runtimeHandlers", List(&Any)),
            ("features", Any),
        ]),
    ),
];
