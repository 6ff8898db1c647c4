//! Rates, bursts and turns of the limiter, in made-up time.

use super::*;

fn gates(limits: Limits, count: usize) -> Vec<Gate> {
    let oversight = Arc::new(Oversight::default());
    oversight.lanes[0].set(&limits, 0);
    (0..count)
        .map(|_| Gate::new(Arc::clone(&oversight), 0))
        .collect()
}

/// Every gate always has a request of so many bytes waiting, and its worker
/// sleeps as told and is late by `late`. Requests of each until `end`.
fn saturate(gates: &mut [Gate], bytes: &[u64], late: u64, end: u64) -> Vec<u64> {
    let mut wakes = vec![0u64; gates.len()];
    let mut done = vec![0u64; gates.len()];
    loop {
        let next = (0..gates.len()).min_by_key(|n| wakes[*n]).unwrap();
        let now = wakes[next];
        if now >= end {
            return done;
        }
        while gates[next].open(now) {
            gates[next].charge(now, bytes[next]);
            done[next] += 1;
        }
        wakes[next] = gates[next].wait(now) + late;
    }
}

fn near(got: u64, want: u64) {
    let off = got.abs_diff(want) as f64 / want as f64;
    assert!(off < 0.02, "{got} for {want}");
}

#[test]
fn the_rate_is_kept_whatever_the_timer_does() {
    for late in [0, 50_000, 5_000_000] {
        for iops in [10, 1000, 33_333, 500_000] {
            let limits = Limits {
                iops,
                ..Limits::default()
            };
            let done = saturate(&mut gates(limits, 1), &[4096], late, 10 * SECOND);
            near(done[0], 10 * iops + iops / 100);
        }
    }
}

#[test]
fn a_burst_comes_once_and_again_after_rest() {
    let limits = Limits {
        iops: 1000,
        iops_burst: 500,
        ..Limits::default()
    };
    let mut gates = gates(limits, 1);
    let mut burst = |now| {
        let mut count = 0;
        while gates[0].open(now) {
            gates[0].charge(now, 0);
            count += 1;
        }
        count
    };
    // The one beyond the burst is the one that the rate allows at any time.
    assert_eq!(burst(0), 501);
    assert_eq!(burst(SECOND / 10), 100);
    assert_eq!(burst(60 * SECOND), 501);
}

#[test]
fn bytes_cost_what_they_are() {
    let limits = Limits {
        bandwidth: 10 << 20,
        ..Limits::default()
    };
    let done = saturate(&mut gates(limits, 2), &[1 << 20, 4096], 0, 100 * SECOND);
    near(done[0] * (1 << 20) + done[1] * 4096, 1000 << 20);
    // The small ones wait for the large ones, but get their turns.
    assert!(done[1] + 10 >= done[0], "{done:?}");
}

#[test]
fn four_saturating_queues_share_and_none_starves() {
    for iops in [1000, 40_000] {
        let limits = Limits {
            iops,
            ..Limits::default()
        };
        let done = saturate(&mut gates(limits, 4), &[0; 4], 0, 10 * SECOND);
        near(done.iter().sum(), 10 * iops);
        assert!(done.iter().all(|n| *n >= 2000), "{done:?}");
    }
}

#[test]
fn a_change_opens_the_gate_at_once_and_voids_tickets() {
    let mut gates = gates(
        Limits {
            iops: 1,
            ..Limits::default()
        },
        1,
    );
    while gates[0].open(0) {
        gates[0].charge(0, 0);
    }
    assert!(gates[0].wait(0) > SECOND / 2);
    assert!(!gates[0].open(SECOND / 2));
    let oversight = Arc::clone(&gates[0].oversight);
    oversight.lanes[0].set(
        &Limits {
            iops: 2,
            ..Limits::default()
        },
        SECOND / 2,
    );
    assert!(gates[0].open(SECOND / 2));
    oversight.lanes[0].set(&Limits::default(), SECOND / 2);
    for _ in 0..1000 {
        assert!(gates[0].open(SECOND / 2));
        gates[0].charge(SECOND / 2, 1 << 30);
    }
}

#[test]
fn a_queue_that_stops_gives_its_ticket_back() {
    let mut gates = gates(
        Limits {
            iops: 1,
            ..Limits::default()
        },
        2,
    );
    while gates[0].open(0) {
        gates[0].charge(0, 0);
    }
    let first = gates[0].wait(0);
    drop(gates.remove(0));
    assert_eq!(gates[0].wait(0), first);
}

#[test]
fn extreme_limits_and_sizes_do_not_overflow() {
    let most = u64::MAX;
    for limits in [
        Limits {
            iops: 1,
            iops_burst: most,
            bandwidth: 1,
            bandwidth_burst: most,
        },
        Limits {
            iops: most,
            iops_burst: 0,
            bandwidth: most,
            bandwidth_burst: 0,
        },
    ] {
        let mut gates = gates(limits, 1);
        for now in [0, 1, most / 2] {
            gates[0].charge(now, most);
            gates[0].open(now);
            gates[0].wait(now);
        }
    }
}
