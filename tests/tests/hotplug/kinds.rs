//! Other disks than plain files: block devices, which the confined program
//! measures with a few ioctls, and file systems that make it wait.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Op, Setup};
use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::parts::absent;

use crate::rig::{Rig, SOON};

/// A program to which the disk `slow` came, in a file system of ours.
fn with_slow_disk(test: &str) -> Option<(Rig, Fuse, PathBuf)> {
    if !fuse::usable(test) {
        return None;
    }
    let rig = Rig::start(test, &[])?;
    let mount = Fuse::mount(&rig.scratch.path("mnt"), vec![9; 1 << 20]).unwrap();
    let socket = rig.socket("slow");
    let (file, path) = (mount.file(), socket.display());
    let keys = format!(
        "id=slow,file={},socket={path},cache=buffered",
        file.display()
    );
    rig.client(&["--add-device", &keys]).is_done();
    Some((rig, mount, socket))
}

fn begin_read(driver: &mut Driver) {
    let read = Op::Read {
        sector: 0,
        len: 4096,
    };
    driver.place(0, 0, &driver.prepare(0, &read).unwrap());
    driver.rings[0].queue(0);
    driver.rings[0].publish();
    driver.rings[0].notify();
}

/// The program starts without a disk that needs the kernel's threads.
#[test]
fn a_slow_file_system_gets_its_threads() {
    let test = "a_slow_file_system_gets_its_threads";
    let Some((rig, mount, socket)) = with_slow_disk(test) else {
        return;
    };
    mount.behaviour.read_ms.store(400, SeqCst);
    let setup = Setup {
        queue_size: 256,
        ..Setup::default()
    };
    let mut driver = Driver::connect(&socket, &setup).unwrap();
    for slot in 0..64 {
        let sector = slot * 8;
        let chain = driver.prepare(slot, &Op::Read { sector, len: 4096 });
        driver.place(0, slot as u16 * 4, &chain.unwrap());
        driver.rings[0].queue(slot as u16 * 4);
    }
    driver.rings[0].publish();
    driver.rings[0].notify();
    driver.rings[0].wait(64, Duration::from_secs(30)).unwrap();
    let most = mount.behaviour.most_reading.load(SeqCst);
    assert!(most >= 48, "{most} reads at a time");
    // In the middle of slow requests: they end first.
    mount.behaviour.read_ms.store(1000, SeqCst);
    begin_read(&mut driver);
    std::thread::sleep(Duration::from_millis(100));
    rig.client(&["--remove-device=slow", "--force"]).is_done();
    driver.rings[0].wait(1, Duration::from_secs(30)).unwrap();
}

/// A read that takes longer than anybody waits: the operator is told so, others
/// go on, and the device leaves when it can.
#[test]
fn a_device_that_lingers_leaves_later() {
    let test = "a_device_that_lingers_leaves_later";
    let Some((rig, mount, socket)) = with_slow_disk(test) else {
        return;
    };
    let mut driver = Driver::connect(&socket, &Setup::default()).unwrap();
    mount.behaviour.read_ms.store(13_000, SeqCst);
    begin_read(&mut driver);
    std::thread::sleep(Duration::from_millis(300));
    let said = rig.client(&["--remove-device=slow", "--force"]);
    said.is_refused(1, &["requests have not ended", "ask again"]);
    assert_eq!(rig.ids(), ["a", "slow"]);
    rig.connect("a").request(0, &Op::Flush).unwrap();
    rig.add("b", "").is_done();
    rig.remove("slow").is_done();
    assert_eq!(rig.ids(), ["a", "b"]);
    driver.rings[0].wait(1, Duration::from_secs(30)).unwrap();
}

#[test]
fn a_block_device_is_measured_under_confinement() {
    let test = "a_block_device_is_measured_under_confinement";
    let Some(rig) = Rig::start(test, &[]) else {
        return;
    };
    let output = Command::new("losetup")
        .args(["--find", "--show", "--sector-size=4096"])
        .arg(rig.scratch.path("b"))
        .output();
    let device = match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => {
            absent(test, "no loop device can be had (losetup, as root)");
            return;
        }
    };
    struct Loop<'a>(&'a str);
    impl Drop for Loop<'_> {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["--detach", self.0]).status();
        }
    }
    let detach = Loop(&device);
    let socket = rig.socket("loop");
    let keys = format!("id=loop,file={device},socket={}", socket.display());
    rig.client(&["--add-device", &keys]).is_done();
    let mut driver = Driver::connect(&socket, &Setup::default()).unwrap();
    let config = driver.config(60).unwrap();
    assert_eq!(config[20..24], 4096u32.to_le_bytes(), "logical block");
    let write = Op::Write {
        sector: 8,
        data: vec![7; 4096],
    };
    assert_eq!(driver.request(0, &write).unwrap().status, 0);
    let read = Op::Read {
        sector: 8,
        len: 4096,
    };
    assert_eq!(driver.request(0, &read).unwrap().data, vec![7; 4096]);
    rig.client(&["--remove-device=loop", "--force"]).is_done();
    // The device goes with its last user, whose rings may have kept it.
    drop(detach);
    let name = device.rsplit('/').next().unwrap();
    let backing = PathBuf::from(format!("/sys/block/{name}/loop/backing_file"));
    let gone = poll(SOON, || (!backing.exists()).then_some(()));
    assert!(gone.is_some(), "something still holds {device}");
}
