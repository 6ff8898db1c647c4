//! Guests with devices, of our backends and of others'.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::network::{HOST, Network, TAP, dotted};
use pericarp_tests::parts::Part;
use pericarp_tests::process::command;

use crate::rig::{Rig, backend, life, started};

/// A file system on a disk, with checksums that are read again.
const FILES: &str = r#"
mkfs.ext4 -q -F /dev/vda
mount /dev/vda /mnt
dd if=/dev/urandom of=/tmp/part bs=1M count=8 2>/dev/null
want=$(md5sum </tmp/part)
for copy in 1 2 3; do cp /tmp/part /mnt/copy$copy & done
wait
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount /dev/vda /mnt
for copy in 1 2 3; do [ "$(md5sum </mnt/copy$copy)" = "$want" ]; done
umount /mnt
dmesg | grep -i 'i/o error' && exit 1
true
"#;

/// Random reads and writes on both queues, each block with a checksum of its own.
const JOB: &str = "
fio --name=verify --filename=/dev/vda --numjobs=2 --size=4m --offset_increment=4m \
    --ioengine=libaio --iodepth=16 --direct=1 --rw=randrw --bs=4k --verify=crc32c \
    --verify_fatal=1 --do_verify=1 --verify_backlog=64 --randseed=7 --group_reporting \
    --output-format=terse >/tmp/fio.log 2>&1 || { cat /tmp/fio.log; exit 1; }
echo verified
";

#[test]
fn a_disk_holds_a_file_system() {
    let parts = [Part::PERICARP_BLOCK, Part::Fio];
    let Some(rig) = Rig::here("a_disk_holds_a_file_system", &parts) else {
        return;
    };
    let (disk, socket) = (rig.scratch.sparse("disk", 64 << 20), rig.scratch.path("d"));
    let file = disk.to_str().unwrap();
    let control = rig.scratch.path("block.control");
    let arguments = [
        "--blk-file",
        file,
        "--num-queues",
        "2",
        "--cache",
        "buffered",
        "--control-path",
        control.to_str().unwrap(),
    ];
    let _backend = backend("pericarp-block", &socket, &arguments);
    let sectors = (128 << 20) / 512;
    let script = format!(
        "{FILES}\n\
         {JOB}\n\
         echo grow it\n\
         while [ $(cat /sys/block/vda/size) != {sectors} ]; do sleep 0.2; done"
    );
    let image = rig.image(&["mkfs.ext4", "fio"], &script);
    let option = format!("id=root,socket={}", socket.display());
    let options = ["--memory", "512M", "--cpus", "2", "--disk", &option];
    let mut monitor = rig.start(&image, &options);
    monitor.wait_for("grow it");
    // The guest is told by an interrupt of the device's configuration.
    disk_grows(&disk, &control);
    monitor.finish();
}

fn disk_grows(disk: &Path, control: &Path) {
    let file = std::fs::File::options().write(true).open(disk);
    file.unwrap().set_len(128 << 20).unwrap();
    let mut stream = UnixStream::connect(control).unwrap();
    writeln!(stream, r#"{{"op":"resize"}}"#).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    assert!(answer.contains("\"ok\":true"), "{answer}");
}

#[test]
fn foreign_backends_serve_as_well() {
    let parts = [Part::QemuStorageDaemon, Part::Virtiofsd];
    let Some(rig) = Rig::here("foreign_backends_serve_as_well", &parts) else {
        return;
    };
    let (disk, socket) = (rig.scratch.sparse("disk", 64 << 20), rig.scratch.path("d"));
    let mut peer: Command = command(&Part::QemuStorageDaemon.find().unwrap());
    peer.arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=f,filename={}",
            disk.display()
        ))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on",
            socket.display()
        ));
    let _backend = started(&mut peer, &socket);
    let (dir, share) = (rig.scratch.path("shared"), rig.scratch.path("f"));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("there"), "from the host\n").unwrap();
    let mut peer: Command = command(&Part::Virtiofsd.find().unwrap());
    peer.args(["--sandbox", "chroot", "--tag", "data", "--socket-path"])
        .arg(&share)
        .arg("--shared-dir")
        .arg(&dir);
    let _server = started(&mut peer, &share);
    let script = format!(
        "{FILES}\n\
         mkdir /tmp/data; mount -t virtiofs data /tmp/data; cat /tmp/data/there\n\
         echo from the guest >/tmp/data/back; umount /tmp/data"
    );
    let image = rig.image(&["mkfs.ext4"], &script);
    let (disk, data) = (
        format!("id=root,socket={}", socket.display()),
        format!("id=data,socket={}", share.display()),
    );
    let options = ["--memory", "512M", "--disk", &disk, "--fs", &data];
    let said = rig.start(&image, &options).finish();
    assert!(said.contains("from the host"), "{said}");
    let back = std::fs::read_to_string(dir.join("back")).unwrap();
    assert_eq!(back, "from the guest\n");
}

