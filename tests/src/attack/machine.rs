//! A guest that attacks: its first process writes doorbells, rings, the configuration of PCI and
//! of the devices, and every port (`pericarp-poker`). What becomes of the machine is its own
//! affair, and it is booted again; the sidecars behind its four devices serve whoever comes next.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use pericarp_hypervisor::{
    CardSpec, ConsoleSpec, DiskSpec, HostFacts, Machine, MachineError, MachineSpec, ShareSpec,
    VsockSpec, Wanted, select,
};

use super::report::Machines;
use super::stage::Stage;
use crate::bounded::poll;
use crate::guest::{Assets, initramfs};
use crate::network::GUEST_MAC;
use crate::parts::Part;
use crate::vsock::CID;

/// From the start of a machine to the first poke, with an emulated CPU on a busy host.
const BOOT: Duration = Duration::from_secs(240);
/// What the guest says before each round.
const ROUND: &str = "poking from";
/// Most of the rounds leave ports alone: some of them end the machine.
const SCRIPT: &str = "n=0
while true; do
    n=$((n + 1))
    seed=$(head -c 8 /dev/urandom | cksum | cut -d ' ' -f 1)
    echo poking from $seed
    what=devices
    [ $((n % 8)) != 0 ] || what=ports
    pericarp-poker 1 $seed $what || true
done
";

/// What the guest boots.
///
/// # Errors
/// The disk is full, or a part is missing.
pub(super) fn image(stage: &Stage, assets: &Assets) -> Result<PathBuf, String> {
    let poker = Part::Ours("pericarp-poker").find().unwrap_or_default();
    let poker = poker.to_string_lossy().into_owned();
    initramfs(stage.scratch(), assets, &[&poker], SCRIPT).map_err(|e| format!("the guest: {e}"))
}

/// Boots one machine after another until it is told to stop; `begun` is set with the first poke,
/// and `between` is called when a machine has ended.
///
/// # Errors
/// A machine does not come as far as its first poke.
pub(super) fn besiege(
    stage: &Stage,
    assets: &Assets,
    image: &Path,
    stop: &AtomicBool,
    begun: &AtomicBool,
    mut between: impl FnMut(),
) -> Result<Machines, String> {
    let mut machines = Machines::default();
    let spec = spec(stage, assets, image);
    machines.hypervisor = select(Wanted::Auto, &HostFacts::probe())
        .hypervisor()
        .name();
    while !stop.load(Ordering::Relaxed) {
        let mut machine = start(&spec)?;
        machines.boots += 1;
        let works = poll(BOOT, || {
            let over = machine.has_ended() || stop.load(Ordering::Relaxed);
            (rounds(&machine) > 0 || over).then_some(())
        });
        if works.is_none() || rounds(&machine) == 0 && machine.has_ended() {
            let said = machine.console_lines(30).join("\n");
            return Err(format!("no poke: {}\n{said}", machine.death()));
        }
        begun.store(true, Ordering::Relaxed);
        while !machine.has_ended() && !stop.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(100));
        }
        if machine.has_ended() {
            *machines.ends.entry(end(&mut machine)).or_default() += 1;
        }
        machine.kill();
        count(&machine, &mut machines);
        drop(machine);
        between();
    }
    Ok(machines)
}

/// A machine with all four devices.
fn spec(stage: &Stage, assets: &Assets, image: &Path) -> MachineSpec {
    MachineSpec {
        kernel: assets.kernel(),
        initramfs: image.to_owned(),
        cmdline: "quiet panic=-1".into(),
        cpus: 1,
        memory: 512 << 20,
        disks: vec![DiskSpec {
            id: "disk".into(),
            socket: stage.path("block-guest"),
            num_queues: 2,
            queue_size: 128,
        }],
        shares: vec![ShareSpec {
            id: "tree".into(),
            socket: stage.path("fs-guest"),
            tag: "c".into(),
            num_queues: 1,
            queue_size: 128,
        }],
        cards: vec![CardSpec {
            id: "card".into(),
            socket: stage.path("net-guest"),
            mac: GUEST_MAC,
            queue_pairs: 1,
            queue_size: 256,
        }],
        vsock: Some(VsockSpec {
            id: "vsock".into(),
            socket: stage.path("vsock-guest"),
            guest_cid: CID as u32,
        }),
        spare_slots: 0,
        console: ConsoleSpec::default(),
    }
}

/// A machine that finds its backends busy with the one before is started again.
fn start(spec: &MachineSpec) -> Result<Machine, String> {
    let mut last = None;
    let choice = select(Wanted::Auto, &HostFacts::probe());
    let started = poll(BOOT, || match choice.hypervisor().start(spec) {
        Ok(machine) => Some(machine),
        Err(error) => {
            sleep(Duration::from_millis(500));
            last = Some(error);
            None
        }
    });
    started.ok_or_else(|| {
        last.as_ref()
            .map_or_else(String::new, MachineError::to_string)
    })
}

fn rounds(machine: &Machine) -> usize {
    let lines = machine.console_lines(2000);
    lines.iter().filter(|line| line.contains(ROUND)).count()
}

/// How it ended, without what is of this one alone.
fn end(machine: &mut Machine) -> String {
    let end = machine.death().to_string();
    // Numbers and addresses differ each time.
    let kind: String = end
        .chars()
        .filter(|c| !c.is_ascii_digit())
        .take(160)
        .collect();
    kind.trim().to_owned()
}

/// What its rounds said of themselves.
fn count(machine: &Machine, machines: &mut Machines) {
    machines.rounds += rounds(machine) as u64;
    for line in machine.console_lines(2000) {
        // poked N times, N doorbells, ...
        let Some((_, said)) = line.split_once("poked ") else {
            continue;
        };
        let numbers: Vec<u64> = said
            .split(' ')
            .filter_map(|word| word.parse().ok())
            .take(2)
            .collect();
        if let [pokes, doorbells] = numbers[..] {
            machines.pokes += pokes;
            machines.doorbells += doorbells;
        }
    }
}
