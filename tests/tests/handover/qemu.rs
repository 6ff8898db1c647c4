//! QEMU and a stock kernel, without `reconnect`: a front end that would lose its
//! disk for good with its connection.

use std::time::Duration;

use pericarp_tests::bounded::{Alone, poll};
use pericarp_tests::guest::{Assets, emulated, exit_code, initramfs};
use pericarp_tests::parts::Part;
use pericarp_tests::process::Process;
use pericarp_tests::scratch::Scratch;
use serde_json::json;

use super::rig::{Rig, SOON};

/// Verified I/O for a while, then the number of rounds.
const GUEST: &str = r#"
end=$(($(cut -d. -f1 /proc/uptime) + SECONDS_HERE))
round=0
echo fio begins
while [ "$(cut -d. -f1 /proc/uptime)" -lt $end ]; do
    round=$((round + 1))
    fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=32 \
        --rw=randrw --rwmixread=40 --bsrange=4k-128k --size=8m --verify=crc32c --verify_fatal=1 \
        --do_verify=1 --verify_backlog=64 --randseed=$round --eta=never --output=fio.log ||
        { cat fio.log; dmesg | tail; exit 1; }
done
dmesg | grep -i -e 'i/o error' -e 'blocked for more' && exit 1
echo "rounds: $round"
"#;

#[test]
fn fio_in_qemu_is_handed_over() {
    let test = "fio_in_qemu_is_handed_over";
    let Some(assets) = Assets::for_test(test, &[Part::Fio, Part::PERICARP_BLOCK]) else {
        return;
    };
    let _alone = Alone::turn();
    let (count, _) = super::count(4);
    let scratch = Scratch::new();
    scratch.sparse("disk", 16 << 20);
    let seconds = 8 + count as u64 / 2;
    let script = GUEST.replace("SECONDS_HERE", &seconds.to_string());
    let image = initramfs(&scratch, &assets, &["fio"], &script).unwrap();
    let mut rig = Rig::on(scratch, &[]);
    let mut qemu = emulated(&assets, &image, "");
    qemu.arg("-chardev")
        .arg(format!("socket,id=disk,path={}", rig.socket().display()))
        .args([
            "-device",
            "vhost-user-blk-pci,chardev=disk,num-queues=1,queue-size=128",
        ]);
    let limit = Duration::from_secs(120 + 4 * seconds);
    let mut machine = Process::start(&mut qemu, limit).unwrap();
    let console = machine.output().clone();
    let begun = poll(Duration::from_secs(90), || console.find("fio begins"));
    assert!(begun.is_some(), "{}", console.last(40));
    let mut pauses = Vec::new();
    for _ in 0..count {
        // Each of them serves some of it. The CPU is emulated: it takes a while.
        let writes = || {
            let stats = rig.ask(&json!({"op": "stats"}));
            let queue = &stats["devices"][0]["queues"][0];
            let writes = queue["requests"]["write"]["count"].as_u64();
            writes.is_some_and(|writes| writes > 20).then_some(())
        };
        assert!(poll(SOON, writes).is_some(), "{}", console.last(40));
        pauses.extend(rig.hand_over().0);
    }
    assert!(machine.wait(limit).is_some(), "{}", console.last(40));
    let text = console.last(60);
    assert_eq!(exit_code(&text), Some("0"), "{text}\n{}", rig.told());
    assert_eq!(pauses.len(), count);
    let (middle, longest) = super::summary(pauses);
    eprintln!(
        "{test}: {count} hand-overs, {}; queues stood still for \
         {middle:?}, at most {longest:?}",
        console.find("rounds: ").unwrap_or_default()
    );
}
