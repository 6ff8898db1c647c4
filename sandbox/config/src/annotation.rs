//! What a pod says of its own, by annotations.
//!
//! Read by the shim from the sandbox container's annotations. containerd passes those on that match a
//! pattern of the runtime's `pod_annotations`, by Go's `path.Match`, where a star takes no slash: the
//! node's configuration has [`PATTERN`] there. The part behind the slash is a name of up to 63
//! characters in Kubernetes, which leaves 40 for a volume's.
//!
//! A profile allows each key by itself; none is by default. What is not allowed, not known or out of
//! range refuses the pod. No key names a file or a program of the host.

use std::collections::BTreeMap;

use crate::{
    config::{Config, Profile, experimental},
    feature::Feature,
    key::{Annotation, Key, Maturity},
    keys,
    problem::{Broken, Violation, Violations},
    settings::{Draft, Settings},
    sizing::Sizing,
};

/// What the names of our annotations begin with.
pub const PREFIX: &str = "io.pericarp/";
/// What containerd must have among a runtime's `pod_annotations` to pass them on.
pub const PATTERN: &str = "io.pericarp/*";
/// What those of volumes go on with: `volume.NAME.iops`.
const VOLUME: &str = "volume.";

/// What one volume may do in a second, and hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VolumeLimits {
    /// Requests; none is no limit.
    pub iops: Option<u64>,
    /// Bytes, read and written; none is no limit.
    pub bandwidth: Option<u64>,
    /// Bytes that it may hold; none is no limit.
    pub size: Option<u64>,
}

impl VolumeLimits {
    /// Whether what it does is limited.
    #[must_use]
    pub fn is_slowed(self) -> bool {
        self.iops.is_some() || self.bandwidth.is_some()
    }
}

/// How one pod runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its profile's, with what it says of its own.
    pub settings: Settings,
    /// Virtual CPUs in place of the policy's.
    pub vcpus: Option<u32>,
    /// Bytes of memory in place of the policy's.
    pub memory: Option<u64>,
    /// Features that must be ready, see [`crate::feature::FeatureFile::require`].
    pub features: Vec<Feature>,
    volumes: BTreeMap<String, VolumeLimits>,
}

impl Pod {
    /// What decides its machine's size beside its resources.
    #[must_use]
    pub fn sizing(&self) -> Sizing {
        Sizing {
            policy: self.settings.sizing,
            requests: self.settings.cpu_requests,
            max_vcpus: self.settings.max_vcpus,
            max_memory: self.settings.max_memory,
            vcpus: self.vcpus,
            memory: self.memory,
        }
    }

    /// The limits of a volume, by the name that the pod gives it, or, of a persistent volume, its
    /// own: that is what the kubelet's directory of it is called. Of a hostPath it is the last part
    /// of its path, and of a block device the last part of its path in the container.
    #[must_use]
    pub fn volume(&self, name: &str) -> VolumeLimits {
        let own = self.volumes.get(name).copied().unwrap_or_default();
        VolumeLimits {
            iops: own.iops.or(self.settings.volume_iops),
            bandwidth: own.bandwidth.or(self.settings.volume_bandwidth),
            size: own.size,
        }
    }

    /// Volumes it has limits for by name. One that is not there is a mistake, which only the shim
    /// can see.
    pub fn named_volumes(&self) -> impl Iterator<Item = &str> {
        self.volumes.keys().map(String::as_str)
    }
}

impl Config {
    /// How a pod of this handler runs that has these annotations. Others than ours are passed over.
    ///
    /// # Errors
    ///
    /// An unknown handler, or every annotation that is wrong.
    pub fn pod<'a>(
        &self,
        handler: &str,
        annotations: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Pod, Violations> {
        let profile = self
            .profile(handler)
            .map_err(|violation| Violations(vec![violation]))?;
        let mut reader = Reader {
            config: self,
            profile,
            draft: profile.draft.clone(),
            features: Vec::new(),
            volumes: BTreeMap::new(),
        };
        for key in profile.places.keys().filter_map(|name| keys::find(name)) {
            reader.needs(key);
        }
        let mut violations = Vec::new();
        // In one order, whatever map they come from.
        let annotations: BTreeMap<&str, &str> = annotations.into_iter().collect();
        for (annotation, text) in annotations {
            if let Some(name) = annotation.strip_prefix(PREFIX)
                && let Err(violation) = reader.read(annotation, name, text)
            {
                violations.push(violation);
            }
        }
        if !violations.is_empty() {
            return Err(Violations(violations));
        }
        Ok(Pod {
            settings: reader.draft.settings,
            vcpus: reader.draft.vcpus,
            memory: reader.draft.memory,
            features: reader.features,
            volumes: reader.volumes,
        })
    }
}

