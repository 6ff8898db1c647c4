//! QEMU's command line.
//!
//! Called by the driver with a checked description and the descriptors QEMU inherits. Pure text:
//! nothing is opened here. A device the machine has no use for is left out, because each costs
//! the guest time at boot and is something a guest can talk to.

use std::{os::fd::RawFd, path::Path};

use crate::{
    select::Accelerator,
    spec::{CardSpec, DiskSpec, MAX_CARDS, MAX_SHARES, MachineSpec, ShareSpec, VsockSpec},
};

/// What the kernel must know of this machine: its console; that the timer works, which it would find
/// out by counting ticks in a busy loop, and panic when the host runs something else just then; and
/// not to test its ciphers against known answers first, a sixth of the boot under emulation.
const PARAMETERS: &str = "console=ttyS0 no_timer_check cryptomgr.notests";

/// The slots of shares, eight functions each. q35 has 30 free slots on its first bus, which disks and
/// spare slots fill from below, so shares have the last three and take no more however many they are.
const SHARE_SLOTS: [u8; MAX_SHARES.div_ceil(FUNCTIONS)] = [0x1d, 0x1e, 0x1c];
/// Functions of a PCI device.
const FUNCTIONS: usize = 8;
/// The slot of network cards.
const CARD_SLOT: u8 = 0x1b;
const _: () = assert!(MAX_CARDS <= FUNCTIONS);

/// The numbers under which QEMU inherits its connections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Connections {
    /// The control connection.
    pub(super) monitor: RawFd,
    /// One per disk.
    pub(super) disks: Vec<RawFd>,
    /// One per share.
    pub(super) shares: Vec<RawFd>,
    /// The vsock device's.
    pub(super) vsock: Option<RawFd>,
}

/// The command line without the program. `kernel` is what the description's kernel is given as.
pub(super) fn arguments(
    accelerator: Accelerator,
    spec: &MachineSpec,
    kernel: &Path,
    connections: &Connections,
) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut option = |name: &str, value: String| {
        args.push(format!("-{name}"));
        args.push(value);
    };
    let mib = spec.memory >> 20;
    // Its threads have names, by which the guest's CPU time is told from its own.
    option("name", "pericarp,debug-threads=on".into());
    option(
        "machine",
        "q35,memory-backend=mem,sata=off,smbus=off,usb=off,vmport=off,graphics=off".into(),
    );
    match accelerator {
        Accelerator::Kvm => {
            option("accel", "kvm".into());
            option("cpu", "host".into());
        }
        Accelerator::Tcg => {
            // One thread runs all CPUs in turn. With one each, QEMU 7.2 may translate a page while
            // another CPU writes to it and keep the stale code: a kernel that patches itself as
            // it boots then dies of an `int3` that is no longer there.
            option("accel", "tcg,thread=single".into());
            option("cpu", "max".into());
        }
    }
    // Guest memory is shared with the backends, which map it from this descriptor.
    option(
        "object",
        format!("memory-backend-memfd,id=mem,share=on,size={mib}M"),
    );
    option("m", format!("{mib}M"));
    option("smp", spec.cpus.to_string());
    option("kernel", path_text(kernel));
    option("initrd", path_text(&spec.initramfs));
    option(
        "append",
        format!("{PARAMETERS} {}", spec.cmdline)
            .trim_end()
            .to_owned(),
    );
    // The console is QEMU's standard output: this program reads it, bounded.
    option("chardev", "stdio,id=console,signal=off".into());
    option("serial", "chardev:console".into());
    option(
        "chardev",
        format!("socket,id=control,fd={}", connections.monitor),
    );
    option("mon", "chardev=control,mode=control".into());
    for (index, (disk, fd)) in spec.disks.iter().zip(&connections.disks).enumerate() {
        // Without `reconnect`: nothing restarts the backend of a disk that was there at the start,
        // so its death ends the run, and a guest that waits for a backend that never returns would
        // hide that.
        option("chardev", format!("socket,id=disk{index},fd={fd}"));
        option("device", disk_device(index, disk));
    }
    for (index, (share, fd)) in spec.shares.iter().zip(&connections.shares).enumerate() {
        option("chardev", format!("socket,id=share{index},fd={fd}"));
        option("device", share_device(index, share));
    }
    for (index, card) in spec.cards.iter().enumerate() {
        // By its path: QEMU 7.2 believes of no connection that it was given that it can pass
        // descriptors on, and asks that of a card alone.
        option("chardev", card_socket(index, card));
        option("netdev", card_backend(index, card));
        option("device", card_device(accelerator, index, card));
    }
    if let (Some(vsock), Some(fd)) = (&spec.vsock, connections.vsock) {
        option("chardev", format!("socket,id=vsock0,fd={fd}"));
        option("device", vsock_device(vsock));
    }
    // q35 can only add devices to ports that were there at the start.
    for slot in 1..=spec.spare_slots {
        option(
            "device",
            format!(
                "pcie-root-port,id={},bus=pcie.0,chassis={slot},slot={slot}",
                spare_port(slot.into())
            ),
        );
    }
    option(
        "sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
    );
    for flag in ["nodefaults", "no-user-config", "no-reboot"] {
        args.push(format!("-{flag}"));
    }
    for (name, value) in [("display", "none"), ("monitor", "none")] {
        args.push(format!("-{name}"));
        args.push(value.into());
    }
    args
}

