//! Disks that come to a running machine and leave it, as the containerd shim has it done: through
//! `pericarp-hypervisor`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pericarp_hypervisor::pericarp::Pericarp;
use pericarp_hypervisor::{ConsoleSpec, DiskSpec, Hypervisor, Machine, MachineSpec};
use pericarp_tests::bounded::poll;
use pericarp_tests::parts::Part;
use pericarp_tests::process::Process;

use crate::rig::{Rig, backend, life};

const MIB: usize = 1 << 20;

/// Looks for disks by their serials, as the agent does, and lets go of the first. It keeps the second,
/// whoever takes that away.
const WORK: &str = r#"
has() {
    for it in /sys/block/vd*; do
        # Whoever asks a device that was taken away waits for ever.
        if [ $it = /sys/block/$kept ]; then continue; fi
        if [ "$(cat $it/serial 2>/dev/null)" = $1 ]; then basename $it; return; fi
    done
    false
}
come() { while ! has $1; do echo 1 >/sys/bus/pci/rescan; sleep 0.2; done; }
sum() { dd if=/dev/$1 bs=64k count=16 iflag=direct 2>/dev/null | md5sum | cut -d ' ' -f 1; }
put() { dd if=/tmp/part of=/dev/$1 bs=64k oflag=direct 2>/dev/null; }
dd if=/dev/urandom of=/tmp/part bs=64k count=16 2>/dev/null
want=$(md5sum </tmp/part | cut -d ' ' -f 1)
kept=none
disk=$(come one)
put $disk
[ "$(sum $disk)" = $want ]
echo 1 >$(readlink -f /sys/block/$disk/device)/../remove
has one && exit 1
echo gave one $want
echo waits for two
disk=$(come two)
exec 7</dev/$disk
echo has two
round=0
while [ $round -lt 20 ]; do put $disk; [ "$(sum $disk)" = $want ]; round=$((round + 1)); done
dmesg | grep -i 'i/o error' && exit 1
kept=$disk
echo keeps two
disk=$(come three)
[ "$(sum $disk)" = $want ]
echo has three
sleep 1000
"#;

/// A disk, and who serves it.
struct Disk {
    spec: DiskSpec,
    image: std::path::PathBuf,
}

impl Disk {
    fn new(rig: &Rig, id: &str, image: &str) -> Self {
        let image = rig.scratch.path(image);
        let spec = DiskSpec {
            id: id.into(),
            socket: rig.scratch.path(&format!("{id}.sock")),
            num_queues: 1,
            queue_size: 128,
        };
        Self { spec, image }
    }

    fn serve(&self) -> Process {
        let _ = fs::remove_file(&self.spec.socket);
        let image = self.image.to_str().unwrap();
        let serial = &self.spec.id;
        let arguments = [
            "--blk-file",
            image,
            "--serial",
            serial,
            "--cache",
            "buffered",
        ];
        backend("pericarp-block", &self.spec.socket, &arguments)
    }

    fn sum(&self) -> String {
        let mut bytes = vec![0; MIB];
        let file = File::open(&self.image).unwrap();
        file.read_exact_at(&mut bytes, 0).unwrap();
        let part = self.image.with_extension("part");
        fs::write(&part, bytes).unwrap();
        let output = Command::new("md5sum").arg(&part).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_whitespace().next().unwrap().to_owned()
    }
}

/// Waits until the guest has printed a line that begins so; gives the line.
fn said(machine: &mut Machine, words: &str) -> String {
    let line = poll(life(), || {
        let lines = machine.console_lines(50);
        let line = lines.into_iter().find(|line| line.starts_with(words));
        let ended = machine.has_ended();
        (line.is_some() || ended).then_some(line)
    });
    let line = line.flatten();
    line.unwrap_or_else(|| panic!("{words}: {}", machine.console_lines(50).join("\n")))
}

fn refused(machine: &mut Machine, disk: &Disk) -> String {
    machine.add_disk(&disk.spec).unwrap_err().to_string()
}

#[test]
fn disks_come_and_go_and_their_backends_die() {
    let test = "disks_come_and_go_and_their_backends_die";
    let Some(rig) = Rig::here(test, &[Part::PERICARP_BLOCK]) else {
        return;
    };
    for image in ["base", "first", "second"] {
        rig.scratch.sparse(image, 16 * MIB as u64);
    }
    // Disks that come later are beside one that was there.
    let base = Disk::new(&rig, "base", "base");
    let _base = base.serve();
    let spec = MachineSpec {
        kernel: rig.assets.kernel(),
        initramfs: rig.image(&[], WORK),
        cmdline: "quiet panic=-1".into(),
        cpus: 1,
        memory: 256 << 20,
        disks: vec![base.spec.clone()],
        shares: Vec::new(),
        cards: Vec::new(),
        vsock: None,
        spare_slots: 8,
        console: ConsoleSpec::default(),
    };
    let mut machine = Pericarp::default().start(&spec).unwrap();

    let one = Disk::new(&rig, "one", "first");
    let mut server = one.serve();
    machine.add_disk(&one.spec).unwrap();
    said(&mut machine, "waits for two");
    let line = said(&mut machine, "gave one");
    assert!(machine.remove_disk("one").unwrap());
    assert!(machine.remove_disk("one").unwrap(), "it is gone");
    server.kill();
    let want = line.rsplit(' ').next().unwrap();
    assert_eq!(one.sum(), want);

    // Killed before it has said what it is, or is not there at all.
    let two = Disk::new(&rig, "two", "second");
    two.serve().kill();
    let error = refused(&mut machine, &two);
    assert!(error.contains("two.sock"), "{error}");
    let deaf = std::os::unix::net::UnixListener::bind(rig.scratch.path("deaf.sock")).unwrap();
    let dying = Disk {
        spec: DiskSpec {
            socket: rig.scratch.path("deaf.sock"),
            ..two.spec.clone()
        },
        image: two.image.clone(),
    };
    let killed = std::thread::spawn(move || drop(deaf.accept().unwrap()));
    let error = refused(&mut machine, &dying);
    killed.join().unwrap();
    assert!(error.contains("deaf.sock"), "{error}");

    let mut server = two.serve();
    machine.add_disk(&two.spec).unwrap();
    // Before the guest has looked, and under its hands.
    server.kill();
    server = two.serve();
    said(&mut machine, "has two");
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        server.kill();
        server = two.serve();
    }
    said(&mut machine, "keeps two");
    // It is taken away all the same, and the host has it back.
    assert!(machine.remove_disk("two").unwrap());
    server.kill();
    assert_eq!(two.sum(), want);
    let three = Disk::new(&rig, "three", "second");
    let _server = three.serve();
    machine.add_disk(&three.spec).unwrap();
    said(&mut machine, "has three");
    machine.kill();
    assert!(!Path::new(&format!("/proc/{}", machine.pid())).exists());
}