struct Reader<'a> {
    config: &'a Config,
    profile: &'a Profile,
    draft: Draft,
    features: Vec<Feature>,
    volumes: BTreeMap<String, VolumeLimits>,
}

impl Reader<'_> {
    fn needs(&mut self, key: &Key) {
        if let Maturity::Experimental(feature) = key.maturity
            && !self.features.contains(&feature)
        {
            self.features.push(feature);
        }
    }

    fn read(&mut self, annotation: &str, name: &str, text: &str) -> Result<(), Violation> {
        let broken = |broken: Broken| Violation::Value {
            place: None,
            key: annotation.to_owned(),
            value: text.to_owned(),
            rule: broken.rule,
            cure: broken.cure,
        };
        let (key, volume) = find(name).ok_or_else(|| unknown(annotation, name))?;
        if !self.profile.annotations().contains(&key) {
            let rule = format!("is not allowed by the profile '{}'", self.profile.name());
            let cure = format!(
                "leave it out, or have the operator add '{}' to the profile's 'annotations'",
                key.name
            );
            return Err(broken(Broken::new(rule, cure)));
        }
        // The configuration was checked for that, but an allowed key says nothing of its feature.
        if let Maturity::Experimental(feature) = key.maturity
            && !self.config.features().contains(&feature)
        {
            let cure = format!("have the operator add '{feature}' to 'features'");
            return Err(broken(Broken::new(experimental(feature), cure)));
        }
        let mut said = Draft::default();
        let raw = key.kind.of_annotation(text);
        let read = key.kind.store(&mut said, &raw);
        read.map_err(|mut all| broken(all.swap_remove(0).1))?;
        match volume {
            Some(volume) => self.limit(volume, &said).map_err(broken)?,
            None => {
                self.allow(&said).map_err(broken)?;
                // As it was read a moment ago, but for parameters, which follow the profile's.
                let before = std::mem::take(&mut self.draft.settings.kernel_parameters);
                let _ = key.kind.store(&mut self.draft, &raw);
                let own = &mut self.draft.settings.kernel_parameters;
                *own = [before, std::mem::take(own)].join(" ").trim().to_owned();
            }
        }
        self.needs(key);
        Ok(())
    }

    /// A volume's limit; the profile's is the most.
    fn limit(&mut self, volume: &str, said: &Draft) -> Result<(), Broken> {
        check_volume(volume)?;
        let most = &self.profile.draft.settings;
        let limits = self.volumes.entry(volume.to_owned()).or_default();
        limits.size = said.volume_size_limit.or(limits.size);
        let said = &said.settings;
        for (said, most, limit) in [
            (said.volume_iops, most.volume_iops, &mut limits.iops),
            (
                said.volume_bandwidth,
                most.volume_bandwidth,
                &mut limits.bandwidth,
            ),
        ] {
            let Some(value) = said else { continue };
            if let Some(most) = most.filter(|most| value > *most) {
                let rule = format!("is more than the profile's {most} per second");
                return Err(Broken::new(rule, "ask for no more than that"));
            }
            *limit = Some(value);
        }
        Ok(())
    }

    /// A value that was read, if the profile lets the pod have it.
    fn allow(&self, said: &Draft) -> Result<(), Broken> {
        let profile = &self.profile.draft.settings;
        if let (Some(own), Some(all)) = (&said.settings.cpus, &profile.cpus)
            && !own.is_subset(all)
        {
            let rule = format!("names CPUs beside the profile's {all}");
            return Err(Broken::new(rule, "name some of these"));
        }
        Ok(())
    }
}

fn check_volume(name: &str) -> Result<(), Broken> {
    let inside = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.'
    };
    if !name.is_empty() && name.len() <= 63 && name.bytes().all(inside) {
        return Ok(());
    }
    let cure = format!("write {PREFIX}{VOLUME}NAME and the limit, with a volume of the pod");
    Err(Broken::new("names no volume", cure))
}

/// The key that an annotation says, and of which volume.
pub(crate) fn find(name: &str) -> Option<(&'static Key, Option<&str>)> {
    if let Some(rest) = name.strip_prefix(VOLUME) {
        let (volume, limit) = rest.rsplit_once('.')?;
        let is_it = |key: &&Key| matches!(key.annotation, Annotation::PerVolume(l) if l == limit);
        return keys::annotated().find(is_it).map(|key| (key, Some(volume)));
    }
    keys::annotated()
        .find(|key| key.annotation == Annotation::Whole && key.name == name)
        .map(|key| (key, None))
}