/// What the spare port with this number is called, from 1 on.
pub(super) fn spare_port(number: usize) -> String {
    format!("spare{number}")
}

/// The option for a disk; QEMU repeats it in messages about the disk.
pub(super) fn disk_device(index: usize, disk: &DiskSpec) -> String {
    format!(
        "vhost-user-blk-pci,id={},chardev=disk{index},num-queues={},queue-size={}",
        disk.id, disk.num_queues, disk.queue_size
    )
}

/// The option for a share. A slot's first function says that there may be more.
pub(super) fn share_device(index: usize, share: &ShareSpec) -> String {
    let (slot, function) = (
        SHARE_SLOTS[index / FUNCTIONS % SHARE_SLOTS.len()],
        index % FUNCTIONS,
    );
    let more = if function == 0 {
        ",multifunction=on"
    } else {
        ""
    };
    format!(
        "vhost-user-fs-pci,id={},chardev=share{index},tag={},num-request-queues={},queue-size={},\
         addr={slot:#x}.{function}{more}",
        share.id, share.tag, share.num_queues, share.queue_size
    )
}

/// The option for the connection to a network card's backend, which may be started again.
pub(super) fn card_socket(index: usize, card: &CardSpec) -> String {
    let path = path_text(&card.socket).replace(',', ",,");
    format!("socket,id=card{index},path={path},reconnect=1")
}

/// The option for the host's side of a network card.
pub(super) fn card_backend(index: usize, card: &CardSpec) -> String {
    let pairs = card.queue_pairs;
    format!("vhost-user,id=net{index},chardev=card{index},queues={pairs}")
}

/// The option for a network card. Without KVM it interrupts by its pin: QEMU 7.2 looks for KVM's
/// routes as it masks a message of such a card, and dies where there are none.
pub(super) fn card_device(accelerator: Accelerator, index: usize, card: &CardSpec) -> String {
    let vectors = match accelerator {
        Accelerator::Kvm => 2 * card.queue_pairs + 2,
        Accelerator::Tcg => 0,
    };
    let several = if card.queue_pairs > 1 { ",mq=on" } else { "" };
    let more = if index == 0 { ",multifunction=on" } else { "" };
    format!(
        "virtio-net-pci,id={},netdev=net{index},mac={},rx_queue_size={size},tx_queue_size={size},\
         vectors={vectors},romfile=,addr={CARD_SLOT:#x}.{index}{several}{more}",
        card.id,
        card.mac_text(),
        size = card.queue_size,
    )
}

/// The option for the vsock device. Its context id is the backend's to tell.
pub(super) fn vsock_device(vsock: &VsockSpec) -> String {
    format!("vhost-user-vsock-pci,id={},chardev=vsock0", vsock.id)
}

