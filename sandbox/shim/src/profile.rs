//! How a pod runs: what the operator has configured of its handler (`pericarp-config`), what the pod
//! says of its own, and how large that makes its machine.
//!
//! Asked by `pod` before anything is made. What is wrong refuses the pod with all of it.

use std::ops::RangeInclusive;

use containerd_shim_protos::api::CreateTaskRequest;
use pericarp_config::{
    Config, ConfigPath, CpuSet, Pod,
    feature::FeatureFile,
    sizing::{CPU_PERIOD, CPU_QUOTA, CPU_SHARES, Host, MEMORY, MachineSize, Resources},
};
use protobuf::{CodedInputStream, rt::WireType};

use crate::{
    bundle::{Bundle, Kind, refused},
    error::{ShimError, during},
    lanes::{self, Lane},
    pinned,
};

const ONLINE: &str = "/sys/devices/system/cpu/online";
/// `runtimeoptions.v1.Options`: what containerd makes of a runtime's options that it does not know.
const OPTIONS: &str = "runtimeoptions.v1.Options";
const CONFIG_PATH: u32 = 2;

/// What holds for one pod.
#[derive(Debug, Clone)]
pub(crate) struct Profile {
    pub(crate) pod: Pod,
    pub(crate) size: MachineSize,
    /// Shares of their own for volumes with limits.
    pub(crate) lanes: Vec<Lane>,
}

/// What holds for the pod of this container, which is its first.
pub(crate) fn of(request: &CreateTaskRequest, bundle: &Bundle) -> Result<Profile, ShimError> {
    let options = request.options.as_ref();
    let named = options.map(|any| config_path(&any.type_url, &any.value));
    let place = ConfigPath::parse(&named.transpose()?.unwrap_or_default()).map_err(invalid)?;
    let config = Config::load(place.path.as_deref()).map_err(invalid)?;
    let pod = config
        .pod(&place.handler, annotations(bundle))
        .map_err(invalid)?;
    FeatureFile::in_directory(config.state_directory())
        .require(&pod.features)
        .map_err(|all| invalid(lines(&all)))?;
    let online = std::fs::read_to_string(ONLINE).map_err(during(ONLINE))?;
    let online = online.trim();
    if let Some(cpus) = &pod.settings.cpus {
        check_cpus(cpus, online)?;
    }
    let lanes = lanes::plan(&pod)?;
    let resources = resources(bundle)?;
    let size = pod.sizing().machine(&resources, host(online)?);
    Ok(Profile {
        size: size.map_err(|all| invalid(lines(&all)))?,
        lanes,
        pod,
    })
}

fn invalid(error: impl ToString) -> ShimError {
    ShimError::Invalid(error.to_string())
}

fn lines(errors: &[impl ToString]) -> String {
    let all: Vec<String> = errors.iter().map(ToString::to_string).collect();
    all.join("; ")
}

fn annotations(bundle: &Bundle) -> impl Iterator<Item = (&str, &str)> {
    let all = bundle.spec["annotations"].as_object();
    all.into_iter()
        .flatten()
        .filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)))
}

/// The sums of a pod's limits as containerd has them from a kubelet, or the limits of a container
/// without a pod.
fn resources(bundle: &Bundle) -> Result<Resources, ShimError> {
    let read = match bundle.kind() {
        Kind::Sandbox | Kind::Member => Resources::read(annotations(bundle)),
        Kind::Single => {
            let resources = &bundle.spec["linux"]["resources"];
            let said = [
                (CPU_QUOTA, &resources["cpu"]["quota"]),
                (CPU_PERIOD, &resources["cpu"]["period"]),
                (CPU_SHARES, &resources["cpu"]["shares"]),
                (MEMORY, &resources["memory"]["limit"]),
            ];
            let said = said.map(|(name, value)| (name, value.as_i64().unwrap_or(0).to_string()));
            Resources::read(said.iter().map(|(name, value)| (*name, value.as_str())))
        }
    };
    read.map_err(|all| invalid(lines(&all)))
}

/// All CPUs that a pod is to run on must be there.
fn check_cpus(cpus: &CpuSet, online: &str) -> Result<(), ShimError> {
    let all = ranges(online).unwrap_or_default();
    let is_there = |cpu: &u32| all.iter().any(|range| range.contains(cpu));
    match cpus.iter().find(|cpu| !is_there(cpu)) {
        None => Ok(()),
        Some(cpu) => {
            let rule = format!("this host has no CPU {cpu}; name some of {online}");
            Err(refused(&pinned::field(cpus), &rule))
        }
    }
}

fn host(online: &str) -> Result<Host, ShimError> {
    let memory = rustix::system::sysinfo();
    Ok(Host {
        cpus: count(online).ok_or_else(|| invalid(format!("{ONLINE}: is no list")))?,
        // Of the width of a machine word.
        #[allow(clippy::useless_conversion, reason = "it is 32 bits wide elsewhere")]
        memory: u64::from(memory.totalram).saturating_mul(memory.mem_unit.into()),
    })
}

