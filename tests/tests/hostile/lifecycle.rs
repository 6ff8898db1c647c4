//! Rings that stop, start and change under load, memory that moves or goes
//! away, and front ends that come at the wrong time.

use std::time::Duration;

use pericarp_tests::conformance::{Case, Outcome, SCRATCH_SECTOR, SCRATCH_SECTORS};
use pericarp_tests::frontend::{
    ADJACENT, Chain, Driver, FAR, HEADER, Op, STATUS, Setup, UNTOUCHED,
};
use pericarp_tests::peer;
use pericarp_tests::peer::Kind::{QemuStorageDaemon as Qemu, Reference};
use pericarp_tests::wire::{self, message, request};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::{OK, judged, must};

const SIGBUS: &str = "dies of SIGBUS";
const DEPTH: u64 = 32;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("ring stopped under load", stopped)
            .reconnect()
            .differs(Qemu, "7.2 answers GET_VRING_BASE with requests in flight"),
        Case::new("ring stopped and started again", restarted),
        Case::new("firmware's small ring, then the kernel's", resized).reconnect(),
        Case::new("ring disabled and enabled under load", paused),
        Case::new("device reset under load", reset)
            .reconnect()
            .differs(
                Reference,
                "vhost-user-backend does not wait for its queue threads",
            ),
        Case::new("RESET_OWNER", |d| Ok(d.frontend.reset_owner()?)).reconnect(),
        Case::new("the same memory table again, under load", same_memory)
            .differs(Qemu, "7.2 unmaps under its own requests, which then fail"),
        Case::new("region removed and added", hotplug)
            .differs(Qemu, "7.2 unmaps with I/O in flight or refuses"),
        Case::new("regions in reverse order", reversed)
            .differs(Reference, "vm-memory wants them sorted"),
        Case::new("front end gone under load, 50 times", vanished),
        Case::new("memory behind the rings cut off", |d| cut(d, 0))
            .reconnect()
            .differs(Qemu, SIGBUS)
            .differs(Reference, SIGBUS),
        Case::new("memory behind the data cut off", |d| cut(d, 1))
            .reconnect()
            .differs(Reference, SIGBUS),
        Case::new("second front end while the first is served", second).reconnect(),
        Case::new("ring memory overwritten with noise", noise).reconnect(),
    ]
}

/// The same where guest memory is registered, and so pinned: what a front end
/// cuts off is out of its own sight, but requests still reach it.
pub(crate) fn with_pinned_memory() -> Vec<Case> {
    let mut cases = cases();
    for case in &mut cases {
        if case.name == "memory behind the data cut off" {
            case.act = |d| cut_data(d, &[OK, crate::IOERR]);
        }
    }
    cases
}

/// Offers writes of 4 KiB in all slots, without waiting.
fn load(d: &mut Driver) -> Outcome {
    for slot in 0..DEPTH {
        let sector = SCRATCH_SECTOR + slot * 8 % SCRATCH_SECTORS;
        let chain = d.prepare(
            slot,
            &Op::Write {
                sector,
                data: vec![slot as u8; 4096],
            },
        )?;
        d.place(0, slot as u16 * 3, &chain);
        d.rings[0].queue(slot as u16 * 3);
    }
    d.rings[0].publish();
    d.rings[0].notify();
    Ok(())
}

/// All of [`load`]'s writes must have come back well.
fn all_done(d: &mut Driver) -> Outcome {
    let limit = d.limit;
    d.rings[0].watch(DEPTH as usize, limit)?;
    for slot in 0..DEPTH {
        judged(d, STATUS(slot), &[OK])?;
    }
    Ok(())
}

fn stopped(d: &mut Driver) -> Outcome {
    for _ in 0..20 {
        load(d)?;
        let base = d.stop(0)?;
        let used = d.rings[0].used_idx();
        // Nothing may be in flight after the answer: what was taken is done,
        // what was not taken is for the next start.
        must(
            base == used,
            &format!("stopped at {base}, but completed {used}"),
        )?;
        let taken = base.wrapping_sub(d.rings[0].seen());
        for slot in 0..DEPTH {
            let status = d.peek(STATUS(slot), 1)?[0];
            let want = if slot < u64::from(taken) {
                OK
            } else {
                UNTOUCHED
            };
            must(
                status == want,
                &format!("slot {slot} of {taken} taken: status {status}"),
            )?;
        }
        d.rings[0].reset(128);
        d.configure(0)?;
        d.enable(0, true)?;
    }
    Ok(())
}

fn restarted(d: &mut Driver) -> Outcome {
    d.request(0, &Op::Flush)?;
    let base = d.stop(0)?;
    must(base == 1, &format!("one request, stopped at {base}"))?;
    d.configure(0)?;
    d.enable(0, true)?;
    d.request(0, &Op::Flush)?;
    Ok(())
}

fn resized(d: &mut Driver) -> Outcome {
    for size in [16, 128, 2, 256, 64] {
        d.stop(0)?;
        d.rings[0].reset(size);
        d.configure(0)?;
        d.enable(0, true)?;
        for _ in 0..5 {
            // Two descriptors: fits the smallest ring.
            d.head(0, 4, 0)?;
            let chain = Chain::new().read(HEADER(0), 16).write(STATUS(0), 1);
            d.play(0, &chain)
                .map_err(|error| format!("ring of {size}: {error}"))?;
            judged(d, STATUS(0), &[OK])?;
        }
    }
    Ok(())
}

fn paused(d: &mut Driver) -> Outcome {
    for _ in 0..20 {
        load(d)?;
        d.enable(0, false)?;
        d.enable(0, true)?;
        all_done(d)?;
    }
    let _ = d.rings[0].called();
    Ok(())
}

