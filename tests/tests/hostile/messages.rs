//! Messages no front end should send. The backend may answer with an error or
//! hang up; it must neither die nor refuse the next front end.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use pericarp_tests::conformance::{Case, Outcome};
use pericarp_tests::frontend::Driver;
use pericarp_tests::model::Sequence;
use pericarp_tests::peer::Kind::QemuStorageDaemon as Qemu;
use pericarp_tests::wire::{
    self, NEED_REPLY, NO_FD, VERSION, message, request, sized, state, words,
};

pub(crate) fn cases() -> Vec<Case> {
    let cases = vec![
        Case::new("noise", |d| raw(d, &Sequence::new(1).bytes(4096), &[])),
        Case::new("half a header", |d| raw(d, &[1, 0, 0, 0, 1, 0], &[])),
        Case::new("half a payload", |d| {
            raw(d, &sized(request::SET_FEATURES, VERSION, 8, &[0; 3]), &[])
        }),
        Case::new("payload of 4 GiB", |d| {
            raw(
                d,
                &sized(request::SET_FEATURES, VERSION, u32::MAX, &[0; 64]),
                &[],
            )
        }),
        Case::new("payload too short", |d| {
            send(d, request::SET_FEATURES, &[0; 4])
        }),
        Case::new("payload too long", |d| {
            send(d, request::SET_FEATURES, &[0; 64])
        }),
        Case::new("no payload", |d| send(d, request::SET_VRING_ADDR, &[])),
        Case::new("unknown request", |d| send(d, 250, &[])),
        Case::new("request 0", |d| send(d, 0, &[])),
        Case::new("version 3", |d| {
            raw(d, &message(request::GET_FEATURES, 3, &[]), &[])
        }),
        Case::new("a reply instead of a request", |d| {
            raw(
                d,
                &message(request::GET_FEATURES, VERSION | 4, &[0; 8]),
                &[],
            )
        }),
        Case::new("eight surplus file descriptors", surplus_fds),
        Case::new("all features", |d| {
            send(d, request::SET_FEATURES, &words(&[u64::MAX]))
        }),
        Case::new("no features", |d| {
            send(d, request::SET_FEATURES, &words(&[0]))
        }),
        Case::new("all protocol features", |d| {
            send(d, request::SET_PROTOCOL_FEATURES, &words(&[u64::MAX]))
        }),
        Case::new("owner twice", |d| send(d, request::SET_OWNER, &[])),
        Case::new("memory table without files", |d| {
            table(d, 2, &[(0, 4096), (4096, 4096)], 0)
        }),
        Case::new("memory table with nine regions", |d| {
            table(d, 9, &[(0, 4096); 9], 1)
        }),
        Case::new("memory table that counts too many", |d| {
            table(d, 8, &[(0, 4096)], 1)
        }),
        Case::new("memory table that counts 2^32-1", |d| {
            table(d, u32::MAX, &[(0, 4096)], 1)
        })
        .differs(Qemu, "believes it, and crashes"),
        Case::new("memory table with no region", |d| table(d, 0, &[], 0)),
        Case::new("region of no bytes", |d| table(d, 1, &[(0, 0)], 1)),
        Case::new("region of 2^64-1 bytes", |d| {
            table(d, 1, &[(0, u64::MAX)], 1)
        }),
        Case::new("region that wraps around", |d| {
            table(d, 1, &[(u64::MAX - 4095, 8192)], 1)
        }),
        Case::new("regions that overlap", |d| {
            table(d, 2, &[(0, 8192), (4096, 8192)], 2)
        }),
        Case::new("region longer than its file", |d| {
            table(d, 1, &[(0, 1 << 40)], 1)
        }),
        Case::new("region added from a directory", added_directory),
        Case::new("ring of no entries", |d| {
            send(d, request::SET_VRING_NUM, &state(0, 0))
        }),
        Case::new("ring of three entries", |d| {
            send(d, request::SET_VRING_NUM, &state(0, 3))
        }),
        Case::new("ring of 65536 entries", |d| {
            send(d, request::SET_VRING_NUM, &state(0, 65536))
        }),
        Case::new("ring addresses outside", |d| {
            addr(d, 0, [1 << 50, 1 << 51, 1 << 52])
        }),
        Case::new("ring addresses at zero", |d| addr(d, 0, [0, 0, 0])),
        Case::new("ring addresses at the top", |d| {
            addr(d, 0, [u64::MAX - 15; 3])
        }),
        Case::new("ring base 2^32-1", |d| {
            send(d, request::SET_VRING_BASE, &state(0, u32::MAX))
        }),
        Case::new("ring addresses at the end of memory", last_page),
        Case::new("ring addresses unaligned", unaligned),
        Case::new("kick without file", |d| {
            send(d, request::SET_VRING_KICK, &words(&[0]))
        }),
        Case::new("call without file", |d| {
            send(d, request::SET_VRING_CALL, &words(&[0]))
        }),
        Case::new("no kick file at all", |d| {
            send(d, request::SET_VRING_KICK, &words(&[NO_FD]))
        }),
        Case::new("configuration past its end", |d| config(d, 200, 256)),
        Case::new("configuration of 4 GiB", |d| config(d, 0, u32::MAX)),
        Case::new("configuration of no bytes", |d| config(d, 0, 0)),
        Case::new("enable with 7", |d| {
            send(d, request::SET_VRING_ENABLE, &state(0, 7))
        }),
        Case::new("SET_VRING_NUM of queue 200", |d| {
            send(d, request::SET_VRING_NUM, &state(200, 16))
        }),
        Case::new("SET_VRING_BASE of queue 200", |d| {
            send(d, request::SET_VRING_BASE, &state(200, 0))
        }),
        Case::new("SET_VRING_ENABLE of queue 200", |d| {
            send(d, request::SET_VRING_ENABLE, &state(200, 1))
        }),
        Case::new("ring addresses of queue 200", |d| addr(d, 200, [0; 3])),
        Case::new("GET_VRING_BASE of queue 200", |d| {
            send(d, request::GET_VRING_BASE, &state(200, 0))
        })
        .differs(Qemu, "libvhost-user asserts that there is such a queue"),
        Case::new("hang-up in the middle of a conversation", |d| {
            Ok(d.stream.shutdown(std::net::Shutdown::Both)?)
        }),
    ];
    // Whatever the answer, the connection may be over.
    cases.into_iter().map(Case::reconnect).collect()
}

