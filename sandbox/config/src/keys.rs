//! Every key there is, said once.
//!
//! Each key names who reads it. One that cannot be kept yet says so, and a pod that it is for is
//! refused: none is read and ignored. Keys that a pod can say name neither files nor programs of the host.

use pericarp_hypervisor::{
    Wanted,
    spec::{MAX_CPUS, MIN_MEMORY},
};

use crate::{
    feature::Feature,
    key::{Annotation, Key, Kind, Maturity, Scope},
    problem::list,
    settings::{Rootfs, ShareCache},
    sizing::{CpuRequests, Policy},
    value::size,
};

/// More than any machine has, and exact in the arithmetic that follows.
const MOST_MEMORY: u64 = 1 << 50;
/// No pod's processes take less.
const LEAST_OVERHEAD: u64 = 1 << 20;
/// More requests in a second than any device serves.
const MOST_IOPS: u64 = 1_000_000_000;
/// A request of this size at least comes through in a second.
const LEAST_BANDWIDTH: u64 = 4096;
const MOST_BANDWIDTH: u64 = 1 << 40;
/// A file system for less has no room for files.
const LEAST_VOLUME: u64 = 1 << 20;
/// ext4 with blocks of 4096 bytes, numbered by 32 bits.
const MOST_VOLUME: u64 = 1 << 44;

