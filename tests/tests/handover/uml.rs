//! Linux's own driver under User-mode Linux, which knows no reconnecting: fio
//! through hand-overs.

use std::time::Duration;

use pericarp_tests::bounded::{OneCpu, poll};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::Machine;
use serde_json::json;

use super::rig::Rig;

const SCRIPT: &str = r#"
end=$(($(cut -d. -f1 /proc/uptime) + SECONDS_HERE))
round=0
while [ "$(cut -d. -f1 /proc/uptime)" -lt $end ]; do
    round=$((round + 1))
    fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=32 --rw=randrw \
        --rwmixread=50 --bsrange=4k-64k --size=64m --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --verify_backlog=512 --randseed=$round --output-format=terse >fio.log 2>&1 ||
        { cat fio.log; dmesg | tail; exit 1; }
done
echo "rounds: $round"
"#;

#[test]
fn fio_in_user_mode_linux_is_handed_over() {
    let test = "fio_in_user_mode_linux_is_handed_over";
    let parts = [Part::UserModeLinux, Part::Fio, Part::PERICARP_BLOCK];
    if !have(test, &parts) {
        return;
    }
    let _cpu = OneCpu::turn();
    let (count, judged) = super::count(3);
    let scratch = Scratch::new();
    scratch.sparse("disk", 128 << 20);
    let mut rig = Rig::on(scratch, &[]);
    let seconds = 6 + count * 6 / 10;
    let mut machine = Machine::new(
        &[&rig.socket()],
        &SCRIPT.replace("SECONDS_HERE", &seconds.to_string()),
    );
    machine.limit = Duration::from_secs(60 + 4 * seconds as u64);
    let mut pauses = Vec::new();
    let report = std::thread::scope(|scope| {
        let running = scope.spawn(|| machine.run());
        // Its boot reads a little; fio much.
        let busy = poll(Duration::from_secs(60), || {
            let stats = rig.ask(&json!({"op": "stats"}));
            let queue = &stats["devices"][0]["queues"][0];
            let reads = queue["requests"]["read"]["count"].as_u64();
            reads.is_some_and(|reads| reads > 500).then_some(())
        });
        assert!(
            busy.is_some(),
            "{}\n{}",
            rig.ask(&json!({"op": "stats"})),
            rig.told()
        );
        for _ in 0..count {
            std::thread::sleep(Duration::from_millis(150));
            pauses.extend(rig.hand_over().0);
        }
        running.join().unwrap()
    });
    let report = report.unwrap_or_else(|error| panic!("{error}\n{}", rig.told()));
    assert_eq!(report.code, 0, "{}\n{}", report.output, report.console);
    assert!(!report.console.contains("I/O error"), "{}", report.console);
    assert_eq!(pauses.len(), count);
    let (middle, longest) = super::summary(pauses);
    eprintln!(
        "{test}: {count} hand-overs, fio {}; queues stood still for {middle:?}, at most {longest:?}",
        report.output.trim()
    );
    if judged {
        assert!(longest < super::PROMISE, "{longest:?}");
    }
}