fn path_text(path: &Path) -> String {
    // Checked to be text by `MachineSpec::check`.
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{MAX_CMDLINE, tests::sample};

    fn has(args: &[String], name: &str, value: &str) -> bool {
        args.windows(2)
            .any(|pair| pair[0] == name && pair[1] == value)
    }

    fn arguments_of(accelerator: Accelerator, spec: &MachineSpec) -> Vec<String> {
        let connections = Connections {
            monitor: 3,
            disks: vec![4],
            shares: vec![6],
            vsock: Some(5),
        };
        arguments(accelerator, spec, &spec.kernel, &connections)
    }

    #[test]
    fn the_command_line_describes_the_machine() {
        let args = arguments_of(Accelerator::Tcg, &sample());
        for (name, value) in [
            ("-smp", "2"),
            ("-m", "256M"),
            ("-object", "memory-backend-memfd,id=mem,share=on,size=256M"),
            (
                "-append",
                "console=ttyS0 no_timer_check cryptomgr.notests panic=-1",
            ),
            ("-chardev", "socket,id=control,fd=3"),
            ("-mon", "chardev=control,mode=control"),
            ("-chardev", "socket,id=disk0,fd=4"),
            (
                "-device",
                "vhost-user-blk-pci,id=root,chardev=disk0,num-queues=2,queue-size=128",
            ),
            ("-chardev", "socket,id=share0,fd=6"),
            (
                "-device",
                "vhost-user-fs-pci,id=data,chardev=share0,tag=share.1,num-request-queues=2,\
                 queue-size=1024,addr=0x1d.0,multifunction=on",
            ),
            (
                "-chardev",
                "socket,id=card0,path=/run/x/eth,,0.sock,reconnect=1",
            ),
            ("-netdev", "vhost-user,id=net0,chardev=card0,queues=2"),
            (
                "-device",
                "virtio-net-pci,id=eth0,netdev=net0,mac=02:00:00:00:00:0a,rx_queue_size=256,\
                 tx_queue_size=256,vectors=0,romfile=,addr=0x1b.0,mq=on,multifunction=on",
            ),
            ("-chardev", "socket,id=vsock0,fd=5"),
            ("-device", "vhost-user-vsock-pci,id=vsock,chardev=vsock0"),
        ] {
            assert!(has(&args, name, value), "{name} {value}: {args:?}");
        }
        let ports = args.iter().filter(|arg| arg.starts_with("pcie-root-port"));
        assert_eq!(ports.count(), 2);
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            assert!(args.iter().any(|arg| arg == flag), "{flag}");
        }
    }

    #[test]
    fn the_longest_parameters_fit() {
        let spec = MachineSpec {
            cmdline: "a".repeat(MAX_CMDLINE),
            ..sample()
        };
        spec.check().unwrap();
        let args = arguments_of(Accelerator::Tcg, &spec);
        assert!(args.iter().all(|arg| arg.len() <= 2047));
    }

    #[test]
    fn what_a_machine_has_no_use_for_is_left_out() {
        let spec = MachineSpec {
            disks: vec![],
            shares: vec![],
            cards: vec![],
            vsock: None,
            spare_slots: 0,
            ..sample()
        };
        let args = arguments(
            Accelerator::Tcg,
            &spec,
            &spec.kernel,
            &Connections::default(),
        );
        assert!(!args.iter().any(|arg| arg == "-device"), "{args:?}");
    }

    #[test]
    fn every_share_has_a_place_of_its_own() {
        let share = &sample().shares[0];
        let devices: Vec<String> = (0..MAX_SHARES)
            .map(|index| share_device(index, share))
            .collect();
        assert!(devices[7].ends_with(",addr=0x1d.7"), "{}", devices[7]);
        assert!(
            devices[8].ends_with(",addr=0x1e.0,multifunction=on"),
            "{}",
            devices[8]
        );
        assert!(
            devices[16].ends_with(",addr=0x1c.0,multifunction=on"),
            "{}",
            devices[16]
        );
        let mut places: Vec<&str> = devices
            .iter()
            .filter_map(|device| device.split_once(",addr="))
            .map(|(_, place)| place)
            .collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), MAX_SHARES);
    }

    #[test]
    fn kvm_and_emulation_differ_in_the_cpu_and_how_cards_interrupt() {
        let kvm = arguments_of(Accelerator::Kvm, &sample());
        let tcg = arguments_of(Accelerator::Tcg, &sample());
        let kvm: Vec<_> = kvm
            .iter()
            .map(|arg| arg.replace(",vectors=6,", ",vectors=0,"))
            .collect();
        assert!(has(&kvm, "-accel", "kvm") && has(&kvm, "-cpu", "host"));
        assert!(has(&tcg, "-accel", "tcg,thread=single") && has(&tcg, "-cpu", "max"));
        assert_eq!(kvm.iter().zip(&tcg).filter(|(a, b)| a != b).count(), 2);
    }
}
