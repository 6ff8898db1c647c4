//! A container's numbers in the form that containerd reads: those of a control group of version 2.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use pericarp_api::agent::StatsResponse;
use protobuf::{Message, MessageField, well_known_types::any::Any};

use crate::error::ShimError;

/// The name by which containerd knows them, which is not the message's own.
const NAME: &str = "io.containerd.cgroups.v2.Metrics";

/// The numbers of the container, or of the machine where there is none in the answer.
pub(crate) fn pack(answer: &StatsResponse) -> Result<Any, ShimError> {
    let metrics = match answer.container.as_ref() {
        Some(container) => Metrics {
            pids: MessageField::some(PidsStat {
                current: container.processes,
                limit: container.processes_limit,
                ..PidsStat::default()
            }),
            cpu: MessageField::some(CPUStat {
                usage_usec: container.cpu_usec,
                user_usec: container.cpu_user_usec,
                system_usec: container.cpu_system_usec,
                nr_periods: container.cpu_periods,
                nr_throttled: container.cpu_throttled_periods,
                throttled_usec: container.cpu_throttled_usec,
                ..CPUStat::default()
            }),
            memory: MessageField::some(MemoryStat {
                usage: container.memory_bytes,
                // None is the largest number there.
                usage_limit: match container.memory_limit {
                    0 => u64::MAX,
                    limit => limit,
                },
                inactive_file: container.memory_inactive_file,
                anon: container.memory_anonymous,
                file: container.memory_file,
                pgfault: container.page_faults,
                pgmajfault: container.major_page_faults,
                ..MemoryStat::default()
            }),
            memory_events: MessageField::some(MemoryEvents {
                oom_kill: container.oom_kills,
                ..MemoryEvents::default()
            }),
            ..Metrics::default()
        },
        None => Metrics {
            pids: MessageField::some(PidsStat::default()),
            cpu: MessageField::some(CPUStat::default()),
            memory: MessageField::some(MemoryStat {
                usage: answer.memory_total.saturating_sub(answer.memory_available),
                usage_limit: answer.memory_total,
                ..MemoryStat::default()
            }),
            ..Metrics::default()
        },
    };
    let value = metrics
        .write_to_bytes()
        .map_err(|error| ShimError::Machine(error.to_string()))?;
    Ok(Any {
        type_url: NAME.to_owned(),
        value,
        ..Any::default()
    })
}