/// Sends bytes and listens for a moment; every answer is fine, and so is none.
fn raw(d: &mut Driver, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Outcome {
    d.stream.set_read_timeout(Some(Duration::from_millis(20)))?;
    // The backend may hang up while we still send.
    if wire::send(&d.stream, bytes, fds).is_ok() {
        let _ = wire::receive(&d.stream);
    }
    // A ring that still runs after this must not bring it down either.
    d.rings[0].notify();
    Ok(())
}

fn send(d: &mut Driver, number: u32, payload: &[u8]) -> Outcome {
    raw(d, &message(number, VERSION | NEED_REPLY, payload), &[])
}

fn surplus_fds(d: &mut Driver) -> Outcome {
    let file = d.guest.files[0].try_clone()?;
    raw(
        d,
        &message(request::GET_FEATURES, VERSION, &[]),
        &[file.as_fd(); 8],
    )
}

/// A memory table that says `count` and holds `regions` and `files` files.
fn table(d: &mut Driver, count: u32, regions: &[(u64, u64)], files: usize) -> Outcome {
    let mut payload = words(&[u64::from(count)]);
    for (start, len) in regions {
        payload.extend(words(&[
            *start,
            *len,
            start.wrapping_add(0x7000_0000_0000),
            0,
        ]));
    }
    let file = d.guest.files[0].try_clone()?;
    let fds = vec![file.as_fd(); files];
    raw(
        d,
        &message(request::SET_MEM_TABLE, VERSION | NEED_REPLY, &payload),
        &fds,
    )
}

fn added_directory(d: &mut Driver) -> Outcome {
    let directory = std::fs::File::open("/")?;
    let payload = words(&[0, 1 << 40, 4096, 1 << 46, 0]);
    let bytes = message(request::ADD_MEM_REG, VERSION | NEED_REPLY, &payload);
    raw(d, &bytes, &[directory.as_fd()])
}

fn addr(d: &mut Driver, queue: u32, [desc, used, avail]: [u64; 3]) -> Outcome {
    let payload = [state(queue, 0), words(&[desc, used, avail, 0])].concat();
    send(d, request::SET_VRING_ADDR, &payload)
}

/// The rings begin in memory and end outside.
fn last_page(d: &mut Driver) -> Outcome {
    let end = d.guest.pointer(pericarp_tests::frontend::FAR)? + (1 << 20);
    addr(d, 0, [end - 64, end - 32, end - 16])
}

fn unaligned(d: &mut Driver) -> Outcome {
    let base = d.guest.pointer(0)?;
    addr(d, 0, [base + 1, base + 0x8001, base + 0x4001])
}

fn config(d: &mut Driver, offset: u32, size: u32) -> Outcome {
    let mut payload = Vec::new();
    for word in [offset, size, 0] {
        payload.write_all(&word.to_le_bytes())?;
    }
    payload.resize(12 + size.min(256) as usize, 0);
    send(d, request::GET_CONFIG, &payload)
}
