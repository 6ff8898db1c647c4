//! What the guest sees of the machine that it is in, for `pericarp verify`.

use std::{arch::x86_64::__cpuid, fs};

use pericarp_api::agent::{FactsResponse, GuestProcess};

/// CPUID leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const MOST_PROCESSES: usize = 512;
/// Of the kernel's threads, which are no processes.
const KTHREADD: u32 = 2;

pub(crate) fn collect() -> FactsResponse {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let count = cpus.lines().filter(|line| line.starts_with("processor"));
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let has_hypervisor = __cpuid(1).ecx & HYPERVISOR != 0;
    FactsResponse {
        kernel_release: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        boot_id: boot.unwrap_or_default().trim().to_owned(),
        has_hypervisor,
        hypervisor: if has_hypervisor {
            vendor()
        } else {
            String::new()
        },
        cpu_model: model
            .unwrap_or_default()
            .trim_start_matches([' ', '\t', ':'])
            .to_owned(),
        cpus: u32::try_from(count.count()).unwrap_or(u32::MAX),
        processes: processes(),
        ..FactsResponse::default()
    }
}

/// Twelve letters.
fn vendor() -> String {
    let leaf = __cpuid(HYPERVISOR_LEAF);
    let bytes = [leaf.ebx, leaf.ecx, leaf.edx]
        .map(u32::to_le_bytes)
        .concat();
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}

fn processes() -> Vec<GuestProcess> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = entries.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        // It may have ended meanwhile.
        let (name, parent) = name_and_parent(&fs::read_to_string(entry.path().join("stat")).ok()?)?;
        let is_kernels = pid == KTHREADD || parent == KTHREADD;
        (!is_kernels).then(|| GuestProcess {
            pid,
            parent,
            name,
            ..GuestProcess::default()
        })
    });
    all.take(MOST_PROCESSES).collect()
}

/// Of a line of /proc/PID/stat. A name may have brackets and blanks.
fn name_and_parent(stat: &str) -> Option<(String, u32)> {
    let (begin, end) = (stat.find('(')?, stat.rfind(')')?);
    let mut rest = stat.get(end + 1..)?.split_whitespace();
    let parent = rest.nth(1)?.parse().ok()?;
    Some((stat.get(begin + 1..end)?.to_owned(), parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_have_anything_in_it() {
        let read = |stat| name_and_parent(stat);
        assert_eq!(read("7 (sh) S 1 7 7"), Some(("sh".into(), 1)));
        assert_eq!(read("7 (a) b) S 3 7"), Some(("a) b".into(), 3)));
        assert_eq!(read("7 sh S 1"), None);
        assert_eq!(read(") ("), None);
    }

    #[test]
    fn facts_are_of_this_machine() {
        let facts = collect();
        assert!(!facts.kernel_release.is_empty() && facts.boot_id.len() == 36);
        assert!(facts.cpus > 0);
        let own = std::process::id();
        assert!(facts.processes.iter().any(|one| one.pid == own));
    }
}