fn reset(d: &mut Driver) -> Outcome {
    if !d.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE) {
        return Ok(());
    }
    load(d)?;
    d.frontend.reset_device()?;
    let used = d.rings[0].used_idx();
    std::thread::sleep(Duration::from_millis(50));
    must(
        d.rings[0].used_idx() == used,
        "completions after the reset was answered",
    )
}

fn same_memory(d: &mut Driver) -> Outcome {
    for _ in 0..20 {
        load(d)?;
        d.send_memory()?;
        all_done(d)?;
    }
    let _ = d.rings[0].called();
    Ok(())
}

fn hotplug(d: &mut Driver) -> Outcome {
    if !d
        .protocol
        .contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    {
        return Ok(());
    }
    let region = d.guest.table()[2];
    for _ in 0..10 {
        // In flight into the region that goes away.
        for slot in 0..8 {
            d.head(slot, 0, 0)?;
            let chain = Chain::new().read(HEADER(slot), 16);
            let chain = chain.write(FAR + slot * 4096, 4096).write(STATUS(slot), 1);
            d.place(0, slot as u16 * 3, &chain);
            d.rings[0].queue(slot as u16 * 3);
        }
        d.rings[0].publish();
        d.rings[0].notify();
        d.frontend.remove_mem_region(&region)?;
        let limit = d.limit;
        d.rings[0].watch(8, limit)?;
        // Gone: must be refused now.
        d.head(0, 0, 0)?;
        let chain = Chain::new()
            .read(HEADER(0), 16)
            .write(FAR, 512)
            .write(STATUS(0), 1);
        let _ = d.rings[0].called();
        d.play(0, &chain)?;
        judged(d, STATUS(0), &[crate::IOERR])?;
        d.frontend.add_mem_region(&region)?;
        d.head(0, 0, 0)?;
        d.play(0, &chain)?;
        judged(d, STATUS(0), &[OK])?;
    }
    Ok(())
}

fn reversed(d: &mut Driver) -> Outcome {
    let mut table = d.guest.table();
    table.reverse();
    d.frontend.set_mem_table(&table)?;
    d.request(0, &Op::Flush)?;
    d.head(0, 0, 0)?;
    let chain = Chain::new()
        .read(HEADER(0), 16)
        .write(ADJACENT, 512)
        .write(STATUS(0), 1);
    d.play(0, &chain)?;
    judged(d, STATUS(0), &[OK]).map(drop)
}

/// The same socket, from the connection's own end.
fn socket(d: &Driver) -> std::path::PathBuf {
    let address = d.stream.peer_addr().unwrap();
    address.as_pathname().unwrap().to_owned()
}

fn vanished(d: &mut Driver) -> Outcome {
    let socket = socket(d);
    let old = std::mem::replace(d, reconnect_after(d, &socket)?);
    drop(old);
    for _ in 0..50 {
        load(d)?;
        let fresh = reconnect_after(d, &socket)?;
        drop(std::mem::replace(d, fresh));
    }
    Ok(())
}

/// Hangs up, then connects again: a backend serves one front end at a time.
fn reconnect_after(
    d: &Driver,
    socket: &std::path::Path,
) -> Result<Driver, Box<dyn std::error::Error>> {
    d.stream.shutdown(std::net::Shutdown::Both)?;
    Ok(Driver::connect(socket, &Setup::default())?)
}

fn cut(d: &mut Driver, region: usize) -> Outcome {
    // A backend that seals the memory is fine, too.
    if d.guest.files[region].set_len(0).is_err() {
        return Ok(());
    }
    if region == 0 {
        // Our own view is gone as well: only the kick is left to us.
        d.rings[0].notify();
        std::thread::sleep(Duration::from_millis(50));
        return Ok(());
    }
    requests_without_memory(d, &[crate::IOERR])
}

fn cut_data(d: &mut Driver, allowed: &[u8]) -> Outcome {
    d.guest.files[1].set_len(0)?;
    requests_without_memory(d, allowed)
}

fn requests_without_memory(d: &mut Driver, allowed: &[u8]) -> Outcome {
    for kind in [0, 1] {
        d.head(0, kind, SCRATCH_SECTOR)?;
        let chain = Chain::new().read(HEADER(0), 16);
        let chain = if kind == 0 {
            chain.write(ADJACENT, 512)
        } else {
            chain.read(ADJACENT, 512)
        };
        d.play(0, &chain.write(STATUS(0), 1))?;
        judged(d, STATUS(0), allowed)?;
    }
    Ok(())
}

fn second(d: &mut Driver) -> Outcome {
    let other = peer::connect(&socket(d))?;
    // It may wait or be turned away; the first must not notice.
    let _ = wire::send(
        &other,
        &message(request::GET_FEATURES, wire::VERSION, &[]),
        &[],
    );
    for _ in 0..20 {
        d.request(
            0,
            &Op::Read {
                sector: 0,
                len: 4096,
            },
        )?;
    }
    drop(other);
    d.request(0, &Op::Flush)?;
    Ok(())
}

fn noise(d: &mut Driver) -> Outcome {
    use pericarp_tests::model::Sequence;
    let mut sequence = Sequence::new(99);
    for _ in 0..50 {
        let at = d.rings[0].desc_at(0);
        // Random descriptors, whose addresses mostly point outside.
        d.poke(at, &sequence.bytes(128 * 16))?;
        for _ in 0..8 {
            let head = sequence.below(128) as u16;
            d.rings[0].queue(head);
        }
        d.rings[0].publish();
        d.rings[0].notify();
        let _ = d.rings[0].watch(8, Duration::from_millis(20));
    }
    Ok(())
}
