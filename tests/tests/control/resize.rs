//! Online resize: the new size is in the configuration space, requests meet it,
//! and a front end that wants to know is told, over a socket or a pipe.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pericarp_tests::bounded::{Alone, poll};
use pericarp_tests::frontend::{Driver, Op, Setup};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::uml::Machine;
use serde_json::{Value, json};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::rig::{DISK, Rig, SOON};

/// CONFIG_CHANGE_MSG, version 1, no payload.
const NOTICE: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

fn resize(rig: &Rig, size: u64) -> Value {
    let disk = OpenOptions::new().write(true).open(rig.backend.disk());
    disk.unwrap().set_len(size).unwrap();
    rig.ask(&json!({"op": "resize"}))
}

/// A driver that hands over `channel` for requests of the back end.
fn listening(rig: &Rig, channel: &OwnedFd) -> Driver {
    let mut driver = Driver::connect(rig.backend.socket(), &Setup::default()).unwrap();
    let wanted = driver.protocol | VhostUserProtocolFeatures::BACKEND_REQ;
    driver.frontend.set_protocol_features(wanted).unwrap();
    driver
        .frontend
        .set_backend_request_fd(&channel.as_raw_fd())
        .unwrap();
    driver
}

fn last_sector(driver: &mut Driver, size: u64) -> u8 {
    let read = Op::Read {
        sector: size / 512 - 1,
        len: 512,
    };
    driver.request(0, &read).unwrap().status
}

#[test]
fn a_disk_grows_and_shrinks_under_its_front_end() {
    let Some(rig) = Rig::start("resize", &[]) else {
        return;
    };
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(SOON)).unwrap();
    let mut driver = listening(&rig, &theirs.into());
    // A file that has grown is no larger disk before somebody says so.
    let file = OpenOptions::new().write(true).open(rig.backend.disk());
    file.unwrap().set_len(DISK * 2).unwrap();
    assert_eq!(last_sector(&mut driver, DISK * 2), 1);
    for size in [DISK * 2, DISK / 2] {
        let answer = resize(&rig, size);
        assert_eq!(
            answer,
            json!({"ok": true, "device": "disk", "size": size, "told": "front-end"})
        );
        let mut notice = [0; 12];
        ours.read_exact(&mut notice).unwrap();
        assert_eq!(notice, NOTICE);
        assert_eq!(driver.sectors().unwrap(), size / 512);
        assert_eq!(last_sector(&mut driver, size), 0);
        assert_eq!(last_sector(&mut driver, size + 512), 1);
    }
    // What cannot be a disk changes nothing.
    for (size, why) in [(0, "empty"), (1000, "multiple")] {
        let answer = resize(&rig, size);
        assert_eq!(answer["ok"], false, "{answer}");
        assert!(answer["error"].as_str().unwrap().contains(why), "{answer}");
        assert_eq!(driver.sectors().unwrap(), DISK / 2 / 512);
    }
    drop(driver);
    // The next front end sees the size, and nobody hears while none is there.
    let told = poll(SOON, || {
        let answer = resize(&rig, DISK * 4);
        (answer["told"] == "nobody").then_some(())
    });
    assert!(told.is_some());
    let mut driver = Driver::connect(rig.backend.socket(), &Setup::default()).unwrap();
    assert_eq!(driver.sectors().unwrap(), DISK * 4 / 512);
    assert_eq!(resize(&rig, DISK)["told"], "nobody", "it gave no channel");
}

#[test]
fn a_channel_that_nobody_reads_holds_nothing_up() {
    let Some(rig) = Rig::start("resize, full channel", &[]) else {
        return;
    };
    let (mut read, write) = std::io::pipe().unwrap();
    let mut driver = listening(&rig, &OwnedFd::from(write));
    // A pipe of 64 KiB, each notice alone in its twelve bytes of a page.
    let full = (0..10_000).any(|_| resize(&rig, DISK)["told"] == "full");
    assert!(full);
    assert_eq!(last_sector(&mut driver, DISK), 0);
    let mut notice = [0; 12];
    read.read_exact(&mut notice).unwrap();
    assert_eq!(notice, NOTICE);
    drop(read);
    let gone = poll(Duration::from_secs(20), || {
        (resize(&rig, DISK)["told"] == "nobody").then_some(())
    });
    assert!(gone.is_some());
    assert_eq!(last_sector(&mut driver, DISK), 0);
}

#[test]
fn a_channel_that_cannot_be_one_is_refused() {
    let Some(rig) = Rig::start("resize, bad channel", &[]) else {
        return;
    };
    let mut driver = Driver::connect(rig.backend.socket(), &Setup::default()).unwrap();
    let wanted = driver.protocol | VhostUserProtocolFeatures::BACKEND_REQ;
    driver.frontend.set_protocol_features(wanted).unwrap();
    let file = std::fs::File::create(rig.scratch.path("file")).unwrap();
    driver
        .frontend
        .set_backend_request_fd(&file.as_raw_fd())
        .unwrap_err();
    assert_eq!(resize(&rig, DISK)["told"], "nobody");
}

/// Waits for the new size and reads what was not there before.
const GUEST: &str = r#"
for wait in $(seq 300); do
    if [ "$(cat /sys/block/vda/size)" = 262144 ]; then
        dd if=/dev/vda of=/dev/null bs=4k skip=32767 count=1 iflag=direct 2>&1
        echo grown
        exit
    fi
    sleep 0.1
done
cat /sys/block/vda/size
exit 1
"#;

/// Linux's own driver, over the pipe that User-mode Linux hands over.
#[test]
fn linux_sees_the_new_size_at_once() {
    if !have("resize under Linux", &[Part::UserModeLinux]) {
        return;
    }
    let Some(rig) = Rig::start("resize under Linux", &[]) else {
        return;
    };
    let _alone = Alone::turn();
    let socket = rig.backend.socket().to_owned();
    let guest = std::thread::spawn(move || Machine::new(&[&socket], GUEST).run());
    // It has looked at the size when it reads the partition table.
    let read = poll(Duration::from_secs(60), || {
        let stats = rig.ask(&json!({"op": "stats"}));
        let reads = &stats["devices"][0]["queues"][0]["requests"]["read"]["count"];
        (reads.as_u64() > Some(0)).then_some(())
    });
    assert!(read.is_some(), "the guest reads nothing");
    assert_eq!(resize(&rig, 128 << 20)["told"], "front-end");
    let report = guest.join().unwrap().unwrap();
    assert_eq!(report.code, 0, "{}\n{}", report.output, report.console);
    assert!(report.output.ends_with("grown\n"), "{}", report.output);
}
