//! From a manifest's requests and limits to what Linux is told. Called by `sandbox` and
//! `container`.

use std::cmp::max;
use std::collections::BTreeMap;

use super::quantity::Quantity;
use super::spec::{Container, Pod};
use crate::cri::proto::LinuxContainerResources;

/// The time that a quota is of, in microseconds.
const PERIOD: i64 = 100_000;
/// The kernel takes no smaller quota.
const LEAST_QUOTA: i64 = 1000;
/// Nor fewer shares, and no more.
const SHARES: (i64, i64) = (2, 262_144);

/// How sure a pod is of its resources, which says who goes first when memory is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quality {
    /// It has limits for all, and asks for all of that.
    Guaranteed,
    /// It asks for something.
    Burstable,
    /// It says nothing.
    BestEffort,
}

impl Quality {
    /// As `status.qosClass` has it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }

    /// The class of a pod. Only CPU and memory count, of all containers.
    pub(super) fn of(pod: &Pod) -> Self {
        let mut anything = false;
        let mut everything = true;
        for container in pod.all_containers() {
            for name in ["cpu", "memory"] {
                let limit = amount(&container.resources.limits, name);
                let asked = amount(&container.resources.requests, name);
                anything |= limit.is_some() || asked.is_some();
                everything &= limit.is_some() && asked.is_none_or(|asked| Some(asked) == limit);
            }
        }
        match (anything, everything) {
            (false, _) => Self::BestEffort,
            (true, true) => Self::Guaranteed,
            (true, false) => Self::Burstable,
        }
    }
}

fn amount(of: &BTreeMap<String, Quantity>, name: &str) -> Option<Quantity> {
    of.get(name).copied().filter(|amount| !amount.is_zero())
}

/// What a container asks for; its limit where it says only that.
fn request(container: &Container, name: &str) -> Option<Quantity> {
    let resources = &container.resources;
    amount(&resources.requests, name).or_else(|| amount(&resources.limits, name))
}

/// How early the kernel is to kill a container, on a node of so many bytes.
pub(super) fn oom_score(pod: &Pod, container: &Container, node: Quantity) -> i64 {
    match Quality::of(pod) {
        Quality::Guaranteed => -997,
        Quality::BestEffort => 1000,
        // The more of the node's memory it asks for, the later; never before or after the others.
        Quality::Burstable => {
            let asked = request(container, "memory").unwrap_or_default().value();
            let part = i128::from(asked) * 1000 / i128::from(node.value().max(1));
            i64::try_from(1000 - part).unwrap_or(3).clamp(3, 999)
        }
    }
}

/// What Linux is told of a container.
pub(super) fn linux(pod: &Pod, container: &Container, node: Quantity) -> LinuxContainerResources {
    let limits = &container.resources.limits;
    let mut linux = of(
        request(container, "cpu"),
        amount(limits, "cpu"),
        amount(limits, "memory"),
    );
    linux.oom_score_adj = oom_score(pod, container, node);
    linux
}

/// The sum of a pod's containers, by which a machine for it is sized.
pub(super) fn of_pod(pod: &Pod) -> LinuxContainerResources {
    let limit = |name: &str| together(pod, |one| amount(&one.resources.limits, name));
    let asked = together(pod, |one| request(one, "cpu"));
    of(asked, limit("cpu"), limit("memory"))
}

/// What the runtime itself takes, as the class says it.
pub(super) fn overhead(said: &BTreeMap<String, Quantity>) -> Option<LinuxContainerResources> {
    if said.is_empty() {
        return None;
    }
    let cpu = amount(said, "cpu");
    Some(of(cpu, cpu, amount(said, "memory")))
}

/// The most that containers have at one time: those that run together, or one of those that come
/// first, beside the sidecars that were started before it.
fn together(pod: &Pod, of: impl Fn(&Container) -> Option<Quantity>) -> Option<Quantity> {
    let mut said = false;
    let mut take = |container: &Container| {
        let amount = of(container);
        said |= amount.is_some();
        amount.unwrap_or_default()
    };
    let mains: Quantity = pod.spec.containers.iter().map(&mut take).sum();
    let (mut sidecars, mut first) = (Quantity::default(), Quantity::default());
    for container in &pod.spec.init_containers {
        let amount = take(container);
        if container.is_sidecar() {
            sidecars = sidecars + amount;
            first = max(first, sidecars);
        } else {
            first = max(first, sidecars + amount);
        }
    }
    said.then_some(max(mains + sidecars, first))
}

