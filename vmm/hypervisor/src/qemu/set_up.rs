//! What must be there before QEMU starts, and what its last words mean when it did not come up.
//!
//! Called by the driver. Whatever can be looked at is looked at first, so that the error has the
//! system's own reason; only the rest is read out of QEMU's messages, which are its to change: what
//! is not recognised stays a general error with QEMU's last line in it.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::ExitStatus,
};

use pericarp_kernel::{
    KernelError,
    cache::{self, Plain},
    elf,
};
use rustix::{
    fs::OFlags,
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

use super::arguments::{
    Connections, card_backend, card_device, card_socket, disk_device, share_device, vsock_device,
};
use crate::{machine::MachineError, select::Accelerator, spec::MachineSpec};

/// Looks at the files and at KVM.
pub(super) fn look(accelerator: Accelerator, spec: &MachineSpec) -> Result<(), MachineError> {
    for (what, path) in [("kernel", &spec.kernel), ("initramfs", &spec.initramfs)] {
        let opened = File::open(path).and_then(|file| file.metadata());
        let regular = opened.and_then(|meta| match meta.is_file() {
            true => Ok(()),
            false => Err(io::Error::other("it is no regular file")),
        });
        regular.map_err(|source| MachineError::File {
            what,
            path: path.clone(),
            source,
        })?;
    }
    if accelerator == Accelerator::Kvm {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|error| MachineError::Kvm(format!("/dev/kvm: {error}")))?;
    }
    Ok(())
}

/// The kernel as QEMU is given it: plain where it can be entered at its PVH entry, which
/// spares the guest the unpacking of it; as it is otherwise. What is inherited for it is appended
/// to `inherited`.
pub(super) fn kernel(
    spec: &MachineSpec,
    inherited: &mut Vec<OwnedFd>,
) -> Result<PathBuf, MachineError> {
    let unusable = |error: &KernelError| MachineError::Kernel {
        path: spec.kernel.clone(),
        reason: match error {
            KernelError::Read(source) => format!("{error}: {source}"),
            _ => error.to_string(),
        },
    };
    let cache = cache::directory();
    let plain = cache::plain(&spec.kernel, cache.as_deref()).map_err(|e| unusable(&e))?;
    match plain {
        Some(Plain::Kept(path)) => {
            let file = File::open(&path).map_err(|e| unusable(&e.into()))?;
            if elf::has_pvh_entry(&file) {
                return Ok(path);
            }
        }
        Some(Plain::Memory(file)) if elf::has_pvh_entry(&file) => {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            inherited.push(file.into());
            return Ok(path.into());
        }
        _ => {}
    }
    Ok(spec.kernel.clone())
}

/// Connects to every backend. What is inherited is appended to `inherited`.
pub(super) fn connect(
    spec: &MachineSpec,
    inherited: &mut Vec<OwnedFd>,
) -> Result<Connections, MachineError> {
    let mut connections = Connections::default();
    for disk in &spec.disks {
        let fd = connect_one(&disk.id, &disk.socket)?;
        connections.disks.push(fd.as_raw_fd());
        inherited.push(fd);
    }
    for share in &spec.shares {
        let fd = connect_one(&share.id, &share.socket)?;
        connections.shares.push(fd.as_raw_fd());
        inherited.push(fd);
    }
    if let Some(vsock) = &spec.vsock {
        let fd = connect_one(&vsock.id, &vsock.socket)?;
        connections.vsock = Some(fd.as_raw_fd());
        inherited.push(fd);
    }
    Ok(connections)
}

fn connect_one(device: &str, socket: &Path) -> Result<OwnedFd, MachineError> {
    let connected = || -> Result<OwnedFd, Errno> {
        let address = SocketAddrUnix::new(socket)?;
        // Without waiting: a backend with a full backlog takes no front end.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&fd, &address)?;
        rustix::fs::fcntl_setfl(&fd, OFlags::empty())?;
        Ok(fd)
    };
    connected().map_err(|errno| MachineError::Backend {
        device: device.to_owned(),
        socket: socket.to_owned(),
        reason: match errno {
            Errno::AGAIN => "it is busy with other front ends".into(),
            other => io::Error::from(other).to_string(),
        },
    })
}