#[test]
fn a_backend_that_dies_under_load_is_found_again() {
    let parts = [Part::PERICARP_BLOCK];
    let Some(rig) = Rig::here("a_backend_that_dies_under_load_is_found_again", &parts) else {
        return;
    };
    let (disk, socket) = (rig.scratch.sparse("disk", 64 << 20), rig.scratch.path("d"));
    let control = rig.scratch.path("block.control");
    let arguments = [
        "--blk-file",
        disk.to_str().unwrap(),
        "--cache",
        "buffered",
        "--control-path",
        control.to_str().unwrap(),
    ];
    let mut first = backend("pericarp-block", &socket, &arguments);
    // It writes until the disk is larger, which it is once all has happened.
    let sectors = (128 << 20) / 512;
    let script = format!(
        "dd if=/dev/urandom of=/tmp/part bs=1M count=8 2>/dev/null\n\
         want=$(md5sum </tmp/part); echo writing\n\
         while [ $(cat /sys/block/vda/size) != {sectors} ]; do\n\
             dd if=/tmp/part of=/dev/vda bs=64k oflag=direct 2>/dev/null\n\
         done\n\
         echo 3 >/proc/sys/vm/drop_caches\n\
         [ \"$(dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum)\" = \"$want\" ]\n\
         dmesg | grep -i 'i/o error' && exit 1\n\
         true"
    );
    let image = rig.image(&[], &script);
    let option = format!("id=root,socket={}", socket.display());
    let mut monitor = rig.start(&image, &["--memory", "512M", "--disk", &option]);
    monitor.wait_for("writing");
    for round in 1..=3 {
        std::thread::sleep(Duration::from_millis(400));
        first.kill();
        let _ = std::fs::remove_file(&socket);
        std::thread::sleep(Duration::from_millis(200));
        first = backend("pericarp-block", &socket, &arguments);
        let back = poll(life(), || {
            let stats = monitor.tell(r#"{"op":"stats"}"#);
            (stats["devices"][0]["reconnects"] == round).then_some(())
        });
        assert!(back.is_some(), "{}", monitor.said());
    }
    disk_grows(&disk, &control);
    monitor.finish();
}

#[test]
fn a_share_and_a_socket_and_what_is_added_later() {
    let parts = [
        Part::PERICARP_FS,
        Part::PERICARP_VSOCK,
        Part::PERICARP_BLOCK,
        Part::Socat,
    ];
    let Some(rig) = Rig::here("a_share_and_a_socket_and_what_is_added_later", &parts) else {
        return;
    };
    let dir = rig.scratch.path("shared");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("there"), "from the host\n").unwrap();
    let (fs, vsock) = (rig.scratch.path("f"), rig.scratch.path("v"));
    let (uds, disk) = (rig.scratch.path("uds"), rig.scratch.path("d"));
    let _fs = backend(
        "pericarp-fs",
        &fs,
        &["--shared-dir", dir.to_str().unwrap(), "--tag", "data"],
    );
    let arguments = ["--guest-cid", "42", "--uds-path", uds.to_str().unwrap()];
    let _vsock = backend("pericarp-vsock", &vsock, &arguments);
    let file = rig.scratch.sparse("disk", 16 << 20);
    let _disk = backend(
        "pericarp-block",
        &disk,
        &["--blk-file", file.to_str().unwrap()],
    );
    let script = "mount -t virtiofs data /mnt\n\
                  cat /mnt/there; echo from the guest >/mnt/back\n\
                  echo ready\n\
                  while ! [ -e /mnt/added ]; do sleep 0.2; done\n\
                  [ ! -e /dev/vda ]; echo 1 >/sys/bus/pci/rescan\n\
                  while ! [ -e /dev/vda ]; do sleep 0.2; done\n\
                  dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null; echo disk read\n\
                  echo 1 >/sys/bus/pci/devices/$(cat /mnt/added)/remove\n\
                  [ ! -e /dev/vda ]; echo gone >/mnt/removed\n\
                  umount /mnt";
    let image = rig.image(&[], script);
    let (a, b) = (
        format!("id=data,socket={},tag=data", fs.display()),
        format!("id=v,socket={},cid=42", vsock.display()),
    );
    let options = ["--memory", "512M", "--fs", &a, "--vsock", &b];
    let mut monitor = rig.start(&image, &options);
    monitor.wait_for("ready");
    let request = format!(
        r#"{{"op":"add-device","kind":"disk","id":"late","socket":"{}"}}"#,
        disk.display()
    );
    let added = monitor.tell(&request);
    let address = added["address"].as_str().unwrap();
    std::fs::write(dir.join("part"), address).unwrap();
    std::fs::rename(dir.join("part"), dir.join("added")).unwrap();
    let removed = poll(life(), || dir.join("removed").exists().then_some(()));
    assert!(removed.is_some(), "{}", monitor.said());
    monitor.tell(r#"{"op":"remove-device","id":"late"}"#);
    let elsewhere = r#"{"op":"add-device","kind":"disk","id":"x","socket":"/etc/passwd"}"#;
    assert_eq!(monitor.ask(elsewhere)["ok"], false);
    monitor.finish();
    let back = std::fs::read_to_string(dir.join("back")).unwrap();
    assert_eq!(back, "from the guest\n");
}

/// What Linux says of its card, and what came over it.
const NETWORK: &str = "
ip link set eth0 up; ip addr add 10.99.0.2/24 dev eth0
cat /sys/class/net/eth0/address
ping -c 2 -W 60 10.99.0.1
nc 10.99.0.1 7000 </dev/null | md5sum
echo irqs $(grep -c virtio.-input /proc/interrupts)
";

#[test]
fn a_card_reaches_the_host() {
    let test = "a_card_reaches_the_host";
    let parts = [Part::PERICARP_NET];
    let Some(rig) = Rig::here(test, &parts) else {
        return;
    };
    let Some(_network) = Network::here(test, &[], 1) else {
        return;
    };
    let socket = rig.scratch.path("n");
    let _backend = backend("pericarp-net", &socket, &["--tap", TAP]);
    let (modules, loads) = rig.assets.network().unwrap();
    let tools: Vec<&str> = modules.iter().map(String::as_str).collect();
    let image = rig.image(&tools, &(loads + NETWORK));
    let option = format!("id=n,socket={},mac=02:00:00:00:00:02", socket.display());
    let listener = TcpListener::bind((dotted(HOST), 7000)).unwrap();
    let give = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[7; 1 << 20])
    });
    let said = rig.start(&image, &["--memory", "512M", "--net", &option]);
    let said = said.finish();
    give.join().unwrap().unwrap();
    for want in [
        "02:00:00:00:00:02",
        "2 packets received",
        // Of a MiB of sevens.
        "24c8b42e9f4d53ef58987e469baaad49",
        "irqs 1",
    ] {
        assert!(said.contains(want), "{want}: {said}");
    }
}