fn of(
    asked: Option<Quantity>,
    cpu: Option<Quantity>,
    memory: Option<Quantity>,
) -> LinuxContainerResources {
    let mut linux = LinuxContainerResources::new();
    let shares = asked.unwrap_or_default().milli().saturating_mul(1024) / 1000;
    linux.cpu_shares = shares.clamp(SHARES.0, SHARES.1);
    linux.cpu_period = PERIOD;
    if let Some(cpu) = cpu {
        linux.cpu_quota = (cpu.milli().saturating_mul(PERIOD) / 1000).max(LEAST_QUOTA);
    }
    linux.memory_limit_in_bytes = memory.unwrap_or_default().value();
    linux
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(spec: Value) -> Pod {
        Pod::read(&json!({"spec": spec})).unwrap()
    }

    fn one(resources: Value) -> Pod {
        pod(json!({"containers": [{"name": "c", "resources": resources}]}))
    }

    #[test]
    fn classes() {
        for (resources, quality) in [
            (json!({}), Quality::BestEffort),
            (json!({"requests": {"cpu": "1"}}), Quality::Burstable),
            (json!({"limits": {"memory": "1Gi"}}), Quality::Burstable),
            (
                json!({"limits": {"memory": "1Gi", "cpu": 1}}),
                Quality::Guaranteed,
            ),
            (
                json!({"limits": {"memory": "1Gi", "cpu": 1}, "requests": {"cpu": "500m"}}),
                Quality::Burstable,
            ),
            (
                json!({"limits": {"ephemeral-storage": "1Gi"}}),
                Quality::BestEffort,
            ),
        ] {
            assert_eq!(Quality::of(&one(resources.clone())), quality, "{resources}");
        }
    }

    #[test]
    fn the_kernel_is_told() {
        let node = Quantity::whole(4 << 30);
        let linux = |resources: Value| {
            let pod = one(resources);
            let all = super::linux(&pod, &pod.spec.containers[0], node);
            let cpu = (all.cpu_shares, all.cpu_quota);
            (cpu, all.memory_limit_in_bytes, all.oom_score_adj)
        };
        assert_eq!(linux(json!({})), ((2, 0), 0, 1000));
        let both = json!({"limits": {"cpu": "500m", "memory": "128Mi"}});
        assert_eq!(linux(both), ((512, 50_000), 128 << 20, -997));
        let asked = json!({"limits": {"cpu": "2"}, "requests": {"cpu": "1m", "memory": "1Gi"}});
        assert_eq!(linux(asked), ((2, 200_000), 0, 750));
        let little = json!({"limits": {"cpu": "1m"}});
        assert_eq!(linux(little), ((2, 1000), 0, 999));
    }

    #[test]
    fn a_pod_is_the_most_of_its_containers_at_one_time() {
        let limits = |cpu: &str| json!({"limits": {"cpu": cpu}});
        let pod = pod(json!({
            "initContainers": [
                {"name": "a", "resources": limits("4")},
                {"name": "s", "restartPolicy": "Always", "resources": limits("1")},
                {"name": "b", "resources": limits("2")},
            ],
            "containers": [
                {"name": "c", "resources": limits("1")},
                {"name": "d", "resources": limits("500m")},
            ],
        }));
        assert_eq!(of_pod(&pod).cpu_quota, 400_000);
        assert_eq!(of_pod(&pod).memory_limit_in_bytes, 0);
        assert_eq!(overhead(&BTreeMap::new()), None);
        let said = BTreeMap::from([("memory".to_owned(), "160Mi".parse().unwrap())]);
        assert_eq!(overhead(&said).unwrap().memory_limit_in_bytes, 160 << 20);
    }
}