/// How many there are in a list of CPUs.
fn count(list: &str) -> Option<u32> {
    let mut lengths = ranges(list)?.into_iter().map(|range| {
        let (first, last) = range.into_inner();
        (last - first).checked_add(1)
    });
    lengths.try_fold(0u32, |sum, length| sum.checked_add(length?))
}

/// What is in a list as the kernel writes it: `0-3,7`.
fn ranges(list: &str) -> Option<Vec<RangeInclusive<u32>>> {
    let parts = list.split(',').map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last).then_some(first..=last)
    });
    parts.collect()
}

/// The one field of the options that is of use, decoded by hand: two lines in place of a file and a
/// generator.
fn config_path(kind: &str, bytes: &[u8]) -> Result<String, ShimError> {
    if !kind.ends_with(OPTIONS) {
        let rule = format!("the options of the runtime are {kind}, and {OPTIONS} are ours");
        return Err(refused("options", &rule));
    }
    let broken = |error: protobuf::Error| refused("options", &error.to_string());
    let mut path = String::new();
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(broken)? {
        let (field, wire) = (tag >> 3, WireType::new(tag & 7));
        let wire = wire.ok_or_else(|| refused("options", "are no message"))?;
        match (field, wire) {
            (CONFIG_PATH, WireType::LengthDelimited) => {
                path = input.read_string().map_err(broken)?
            }
            _ => input.skip_field(wire).map_err(broken)?,
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use protobuf::{MessageField, well_known_types::any::Any};
    use serde_json::json;

    use super::*;

    fn request(path: &str) -> CreateTaskRequest {
        // type_url, config_path, and something that only a later version knows.
        let mut bytes = vec![0x0a, 1, b'x', 0x12, u8::try_from(path.len()).unwrap()];
        bytes.extend(path.as_bytes());
        bytes.extend([0x20, 7]);
        CreateTaskRequest {
            options: MessageField::some(Any {
                type_url: "runtimeoptions.v1.Options".into(),
                value: bytes,
                ..Any::default()
            }),
            ..CreateTaskRequest::default()
        }
    }

    fn bundle(annotations: &[(&str, &str)]) -> Bundle {
        let mut all = json!({"io.kubernetes.cri.container-type": "sandbox"});
        for (name, value) in annotations {
            all[name] = json!(value);
        }
        Bundle {
            path: "/b".into(),
            spec: json!({ "annotations": all }),
        }
    }

    #[test]
    fn a_pod_has_what_its_handler_and_itself_say() {
        let name = format!("pericarp-profile-{}.toml", std::process::id());
        let file = std::env::temp_dir().join(name);
        fs::write(
            &file,
            "[profiles.small]\nsizing = \"aks-ga\"\nannotations = [\"memory\"]\n",
        )
        .unwrap();
        let small = request(&format!("{}#small", file.display()));
        let mib = |profile: Result<Profile, ShimError>| profile.unwrap().size.memory >> 20;
        assert_eq!(mib(of(&small, &bundle(&[]))), 512);
        let said = bundle(&[("io.pericarp/memory", "256M")]);
        assert_eq!(mib(of(&small, &said)), 256);
        let limited = bundle(&[(MEMORY, "268435456"), (CPU_QUOTA, "50000")]);
        assert_eq!(mib(of(&small, &limited)), 256);
        // The profile that is always there allows nothing, and adds 2 GiB.
        let usual = request(&file.display().to_string());
        let error = of(&usual, &said).unwrap_err().to_string();
        assert!(error.contains("is not allowed by the profile"), "{error}");
        let error = of(&request("/no/where.toml"), &said).unwrap_err();
        assert!(error.to_string().contains("does not exist"), "{error}");
        fs::write(&file, "[profiles.small]\nvolume-iops = 5\n").unwrap();
        assert!(!of(&small, &bundle(&[])).unwrap().lanes.is_empty());
        fs::remove_file(file).unwrap();
    }

    #[test]
    fn options_of_another_runtime_are_refused() {
        let mut request = request("/x");
        request.options.mut_or_insert_default().type_url = "runc.Options".into();
        let error = of(&request, &bundle(&[])).unwrap_err().to_string();
        assert!(error.starts_with("options: "), "{error}");
    }

    #[test]
    fn a_container_without_a_pod_has_its_own_limits() {
        let limits =
            json!({"cpu": {"quota": 150_000, "period": 100_000}, "memory": {"limit": 4096}});
        let bundle = Bundle {
            path: "/b".into(),
            spec: json!({"linux": {"resources": limits}}),
        };
        let resources = resources(&bundle).unwrap();
        assert_eq!(resources.milli_cpus, Some(1500));
        assert_eq!(resources.memory, Some(4096));
    }

    #[test]
    fn cpus_are_counted() {
        for (list, cpus) in [
            ("0", Some(1)),
            ("0-3,7", Some(5)),
            ("", None),
            ("3-0", None),
        ] {
            assert_eq!(count(list), cpus, "{list}");
        }
        assert!(host("0").unwrap().memory > 1 << 20);
    }
}
