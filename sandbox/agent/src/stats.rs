//! Numbers about this program, the machine and a container.

use std::fs;

use pericarp_api::agent::{ContainerStats, StatsResponse};

use crate::cgroup::{Group, kib_line, memory_info};

/// The numbers as they are now.
pub(crate) fn collect(group: Option<&Group>) -> StatsResponse {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let threads = status
        .lines()
        .find_map(|line| line.strip_prefix("Threads:")?.trim().parse().ok());
    // The directory that is read is open itself.
    let files =
        fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1));
    StatsResponse {
        agent_rss: kib_line(&status, "VmRSS:"),
        agent_open_files: files as u64,
        agent_threads: threads.unwrap_or(0),
        memory_total: memory_info("MemTotal:"),
        memory_available: memory_info("MemAvailable:"),
        container: group.map(container).into(),
        ..StatsResponse::default()
    }
}

fn container(group: &Group) -> ContainerStats {
    ContainerStats {
        memory_bytes: group.number("memory.current"),
        cpu_usec: group.cpu_stat("usage_usec"),
        cpu_throttled_usec: group.cpu_stat("throttled_usec"),
        processes: group.number("pids.current"),
        oom_kills: group.oom_kills(),
        memory_limit: group.number("memory.max"),
        memory_inactive_file: group.memory_stat("inactive_file"),
        memory_anonymous: group.memory_stat("anon"),
        memory_file: group.memory_stat("file"),
        page_faults: group.memory_stat("pgfault"),
        major_page_faults: group.memory_stat("pgmajfault"),
        cpu_user_usec: group.cpu_stat("user_usec"),
        cpu_system_usec: group.cpu_stat("system_usec"),
        cpu_periods: group.cpu_stat("nr_periods"),
        cpu_throttled_periods: group.cpu_stat("nr_throttled"),
        processes_limit: group.number("pids.max"),
        ..ContainerStats::default()
    }
}
