//! The same for QEMU and a stock kernel: `reconnect=1` and INFLIGHT_SHMFD.

use std::time::Duration;

use pericarp_tests::bounded::{Alone, poll};
use pericarp_tests::guest::{Assets, MARK, emulated, exit_code, initramfs};
use pericarp_tests::parts::Part;
use pericarp_tests::process::Process;
use pericarp_tests::scratch::Scratch;

use super::{block, patience, wait_for};

/// Verified I/O for a while, then the number of rounds.
const GUEST: &str = r#"
end=$(($(cut -d. -f1 /proc/uptime) + SECONDS_HERE))
round=0
# Large reads without a check keep the disk busy where the CPU is emulated.
fio --name=busy --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=16 --rw=randread \
    --bs=1m --offset=32m --size=32m --time_based --runtime=SECONDS_HERE --eta=never \
    --output=busy.log &
busy=$!
echo fio begins
while [ "$(cut -d. -f1 /proc/uptime)" -lt $end ]; do
    round=$((round + 1))
    fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=32 \
        --rw=randrw --rwmixread=40 --bsrange=4k-256k --size=24m --verify=crc32c --verify_fatal=1 \
        --do_verify=1 --verify_backlog=64 --randseed=$round --eta=never --output=fio.log ||
        { cat fio.log; dmesg | tail; exit 1; }
done
wait $busy || { cat busy.log; exit 1; }
dmesg | grep -i -e 'i/o error' -e 'blocked for more' && exit 1
echo "rounds: $round"
"#;

/// A stock kernel in QEMU, whose backend is killed every three seconds.
#[test]
fn qemu_reconnects_to_successors() {
    let test = "qemu_reconnects_to_successors";
    let Some(assets) = Assets::for_test(test, &[Part::Fio, Part::PERICARP_BLOCK]) else {
        return;
    };
    let _alone = Alone::turn();
    let scratch = Scratch::new();
    scratch.sparse("disk", 64 << 20);
    let seconds = patience(20);
    let script = GUEST.replace("SECONDS_HERE", &seconds.as_secs().to_string());
    let image = initramfs(&scratch, &assets, &["fio"], &script).unwrap();
    let mut backend = block(&scratch, &[]);
    let socket = wait_for(&scratch.path("s"));
    let mut qemu = emulated(&assets, &image, "");
    qemu.arg("-chardev")
        .arg(format!(
            "socket,id=disk,path={},reconnect=1",
            socket.display()
        ))
        .args([
            "-device",
            "vhost-user-blk-pci,chardev=disk,num-queues=1,queue-size=128",
        ]);
    let limit = seconds * 2 + Duration::from_secs(120);
    let mut machine = Process::start(&mut qemu, limit).unwrap();
    let console = machine.output().clone();
    let begun = poll(Duration::from_secs(90), || console.find("fio begins"));
    assert!(begun.is_some(), "{}", console.last(40));
    let (mut kills, mut again, mut kept) = (0, 0, 0);
    while machine.wait(Duration::from_secs(3)).is_none() {
        if console.find(MARK).is_some() {
            continue;
        }
        again += usize::from(backend.output().find("done again").is_some());
        // Confined processes show this to root only.
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", backend.pid()));
        kept += usize::from(maps.map_or(true, |maps| maps.contains("memfd:inflight")));
        backend.kill();
        backend = block(&scratch, &[]);
        kills += 1;
    }
    let text = console.last(60);
    assert_eq!(
        exit_code(&text),
        Some("0"),
        "{text}\n{}",
        backend.output().last(20)
    );
    eprintln!(
        "{test}: {kills} kills, {again} successors had some to do again, {}",
        console.find("rounds: ").unwrap_or_default()
    );
    // An emulated guest is slow: the disk may have been idle at each kill. But
    // the front end must have kept the record, and handed it on.
    assert!(
        kills >= 3 && 2 * kept > kills,
        "{kills} kills, {kept} records"
    );
}