/// The annotation that says a key.
pub(crate) fn name_of(key: &Key) -> Option<String> {
    match key.annotation {
        Annotation::None => None,
        Annotation::Whole => Some(format!("{PREFIX}{}", key.name)),
        Annotation::PerVolume(limit) => Some(format!("{PREFIX}{VOLUME}NAME.{limit}")),
    }
}

fn unknown(annotation: &str, name: &str) -> Violation {
    // A volume's name is the pod's own: the nearest has the same.
    let volume = name
        .strip_prefix(VOLUME)
        .and_then(|rest| rest.rsplit_once('.'))
        .map_or("NAME", |(volume, _)| volume);
    let known: Vec<String> = keys::annotated()
        .filter_map(name_of)
        .map(|known| known.replace("NAME", volume))
        .collect();
    Violation::unknown(
        None,
        "annotation",
        annotation,
        known.iter().map(String::as_str),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::tests::load, sizing::Policy};

    const ALL: &str = r#"
features = ["cpu-pinning", "kernel-parameters"]
[profiles.pericarp]
annotations = ["vcpus", "memory", "sizing", "hypervisor", "share-cache", "volume-iops",
               "volume-bandwidth", "volume-size-limit", "cpus", "kernel-parameters"]
"#;

    fn pod(config: &str, annotations: &[(&str, &str)]) -> Result<Pod, String> {
        let config = load(config).unwrap();
        let annotations = annotations.iter().copied();
        config
            .pod("pericarp", annotations)
            .map_err(|violations| violations.to_string())
    }

    #[test]
    fn every_key_a_pod_may_say_changes_what_it_says() {
        let pod = pod(
            ALL,
            &[
                ("io.pericarp/vcpus", "3"),
                ("io.pericarp/memory", "3Gi"),
                ("io.pericarp/sizing", "kata"),
                ("io.pericarp/hypervisor", "qemu-tcg"),
                ("io.pericarp/share-cache", "never"),
                ("io.pericarp/volume.data.iops", "500"),
                ("io.pericarp/volume.data.bandwidth", "10M"),
                ("io.pericarp/volume.data.size-limit", "1G"),
                ("io.pericarp/volume.pvc-1.2.iops", "7"),
                ("io.pericarp/cpus", "0-1"),
                ("io.pericarp/kernel-parameters", "a=1"),
                ("io.kubernetes.cri.sandbox-id", "x"),
                ("io.pericarp.vcpus", "not ours"),
            ],
        )
        .unwrap();
        assert_eq!((pod.vcpus, pod.memory), (Some(3), Some(3 << 30)));
        assert_eq!(pod.sizing().policy, Policy::Kata);
        assert_eq!(pod.sizing().vcpus, Some(3));
        assert_eq!(
            pod.settings.hypervisor,
            pericarp_hypervisor::Wanted::QemuTcg
        );
        assert_eq!(pod.settings.share_cache.name(), "never");
        assert_eq!(pod.settings.cpus.as_ref().unwrap().to_string(), "0-1");
        assert_eq!(pod.settings.kernel_parameters, "a=1");
        assert_eq!(pod.features, Feature::ALL);
        let limits = |iops, bandwidth, size| VolumeLimits {
            iops,
            bandwidth,
            size,
        };
        let data = limits(Some(500), Some(10 << 20), Some(1 << 30));
        assert_eq!(pod.volume("data"), data);
        assert_eq!(pod.volume("pvc-1.2"), limits(Some(7), None, None));
        assert_eq!(pod.volume("other"), VolumeLimits::default());
        assert_eq!(pod.named_volumes().collect::<Vec<_>>(), ["data", "pvc-1.2"]);
    }

    #[test]
    fn nothing_is_allowed_by_default() {
        let config = Config::default();
        for key in keys::annotated() {
            let name = name_of(key).unwrap().replace("NAME", "data");
            let refused = config.pod("kata", [(name.as_str(), "1")]).unwrap_err();
            assert_eq!(
                refused.to_string(),
                format!(
                    "{name} '1': is not allowed by the profile 'pericarp'; leave it out, or have \
                     the operator add '{}' to the profile's 'annotations'",
                    key.name
                )
            );
        }
        let pod = config
            .pod("kata", [("io.kubernetes.cri.sandbox-id", "x")])
            .unwrap();
        assert_eq!(pod.settings, Settings::default());
        assert_eq!(pod.features, []);
    }

    #[test]
    fn all_that_is_wrong_is_reported_with_the_key() {
        let refused = pod(
            ALL,
            &[
                ("io.pericarp/vcpu", "3"),
                ("io.pericarp/memory", "64M"),
                ("io.pericarp/sizing", "aks-prevew"),
                ("io.pericarp/vcpus", "1.5"),
                ("io.pericarp/volume.data.iop", "500"),
                ("io.pericarp/volume..iops", "500"),
                ("io.pericarp/volume.A/b.bandwidth", "5M"),
                ("io.pericarp/cpus", "1-"),
                ("io.pericarp/kernel-parameters", "init=/bin/sh"),
                ("io.pericarp/assets", "/etc"),
                ("io.pericarp/", ""),
            ],
        )
        .unwrap_err();
        let volume = "names no volume; write io.pericarp/volume.NAME and the limit, with a volume \
                      of the pod";
        let lines: Vec<&str> = refused.lines().collect();
        assert_eq!(lines.len(), 11, "{refused}");
        for line in [
            "'io.pericarp/vcpu': unknown annotation; did you mean 'io.pericarp/vcpus'?",
            "io.pericarp/memory '64M': is out of range; write a number and a unit, such as 512M \
             or 1.5G, from 128 MiB to 1024 TiB",
            "io.pericarp/sizing 'aks-prevew': is none of its values; did you mean 'aks-preview'?",
            "io.pericarp/vcpus '1.5': is not a whole number; write a whole number from 1 to 255",
            "'io.pericarp/volume.data.iop': unknown annotation; did you mean \
             'io.pericarp/volume.data.iops'?",
            &format!("io.pericarp/volume..iops '500': {volume}"),
            &format!("io.pericarp/volume.A/b.bandwidth '5M': {volume}"),
            "io.pericarp/kernel-parameters 'init=/bin/sh': has 'init=/bin/sh', which the machine's \
             own start depends on; leave it out",
        ] {
            assert!(lines.contains(&line), "{line}\nis not in\n{refused}");
        }
        assert!(
            refused.contains("'io.pericarp/assets': unknown annotation"),
            "{refused}"
        );
    }

    #[test]
    fn a_pod_stays_within_its_profile() {
        let config = r#"
features = ["cpu-pinning", "kernel-parameters"]
[profiles.pericarp]
annotations = ["volume-iops", "volume-bandwidth", "cpus", "kernel-parameters"]
volume-iops = 1000
volume-bandwidth = "10M"
cpus = "2-5"
kernel-parameters = "a b=1"
"#;
        let refused = pod(
            config,
            &[
                ("io.pericarp/volume.data.iops", "1001"),
                ("io.pericarp/volume.data.bandwidth", "11M"),
                ("io.pericarp/cpus", "5-6"),
            ],
        );
        assert_eq!(
            refused.unwrap_err(),
            "io.pericarp/cpus '5-6': names CPUs beside the profile's 2-5; name some of these\n\
             io.pericarp/volume.data.bandwidth '11M': is more than the profile's 10485760 per \
             second; ask for no more than that\n\
             io.pericarp/volume.data.iops '1001': is more than the profile's 1000 per second; ask \
             for no more than that"
        );
        let annotations = [
            ("io.pericarp/volume.data.iops", "100"),
            ("io.pericarp/cpus", "3,5"),
            ("io.pericarp/kernel-parameters", "b=2"),
        ];
        let pod = pod(config, &annotations).unwrap();
        assert_eq!(pod.settings.kernel_parameters, "a b=1 b=2");
        assert_eq!(pod.settings.cpus.as_ref().unwrap().to_string(), "3,5");
        let limits = pod.volume("data");
        assert_eq!((limits.iops, limits.bandwidth), (Some(100), Some(10 << 20)));
        assert_eq!(pod.volume("other").iops, Some(1000));
    }

    #[test]
    fn a_profiles_own_experimental_key_needs_its_feature_in_every_pod() {
        let config = "features = [\"cpu-pinning\"]\n[profiles.pericarp]\ncpus = \"1\"\n";
        assert_eq!(pod(config, &[]).unwrap().features, [Feature::CpuPinning]);
    }

    #[test]
    fn names_fit_into_what_kubernetes_takes() {
        for key in keys::annotated() {
            let name = name_of(key).unwrap();
            let name = name.strip_prefix(PREFIX).unwrap();
            assert!(name.replace("NAME", &"n".repeat(40)).len() <= 63, "{name}");
            let (found, _) = find(&name.replace("NAME", "a.b")).unwrap();
            assert_eq!(found, key);
        }
    }
}