/// Every key.
pub(crate) static KEYS: [Key; 22] = [
    Key {
        name: "features",
        scope: Scope::Node,
        meaning: "Features that this node is to have: each makes experimental keys usable.",
        user: "this crate, which refuses experimental keys without theirs; whoever enables a node, \
               to prepare them",
        unset: "none",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Names {
            known: || Feature::ALL.map(Feature::name).to_vec(),
            set: |draft, names| {
                draft.features = names.into_iter().filter_map(Feature::parse).collect();
            },
        },
        show: |draft| words(draft.features.iter().map(|feature| feature.name())),
    },
    Key {
        name: "state-directory",
        scope: Scope::Node,
        meaning: "Where the state of features is kept.",
        user: "the shim, before a pod gets an experimental key; whoever prepares features",
        unset: crate::config::STATE_DIRECTORY,
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Directory {
            set: |draft, path| draft.state_directory = Some(path),
        },
        show: |draft| {
            draft
                .state_directory
                .as_ref()
                .map(|path| path.display().to_string())
        },
    },
    Key {
        name: "aliases",
        scope: Scope::Profile,
        meaning: "Further handlers that mean this profile. The profile 'pericarp' has those of AKS \
                  and Kata as far as no other profile has them.",
        user: "the shim, to find a pod's profile; whoever enables a node, which gets a handler for \
               each",
        unset: "none",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Handlers {
            set: |draft, names| draft.aliases = Some(names),
        },
        show: |draft| words(draft.aliases.iter().flatten().map(String::as_str)),
    },
    Key {
        name: "annotations",
        scope: Scope::Profile,
        meaning: "Keys that pods of this profile may say by annotations.",
        user: "the shim, when a pod has annotations of ours",
        unset: "none",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Names {
            known: || annotated().map(|key| key.name).collect(),
            set: |draft, names| {
                draft.annotations = names.into_iter().filter_map(find).collect();
            },
        },
        show: |draft| words(draft.annotations.iter().map(|key| key.name)),
    },
    Key {
        name: "hypervisor",
        scope: Scope::Profile,
        meaning: "What runs the machine; auto is pericarp where KVM is backed by hardware, else \
                  qemu.",
        user: "the shim, when it starts a pod's machine",
        unset: "auto",
        maturity: Maturity::Stable,
        annotation: Annotation::Whole,
        kind: Kind::Word {
            names: &Wanted::NAMES,
            set: |draft, name| put(&mut draft.settings.hypervisor, Wanted::parse(name)),
        },
        show: |draft| {
            let name = |name: &&str| Wanted::parse(name) == Some(draft.settings.hypervisor);
            Wanted::NAMES.into_iter().find(name).map(str::to_owned)
        },
    },
    Key {
        name: "assets",
        scope: Scope::Profile,
        meaning: "Directory of the guest's kernel, its modules and the agent, or of versions of them, \
                  one of which is in use (pericarp assets). A version may be named, too.",
        user: "the shim, when it starts a pod's machine, which keeps what it has taken",
        unset: "/var/lib/pericarp/assets if a version there is in use, else the one beside the program",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Directory {
            set: |draft, path| draft.settings.assets = Some(path),
        },
        show: |draft| {
            let assets = draft.settings.assets.as_ref();
            assets.map(|path| path.display().to_string())
        },
    },
    Key {
        name: "audit-directory",
        scope: Scope::Profile,
        meaning: "Directory of audit.jsonl, in which each pod of the profile has a line for each \
                  container, command, mount and signal that it is given, each kill for want of \
                  memory, and its end. 64 MiB of it are set aside as audit.jsonl.old.",
        user: "the shim, from a pod's start on",
        unset: "none, and nothing is written",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Directory {
            set: |draft, path| draft.settings.audit = Some(path),
        },
        show: |draft| {
            let audit = draft.settings.audit.as_ref();
            audit.map(|path| path.display().to_string())
        },
    },
    Key {
        name: "boot-timeout",
        scope: Scope::Profile,
        meaning: "How long a machine may take until its agent answers.",
        user: "the shim, when it starts a pod's machine",
        unset: "20 with KVM, 60 without",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Seconds {
            set: |draft, time| draft.settings.boot_timeout = Some(time),
        },
        show: |draft| {
            let timeout = draft.settings.boot_timeout;
            timeout.map(|time| time.as_secs_f64().to_string())
        },
    },
    Key {
        name: "sizing",
        scope: Scope::Profile,
        meaning: "How the limits of a pod's containers, x CPUs and y bytes, become its machine's \
                  size: aks-preview has ceil(1+x) CPUs and 2 GiB + y; aks-ga has ceil(x) and y, or 1 \
                  and 512 MiB; kata has ceil(x+0.2) and y + 32 MiB, or 1 and 2 GiB.",
        user: "the shim, when it sizes a pod's machine",
        unset: "aks-preview",
        maturity: Maturity::Stable,
        annotation: Annotation::Whole,
        kind: Kind::Word {
            names: &Policy::NAMES,
            set: |draft, name| put(&mut draft.settings.sizing, Policy::parse(name)),
        },
        show: |draft| Some(draft.settings.sizing.name().to_owned()),
    },
    Key {
        name: "cpu-requests",
        scope: Scope::Profile,
        meaning: "Whether what containers request of the CPU counts where it is more than their \
                  limits; under the policy kata only, the others ignore requests.",
        user: "the shim, when it sizes a pod's machine",
        unset: "ignored",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Word {
            names: &CpuRequests::NAMES,
            set: |draft, name| put(&mut draft.settings.cpu_requests, CpuRequests::parse(name)),
        },
        show: |draft| Some(draft.settings.cpu_requests.name().to_owned()),
    },
    Key {
        name: "max-vcpus",
        scope: Scope::Profile,
        meaning: "Most virtual CPUs of a machine, whatever asks for them.",
        user: "the shim, when it sizes a pod's machine",
        unset: "what the host has",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Number {
            least: 1,
            most: MAX_CPUS as u64,
            set: |draft, vcpus| draft.settings.max_vcpus = narrow(vcpus),
        },
        show: |draft| draft.settings.max_vcpus.map(|vcpus| vcpus.to_string()),
    },
    Key {
        name: "max-memory",
        scope: Scope::Profile,
        meaning: "Most memory of a machine, whatever asks for it.",
        user: "the shim, when it sizes a pod's machine",
        unset: "what the host has",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Size {
            least: MIN_MEMORY,
            most: MOST_MEMORY,
            set: |draft, bytes| draft.settings.max_memory = Some(bytes),
        },
        show: |draft| draft.settings.max_memory.map(size),
    },
    Key {
        name: "overhead",
        scope: Scope::Profile,
        meaning: "What a pod's processes may take of the host beside the machine's memory, as `pericarp \
                  measure` finds it. With what the sizing policy adds to limits it is podFixed of the \
                  RuntimeClass.",
        user: "whoever makes RuntimeClasses (pericarp node manifests, node serve); the shim, which \
               writes it down for `pericarp metrics`",
        unset: "40 MiB where pericarp runs the machine, 288 MiB where QEMU does",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Size {
            least: LEAST_OVERHEAD,
            most: MOST_MEMORY,
            set: |draft, bytes| draft.settings.overhead = Some(bytes),
        },
        show: |draft| draft.settings.overhead.map(size),
    },
    Key {
        name: "share-cache",
        scope: Scope::Profile,
        meaning: "What a guest keeps of the files of its volumes and roots: never is nothing, auto is what was \
                  right a second ago, always is for files that nobody else changes.",
        user: "the shim, when it starts the pod's pericarp-fs",
        unset: "auto",
        maturity: Maturity::Stable,
        annotation: Annotation::Whole,
        kind: Kind::Word {
            names: &ShareCache::NAMES,
            set: |draft, name| put(&mut draft.settings.share_cache, ShareCache::parse(name)),
        },
        show: |draft| Some(draft.settings.share_cache.name().to_owned()),
    },
    Key {
        name: "rootfs",
        scope: Scope::Profile,
        meaning: "How containers' roots reach the guest: fs passes files on, of any snapshotter but \
                  blockfile, whose images would need a loop device; block gives the guest the disk \
                  that the snapshotter made (blockfile, devmapper), with ext4, XFS or EROFS on it. \
                  containerd's erofs makes none, but an overlay of several.",
        user: "the shim, when it creates a container",
        unset: "fs",
        maturity: Maturity::Stable,
        annotation: Annotation::None,
        kind: Kind::Word {
            names: &Rootfs::NAMES,
            set: |draft, name| put(&mut draft.settings.rootfs, Rootfs::parse(name)),
        },
        show: |draft| Some(draft.settings.rootfs.name().to_owned()),
    },
    Key {
        name: "volume-iops",
        scope: Scope::Profile,
        meaning: "Requests per second of each volume: of a disk, or to the server of a directory. A \
                  pod can set its own, up to this. Single files, and what a kubelet writes \
                  (ConfigMaps), have none.",
        user: "the shim, when it starts what serves the volume",
        unset: "no limit",
        maturity: Maturity::Stable,
        annotation: Annotation::PerVolume("iops"),
        kind: Kind::Number {
            least: 1,
            most: MOST_IOPS,
            set: |draft, iops| draft.settings.volume_iops = Some(iops),
        },
        show: |draft| draft.settings.volume_iops.map(|iops| iops.to_string()),
    },
    Key {
        name: "volume-bandwidth",
        scope: Scope::Profile,
        meaning: "Bytes per second of each volume, read and written. A pod can set its own, up to \
                  this.",
        user: "the shim, when it starts what serves the volume",
        unset: "no limit",
        maturity: Maturity::Stable,
        annotation: Annotation::PerVolume("bandwidth"),
        kind: Kind::Size {
            least: LEAST_BANDWIDTH,
            most: MOST_BANDWIDTH,
            set: |draft, bytes| draft.settings.volume_bandwidth = Some(bytes),
        },
        show: |draft| draft.settings.volume_bandwidth.map(size),
    },
    Key {
        name: "cpus",
        scope: Scope::Profile,
        meaning: "CPUs of the host that a pod's machine and sidecars run on. A pod can name fewer of \
                  these.",
        user: "the shim, when it starts a pod's processes",
        unset: "all",
        maturity: Maturity::Experimental(Feature::CpuPinning),
        annotation: Annotation::Whole,
        kind: Kind::Cpus {
            set: |draft, cpus| draft.settings.cpus = Some(cpus),
        },
        show: |draft| draft.settings.cpus.as_ref().map(ToString::to_string),
    },
    Key {
        name: "kernel-parameters",
        scope: Scope::Profile,
        meaning: "Parameters of the guest's kernel beside the machine's own. A pod's follow those of \
                  its profile.",
        user: "the shim, when it starts a pod's machine",
        unset: "none",
        maturity: Maturity::Experimental(Feature::KernelParameters),
        annotation: Annotation::Whole,
        kind: Kind::Parameters {
            set: |draft, words| draft.settings.kernel_parameters = words,
        },
        show: |draft| words([draft.settings.kernel_parameters.as_str()]),
    },
    Key {
        name: "vcpus",
        scope: Scope::Pod,
        meaning: "Virtual CPUs of the machine, in place of what the sizing policy says.",
        user: "the shim, when it sizes a pod's machine",
        unset: "as the sizing policy says",
        maturity: Maturity::Stable,
        annotation: Annotation::Whole,
        kind: Kind::Number {
            least: 1,
            most: MAX_CPUS as u64,
            set: |draft, vcpus| draft.vcpus = narrow(vcpus),
        },
        show: |draft| draft.vcpus.map(|vcpus| vcpus.to_string()),
    },
    Key {
        name: "memory",
        scope: Scope::Pod,
        meaning: "Memory of the machine, in place of what the sizing policy says.",
        user: "the shim, when it sizes a pod's machine",
        unset: "as the sizing policy says",
        maturity: Maturity::Stable,
        annotation: Annotation::Whole,
        kind: Kind::Size {
            least: MIN_MEMORY,
            most: MOST_MEMORY,
            set: |draft, bytes| draft.memory = Some(bytes),
        },
        show: |draft| draft.memory.map(size),
    },
    Key {
        name: "volume-size-limit",
        scope: Scope::Pod,
        meaning: "Bytes that an emptyDir may hold, its file system included: it is a disk of its own \
                  then. A kubelet passes sizeLimit on for those in memory alone.",
        user: "the shim, when it creates a container",
        unset: "no limit",
        maturity: Maturity::Stable,
        annotation: Annotation::PerVolume("size-limit"),
        kind: Kind::Size {
            least: LEAST_VOLUME,
            most: MOST_VOLUME,
            set: |draft, bytes| draft.volume_size_limit = Some(bytes),
        },
        show: |draft| draft.volume_size_limit.map(size),
    },
];

