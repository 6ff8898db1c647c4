//! Shares of their own for volumes that may not do as much as they like: all that a pod is shown
//! otherwise comes through one share, whose limit would be that of all volumes and roots together.
//!
//! Planned by `profile`, made by `machine` at boot, since a machine's shares are there from the
//! start; given to volumes by `volumes`. One is for the volume that the pod names, or, where the
//! profile limits every volume, for whichever comes.

use std::path::{Path, PathBuf};

use pericarp_config::Pod;
use pericarp_pod::sidecar::Limits;

use crate::{bundle::refused, error::ShimError};

/// A machine has places for so many beside the pod's own share.
const MOST: usize = 16;
/// How many volumes of a pod may be limited by its profile alone.
const UNNAMED: usize = 8;

/// A share for a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lane {
    /// None: for a volume that has no limits of its own.
    pub(crate) name: Option<String>,
    pub(crate) limits: Limits,
}

/// The tag of the share with this number.
pub(crate) fn tag(lane: usize) -> String {
    format!("volume{}", lane + 1)
}

/// Those that a pod needs.
pub(crate) fn plan(pod: &Pod) -> Result<Vec<Lane>, ShimError> {
    let mut lanes = Vec::new();
    for name in pod.named_volumes() {
        let limits = limits(pod, name);
        if limits != Limits::default() {
            lanes.push(Lane {
                name: Some(name.to_owned()),
                limits,
            });
        }
    }
    if lanes.len() > MOST {
        let rule = format!(
            "{} volumes have limits, and a pod has at most {MOST} such volumes: leave some out",
            lanes.len()
        );
        return Err(refused("io.pericarp/volume.NAME", &rule));
    }
    let usual = Limits {
        iops: pod.settings.volume_iops,
        bandwidth: pod.settings.volume_bandwidth,
    };
    if usual != Limits::default() {
        let more = UNNAMED.min(MOST - lanes.len());
        lanes.extend((0..more).map(|_| Lane {
            name: None,
            limits: usual,
        }));
    }
    Ok(lanes)
}

/// What a volume of this name may do.
pub(crate) fn limits(pod: &Pod, name: &str) -> Limits {
    let limits = pod.volume(name);
    Limits {
        iops: limits.iops,
        bandwidth: limits.bandwidth,
    }
}

/// Which volumes have which.
#[derive(Debug, Default)]
pub(crate) struct Taken(Vec<Option<(PathBuf, usize)>>);

impl Taken {
    /// The lane for a volume of this name at this place, to be given back; none where it has no
    /// limits.
    pub(crate) fn take(
        &mut self,
        lanes: &[Lane],
        name: &str,
        place: &Path,
    ) -> Result<Option<usize>, ShimError> {
        let own = |lane: &Lane| lane.name.as_deref() == Some(name);
        if let Some(lane) = lanes.iter().position(own) {
            return Ok(Some(lane));
        }
        if lanes.iter().all(|lane| lane.name.is_some()) {
            return Ok(None);
        }
        self.0.resize(lanes.len(), None);
        let has = |taken: &Option<(PathBuf, usize)>| {
            taken.as_ref().is_some_and(|(other, _)| other == place)
        };
        if let Some(lane) = self.0.iter().position(has) {
            if let Some((_, users)) = &mut self.0[lane] {
                *users += 1;
            }
            return Ok(Some(lane));
        }
        for (lane, taken) in self.0.iter_mut().enumerate() {
            if lanes[lane].name.is_none() && taken.is_none() {
                *taken = Some((place.to_owned(), 1));
                return Ok(Some(lane));
            }
        }
        let rule = format!(
            "the profile limits each volume, and {UNNAMED} of the pod have theirs already: name \
             others in the pod's annotations, or mount fewer"
        );
        Err(refused(&format!("mounts: {}", place.display()), &rule))
    }

    /// A volume needs its lane no more.
    pub(crate) fn give_back(&mut self, lane: usize) {
        if let Some(taken) = self.0.get_mut(lane)
            && let Some((_, users)) = taken
        {
            *users -= 1;
            if *users == 0 {
                *taken = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pericarp_config::Config;

    use super::*;

    fn pod(test: &str, profile: &str, annotations: &[(&str, &str)]) -> Pod {
        let name = format!("pericarp-lanes-{test}-{}.toml", std::process::id());
        let file = std::env::temp_dir().join(name);
        let text = format!(
            "[profiles.pericarp]\nannotations = [\"volume-iops\", \"volume-size-limit\"]\n{profile}"
        );
        std::fs::write(&file, text).unwrap();
        let config = Config::load(Some(&file)).unwrap();
        std::fs::remove_file(file).unwrap();
        let annotations = annotations.iter().copied();
        config.pod("pericarp", annotations).unwrap()
    }

    #[test]
    fn a_volume_with_limits_has_a_share_of_its_own() {
        let pod = pod(
            "own",
            "",
            &[
                ("io.pericarp/volume.data.iops", "500"),
                ("io.pericarp/volume.held.size-limit", "5M"),
            ],
        );
        let lanes = plan(&pod).unwrap();
        let limits = Limits {
            iops: Some(500),
            bandwidth: None,
        };
        let lane = Lane {
            name: Some("data".into()),
            limits,
        };
        assert_eq!(lanes, [lane]);
        let mut taken = Taken::default();
        let mut take = |name: &str| taken.take(&lanes, name, Path::new("/x")).unwrap();
        assert_eq!(
            (take("data"), take("data"), take("other")),
            (Some(0), Some(0), None)
        );
        taken.give_back(0);
    }

    #[test]
    fn a_profile_limits_whichever_volumes_there_are() {
        let pod = pod(
            "each",
            "volume-iops = 1000\n",
            &[("io.pericarp/volume.data.iops", "500")],
        );
        let lanes = plan(&pod).unwrap();
        assert_eq!(lanes.len(), 1 + UNNAMED);
        let mut taken = Taken::default();
        let mut take = |name: &str, place: usize| {
            let place = format!("/volumes/{place}");
            taken.take(&lanes, name, Path::new(&place))
        };
        assert_eq!(take("data", 0).unwrap(), Some(0));
        for place in 1..=UNNAMED {
            assert_eq!(take("other", place).unwrap(), Some(place));
        }
        assert_eq!(take("other", 3).unwrap(), Some(3));
        let error = take("other", 99).unwrap_err().to_string();
        assert!(
            error.starts_with("mounts: /volumes/99: the profile limits each"),
            "{error}"
        );
        taken.give_back(3);
        assert!(taken.take(&lanes, "x", Path::new("/y")).is_err());
        taken.give_back(3);
        assert_eq!(taken.take(&lanes, "x", Path::new("/y")).unwrap(), Some(3));
    }

    #[test]
    fn more_than_a_machine_has_places_for_are_refused() {
        let names: Vec<String> = (0..=MOST)
            .map(|number| format!("io.pericarp/volume.v{number}.iops"))
            .collect();
        let all: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "5")).collect();
        let error = plan(&pod("many", "", &all)).unwrap_err().to_string();
        assert!(
            error.starts_with("io.pericarp/volume.NAME: 17 volumes"),
            "{error}"
        );
        assert_eq!(plan(&pod("most", "", &all[1..])).unwrap().len(), MOST);
    }
}