/// What kept QEMU from coming up, if its end or its `words` tell.
pub(super) fn diagnose(
    spec: &MachineSpec,
    status: Option<ExitStatus>,
    words: &[String],
) -> Option<MachineError> {
    let memory = |reason: &str| MachineError::Memory {
        bytes: spec.memory,
        reason: reason.to_owned(),
    };
    if status.and_then(|status| status.signal()) == Some(libc::SIGXFSZ) {
        return Some(memory("it is more than the limit of a file's size"));
    }
    let disks = spec.disks.iter().enumerate();
    let disks = disks.map(|(index, disk)| (disk_device(index, disk), &disk.id, &disk.socket));
    let shares = spec.shares.iter().enumerate();
    let shares =
        shares.map(|(index, share)| (share_device(index, share), &share.id, &share.socket));
    let vsock = spec.vsock.iter();
    let vsock = vsock.map(|vsock| (vsock_device(vsock), &vsock.id, &vsock.socket));
    let devices = disks.chain(shares).chain(vsock);
    let devices = devices.map(|(option, id, socket)| (format!("-device {option}"), id, socket));
    let cards = spec.cards.iter().enumerate().flat_map(|(index, card)| {
        let kinds = [Accelerator::Kvm, Accelerator::Tcg];
        let cards = kinds.map(|kind| format!("-device {}", card_device(kind, index, card)));
        let backend = format!("-netdev {}", card_backend(index, card));
        let all = cards.into_iter().chain([backend]);
        all.map(|option| (option, &card.id, &card.socket))
    });
    let sockets = spec.cards.iter().enumerate().map(|(index, card)| {
        let option = format!("-chardev {}", card_socket(index, card));
        (option, &card.id, &card.socket)
    });
    let devices: Vec<_> = devices.chain(cards).chain(sockets).collect();
    // The last line is QEMU's own summary of those before it.
    for line in words.iter().rev() {
        if let Some((_, reason)) = line.split_once("failed to initialize kvm: ") {
            return Some(MachineError::Kvm(reason.to_owned()));
        }
        if ["guest RAM: ", "guest memory", "memfd"]
            .iter()
            .any(|about| line.contains(about))
        {
            let reason = line.rsplit(": ").next().unwrap_or(line);
            return Some(memory(reason));
        }
        for (option, device, socket) in &devices {
            let about = format!("{option}: ");
            let Some((_, last)) = line.split_once(&about) else {
                continue;
            };
            if last.starts_with("warning: ") {
                continue;
            }
            // QEMU tries a disk again, on a connection that it has closed: the first reason counts.
            let again = format!("{about}Reconnecting after error: ");
            let first = words.iter().find_map(|line| line.split_once(&again));
            return Some(MachineError::Backend {
                device: (*device).clone(),
                socket: (*socket).clone(),
                reason: first.map_or(last, |(_, reason)| reason).to_owned(),
            });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::sample;

    /// The messages are those of QEMU 7.2.
    #[test]
    fn words_of_qemu_are_understood() {
        let spec = sample();
        let of = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|line| (*line).to_owned()).collect();
            diagnose(&spec, None, &words).map(|error| error.to_string())
        };
        let cases: [(&[&str], &str); 6] = [
            (
                &[
                    "kvm version too old",
                    "qemu-system-x86_64: -accel kvm: failed to initialize kvm: Inappropriate \
                     ioctl for device",
                ],
                "KVM cannot be used (Inappropriate ioctl for device); ask for qemu-tcg, which \
                 emulates the CPU",
            ),
            (
                &[
                    "qemu-system-x86_64: unable to map backing store for guest RAM: Cannot allocate memory",
                ],
                "there are no 256 MiB of memory for the virtual machine: Cannot allocate memory",
            ),
            (
                &[
                    "qemu-system-x86_64: -device vhost-user-vsock-pci,id=vsock,chardev=vsock0: \
                     Failed to read msg header. Flags 0x78787878 instead of 0x5.",
                    "qemu-system-x86_64: -device vhost-user-vsock-pci,id=vsock,chardev=vsock0: \
                     vhost_backend_init failed: Protocol error",
                ],
                "the backend of device 'vsock' at '/run/x/vsock.sock' cannot be used: \
                 vhost_backend_init failed: Protocol error",
            ),
            (
                &[
                    "qemu-system-x86_64: -device vhost-user-fs-pci,id=data,chardev=share0,\
                     tag=share.1,num-request-queues=2,queue-size=1024,addr=0x1d.0,\
                     multifunction=on: vhost_backend_init failed: Protocol error",
                ],
                "the backend of device 'data' at '/run/x/data.sock' cannot be used: \
                 vhost_backend_init failed: Protocol error",
            ),
            (
                &[
                    "qemu-system-x86_64: -netdev vhost-user,id=net0,chardev=card0,queues=2: you are \
                     asking more queues than supported: 1",
                ],
                "the backend of device 'eth0' at '/run/x/eth,0.sock' cannot be used: you are asking \
                 more queues than supported: 1",
            ),
            (
                &[
                    "qemu-system-x86_64: -device vhost-user-blk-pci,id=root,chardev=disk0,\
                     num-queues=2,queue-size=128: Failed to write msg. Wrote -1 instead of 12.",
                    "qemu-system-x86_64: -device vhost-user-blk-pci,id=root,chardev=disk0,\
                     num-queues=2,queue-size=128: Reconnecting after error: \
                     vhost_backend_init failed: Protocol error",
                    "qemu-system-x86_64: -device vhost-user-blk-pci,id=root,chardev=disk0,\
                     num-queues=2,queue-size=128: File descriptor '13' is not a socket",
                ],
                "the backend of device 'root' at '/run/x/root,1.sock' cannot be used: \
                 vhost_backend_init failed: Protocol error",
            ),
        ];
        for (words, error) in cases {
            assert_eq!(of(words).as_deref(), Some(error));
        }
        assert_eq!(of(&["qemu: invalid kernel header"]), None);
        let warning = "qemu-system-x86_64: -netdev vhost-user,id=net0,chardev=card0,queues=2: \
                       warning: vhost-user backend supports more than QEMU";
        assert_eq!(of(&[warning, "qemu: could not open kernel file"]), None);
    }
}
