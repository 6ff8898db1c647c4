//! The table of every policy, absurd limits, and what holds for all of them.

use proptest::prelude::*;

use super::*;

const HOST: Host = Host {
    cpus: 64,
    memory: 512 * GIB,
};

fn resources(milli_cpus: Option<u64>, memory: Option<u64>) -> Resources {
    Resources {
        milli_cpus,
        memory,
        ..Resources::default()
    }
}

fn of(policy: Policy) -> Sizing {
    Sizing {
        policy,
        ..Sizing::default()
    }
}

fn said(sizing: Sizing, resources: &Resources, host: Host) -> String {
    let errors = sizing.machine(resources, host).unwrap_err();
    let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

#[test]
fn the_table_of_every_policy() {
    const M: u64 = MIB;
    const G: u64 = GIB;
    // (limit in thousandths of a CPU, limit in bytes), then for each policy CPUs and bytes.
    type Limits = (Option<u64>, Option<u64>);
    type Size = (u32, u64);
    let cases: [(Limits, Size, Size, Size); 14] = [
        ((None, None), (1, 2 * G), (1, 512 * M), (1, 2 * G)),
        // CPU only.
        ((Some(1000), None), (2, 2 * G), (1, 512 * M), (2, 2 * G)),
        ((Some(500), None), (2, 2 * G), (1, 512 * M), (1, 2 * G)),
        ((Some(1), None), (2, 2 * G), (1, 512 * M), (1, 2 * G)),
        ((Some(800), None), (2, 2 * G), (1, 512 * M), (1, 2 * G)),
        ((Some(801), None), (2, 2 * G), (1, 512 * M), (2, 2 * G)),
        ((Some(1001), None), (3, 2 * G), (2, 512 * M), (2, 2 * G)),
        ((Some(2500), None), (4, 2 * G), (3, 512 * M), (3, 2 * G)),
        // Memory only.
        (
            (None, Some(512 * M)),
            (1, 2560 * M),
            (1, 512 * M),
            (1, 544 * M),
        ),
        (
            (None, Some(128 * M)),
            (1, 2176 * M),
            (1, 128 * M),
            (1, 160 * M),
        ),
        (
            (None, Some(G + 1)),
            (1, 3 * G + M),
            (1, G + M),
            (1, 1057 * M),
        ),
        // Both.
        (
            (Some(1000), Some(2 * G)),
            (2, 4 * G),
            (1, 2 * G),
            (2, 2080 * M),
        ),
        (
            (Some(3250), Some(6 * G)),
            (5, 8 * G),
            (4, 6 * G),
            (4, 6176 * M),
        ),
        (
            (Some(64_000), Some(256 * G)),
            (65, 258 * G),
            (64, 256 * G),
            (65, 256 * G + 32 * M),
        ),
    ];
    for ((cpus, memory), preview, ga, kata) in cases {
        for (policy, (vcpus, bytes)) in [
            (Policy::AksPreview, preview),
            (Policy::AksGa, ga),
            (Policy::Kata, kata),
        ] {
            assert_eq!(
                of(policy).machine(&resources(cpus, memory), HOST),
                Ok(MachineSize {
                    vcpus,
                    memory: bytes
                }),
                "{policy:?}: {cpus:?} thousandths, {memory:?} bytes"
            );
        }
    }
}

#[test]
fn a_limit_in_which_nothing_boots_is_refused_or_raised() {
    let small = resources(None, Some(128 * MIB - 1));
    assert_eq!(
        said(of(Policy::AksGa), &small, HOST),
        "the pod's memory limit is 134217727 bytes, and under 'aks-ga' the machine has no more \
         than that, with its kernel in it; set resources.limits.memory to at least 128 MiB"
    );
    for (bytes, machine) in [(1, 128), (96 << 20, 128), ((96 << 20) + 1, 129)] {
        let size = of(Policy::Kata).machine(&resources(None, Some(bytes)), HOST);
        assert_eq!(size.unwrap().memory, machine * MIB, "{bytes}");
    }
}

#[test]
fn requests_count_only_where_they_are_to_and_the_policy_lets_them() {
    let burstable = Resources {
        milli_cpus_requested: Some(3000),
        ..resources(Some(500), None)
    };
    for (policy, requests, vcpus) in [
        (Policy::Kata, CpuRequests::Ignored, 1),
        (Policy::Kata, CpuRequests::Counted, 4),
        (Policy::AksPreview, CpuRequests::Counted, 2),
        (Policy::AksGa, CpuRequests::Counted, 1),
    ] {
        let sizing = Sizing {
            requests,
            ..of(policy)
        };
        let size = sizing.machine(&burstable, HOST).unwrap();
        assert_eq!(size.vcpus, vcpus, "{policy:?} {requests:?}");
    }
    let sizing = Sizing {
        requests: CpuRequests::Counted,
        ..of(Policy::Kata)
    };
    // A limit above the request is what counts.
    let limited = Resources {
        milli_cpus_requested: Some(500),
        ..resources(Some(2000), None)
    };
    assert_eq!(sizing.machine(&limited, HOST).unwrap().vcpus, 3);
    let host = Host { cpus: 2, ..HOST };
    assert_eq!(
        said(sizing, &burstable, host),
        "the pod's CPU request is 3 CPUs, and this host has 2 CPUs; lower resources.requests.cpu"
    );
}

#[test]
fn what_the_host_does_not_have_is_refused_with_the_numbers() {
    let host = Host {
        cpus: 4,
        memory: 4 * GIB,
    };
    assert_eq!(
        said(
            of(Policy::AksPreview),
            &resources(Some(4001), Some(3 * GIB)),
            host
        ),
        "the pod's CPU limit is 4001m CPUs, and this host has 4 CPUs; lower resources.limits.cpu\n\
         the machine would have 5 GiB, and 4 GiB are allowed (what this host has); lower \
         resources.limits.memory"
    );
    // All of the host, and the guest's own share.
    let size = of(Policy::AksPreview).machine(&resources(Some(4000), Some(2 * GIB)), host);
    assert_eq!(size.unwrap().vcpus, 5);
    let tiny = Host {
        cpus: 1,
        memory: GIB,
    };
    assert_eq!(
        said(of(Policy::AksPreview), &Resources::default(), tiny),
        "the machine would have 2 GiB, and 1 GiB are allowed (what this host has); use a policy \
         with smaller machines, or a larger host"
    );
    // More than there are, on a host that has more.
    let large = Host { cpus: 512, ..HOST };
    assert_eq!(
        said(
            of(Policy::AksPreview),
            &resources(Some(300_000), None),
            large
        ),
        "the machine would have 301 virtual CPUs, and 255 are allowed (what a machine can have); \
         lower resources.limits.cpu"
    );
}

#[test]
fn what_a_pod_names_replaces_the_policys_size_within_bounds() {
    let named = Sizing {
        vcpus: Some(3),
        memory: Some(GIB + 1),
        ..Sizing::default()
    };
    let limits = resources(Some(8000), Some(8 * GIB));
    assert_eq!(
        named.machine(&limits, HOST),
        Ok(MachineSize {
            vcpus: 3,
            memory: GIB + MIB
        })
    );
    let bounded = Sizing {
        max_vcpus: Some(2),
        max_memory: Some(GIB),
        ..named
    };
    assert_eq!(
        said(bounded, &limits, HOST),
        "the machine would have 3 virtual CPUs, and 2 are allowed (max-vcpus); lower the \
         annotation for vcpus\n\
         the machine would have 1025 MiB, and 1 GiB are allowed (max-memory); lower the annotation \
         for memory"
    );
    let host = Host { cpus: 2, ..HOST };
    assert_eq!(
        said(named, &Resources::default(), host),
        "the machine would have 3 virtual CPUs, and 2 are allowed (what this host has); lower the \
         annotation for vcpus"
    );
}

#[test]
fn names_are_read_as_they_are_written() {
    for name in Policy::NAMES {
        assert_eq!(Policy::parse(name).map(Policy::name), Some(name));
    }
    for name in CpuRequests::NAMES {
        assert_eq!(CpuRequests::parse(name).map(CpuRequests::name), Some(name));
    }
    assert_eq!(Policy::parse("AKS-GA"), None);
}

fn policies() -> impl Strategy<Value = Policy> {
    prop::sample::select(vec![Policy::AksPreview, Policy::AksGa, Policy::Kata])
}

fn any_resources() -> impl Strategy<Value = Resources> {
    let amount = || prop::option::of(prop_oneof![0..100_000u64, 0..=64 * GIB, any::<u64>()]);
    (amount(), amount(), amount()).prop_map(|(milli_cpus, milli_cpus_requested, memory)| {
        Resources {
            milli_cpus,
            milli_cpus_requested,
            memory,
        }
    })
}

proptest! {
    /// Whatever is asked for, a machine is one that can be made, holds its containers' limits, and
    /// is not larger than allowed; or there is a reason.
    #[test]
    fn a_machine_is_possible_and_sufficient(
        policy in policies(),
        counted in any::<bool>(),
        resources in any_resources(),
        max_vcpus in prop::option::of(1..300u32),
        max_memory in prop::option::of(0..=64 * GIB),
    ) {
        let sizing = Sizing {
            requests: if counted { CpuRequests::Counted } else { CpuRequests::Ignored },
            max_vcpus,
            max_memory,
            ..of(policy)
        };
        let Ok(size) = sizing.machine(&resources, HOST) else { return Ok(()) };
        prop_assert!((1..=255).contains(&size.vcpus));
        prop_assert!(size.memory >= MIN_MEMORY && size.memory.is_multiple_of(MEMORY_UNIT));
        prop_assert!(size.memory <= HOST.memory.min(max_memory.unwrap_or(u64::MAX)));
        prop_assert!(size.vcpus <= max_vcpus.unwrap_or(u32::MAX));
        prop_assert!(u64::from(size.vcpus) * 1000 >= resources.milli_cpus.unwrap_or(0));
        prop_assert!(size.memory >= resources.memory.unwrap_or(0));
        prop_assert!(size.memory >= policy.least_memory());
    }

    /// More limits never make a smaller machine, and AKS's policies do not look at requests.
    #[test]
    fn sizes_grow_with_limits(
        policy in policies(),
        cpus in (0..=64_000u64, 0..=64_000u64),
        memory in (128 * MIB..=64 * GIB, 128 * MIB..=64 * GIB),
        requested in prop::option::of(0..=64_000u64),
    ) {
        let size = |milli, bytes, milli_cpus_requested| {
            let resources = Resources { milli_cpus_requested, ..resources(Some(milli), Some(bytes)) };
            let sizing = Sizing { requests: CpuRequests::Counted, ..of(policy) };
            sizing.machine(&resources, HOST).unwrap()
        };
        let small = size(cpus.0.min(cpus.1), memory.0.min(memory.1), requested);
        let large = size(cpus.0.max(cpus.1), memory.0.max(memory.1), requested);
        prop_assert!(small.vcpus <= large.vcpus && small.memory <= large.memory);
        if policy != Policy::Kata {
            prop_assert_eq!(size(cpus.0, memory.0, requested), size(cpus.0, memory.0, None));
        }
    }
}