/// The key with this name.
pub(crate) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The keys that a pod can say.
pub(crate) fn annotated() -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(|key| key.annotation != Annotation::None)
}

/// Stores a value if there is one.
fn put<T>(place: &mut T, value: Option<T>) -> bool {
    let known = value.is_some();
    if let Some(value) = value {
        *place = value;
    }
    known
}

/// For numbers whose range is that of a machine's CPUs.
fn narrow(number: u64) -> Option<u32> {
    u32::try_from(number).ok()
}

/// Words as they are shown, if there are any.
fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> Option<String> {
    Some(list(words)).filter(|list| !list.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{key::Raw, settings::Draft};

    /// A value of each key that is not its default, as a file has it and as it is shown.
    fn samples() -> Vec<(&'static str, Raw, &'static str)> {
        let text = |text: &str| Raw::Text(text.into());
        let number = |text: &str| Raw::Number(text.into());
        let list = |word: &str| Raw::Words(vec![word.into()]);
        vec![
            ("features", list("cpu-pinning"), "cpu-pinning"),
            ("state-directory", text("/x"), "/x"),
            ("aliases", list("a"), "a"),
            ("annotations", list("memory"), "memory"),
            ("hypervisor", text("qemu-tcg"), "qemu-tcg"),
            ("assets", text("/a"), "/a"),
            ("audit-directory", text("/b"), "/b"),
            ("boot-timeout", number("2.5"), "2.5"),
            ("sizing", text("kata"), "kata"),
            ("cpu-requests", text("counted"), "counted"),
            ("max-vcpus", number("8"), "8"),
            ("max-memory", text("8G"), "8 GiB"),
            ("overhead", text("30M"), "30 MiB"),
            ("share-cache", text("never"), "never"),
            ("rootfs", text("block"), "block"),
            ("volume-iops", number("500"), "500"),
            ("volume-bandwidth", text("10M"), "10 MiB"),
            ("cpus", text("2,3"), "2-3"),
            ("kernel-parameters", text("a  b"), "a b"),
            ("vcpus", number("2"), "2"),
            ("memory", number("268435456"), "256 MiB"),
            ("volume-size-limit", text("5M"), "5 MiB"),
        ]
    }

    #[test]
    fn each_key_stores_what_it_shows_and_nothing_else() {
        let samples = samples();
        let names: Vec<_> = samples.iter().map(|(name, ..)| *name).collect();
        let all: Vec<_> = KEYS.iter().map(|key| key.name).collect();
        assert_eq!(names, all);
        let shown = |draft: &Draft| KEYS.iter().map(|key| (key.show)(draft)).collect::<Vec<_>>();
        let before = shown(&Draft::default());
        for (index, (name, raw, expected)) in samples.iter().enumerate() {
            let mut draft = Draft::default();
            assert_eq!(KEYS[index].kind.store(&mut draft, raw), Ok(()), "{name}");
            for (other, (was, is)) in before.iter().zip(shown(&draft)).enumerate() {
                match other == index {
                    true => assert_eq!(is.as_deref(), Some(*expected), "{name}"),
                    false => assert_eq!(*was, is, "{name} changes {}", KEYS[other].name),
                }
            }
        }
    }

    #[test]
    fn each_name_of_a_word_is_known_to_its_setter() {
        for key in &KEYS {
            let Kind::Word { names, set } = key.kind else {
                continue;
            };
            for name in names {
                assert!(set(&mut Draft::default(), name), "{}: {name}", key.name);
            }
            assert!(!set(&mut Draft::default(), "no such"), "{}", key.name);
            assert_eq!((key.show)(&Draft::default()).as_deref(), Some(key.unset));
        }
    }

    #[test]
    fn names_are_unique_and_every_key_is_documented() {
        for (index, key) in KEYS.iter().enumerate() {
            assert!(KEYS[..index].iter().all(|other| other.name != key.name));
            for text in [key.meaning, key.user, key.unset, &key.kind.range()] {
                assert!(!text.is_empty(), "{}", key.name);
            }
            assert!(key.meaning.ends_with('.'), "{}", key.name);
            let by_pod = key.annotation != Annotation::None;
            assert!(key.scope != Scope::Pod || by_pod, "{}", key.name);
            // A pod must not name files of the host.
            let path = matches!(key.kind, Kind::Directory { .. });
            assert!(!(path && by_pod), "{}", key.name);
        }
    }

    #[test]
    fn values_of_another_type_are_refused_with_the_form() {
        for key in &KEYS {
            let raw = Raw::Other("a boolean");
            let broken = key.kind.store(&mut Draft::default(), &raw).unwrap_err();
            assert!(broken[0].1.cure.starts_with("write a "), "{}", key.name);
        }
    }
}
