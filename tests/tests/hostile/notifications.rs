//! Kicks and calls: none may be lost, none sent that was not asked for, and no
//! file descriptor a front end can hand over may stop the device.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

use pericarp_tests::conformance::{Case, Outcome};
use pericarp_tests::frontend::{Driver, Op, bit};
use pericarp_tests::peer::Kind::{QemuStorageDaemon as Qemu, Reference};
use pericarp_tests::wire::{self, NO_FD, message, request, words};
use vhost::VhostBackend;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use crate::must;

/// Long enough for a call that must not come to come.
const QUIET: Duration = Duration::from_millis(30);

const BLOCKS: &str = "its queue thread blocks in the write";

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("70,000 requests, event index", |d| many(d, 70_000)),
        Case::new("70,000 requests, flags", |d| many(d, 70_000)).with(|s| s.event_idx = false),
        Case::new("kick before enable", early_kick)
            .with(|s| s.enable = false)
            .differs(Qemu, "serves a ring from its first kick, enabled or not"),
        Case::new("work offered before the ring is configured", early_work)
            .with(|s| (s.rings, s.enable) = (false, false)),
        Case::new("no call until the event index is reached", event_index),
        Case::new("no call when interrupts are off", no_interrupt)
            .with(|s| s.event_idx = false)
            .differs(Reference, "virtio-queue 0.18 ignores NO_INTERRUPT"),
        Case::new("kicks without work", spurious),
        Case::new("one kick for many requests", one_kick),
        Case::new("kick eventfd replaced", new_kick).differs(
            Reference,
            "vhost-user-backend 0.24 does not watch a second kick fd",
        ),
        Case::new("call eventfd replaced", new_call),
        Case::new("no call eventfd", no_call).differs(Qemu, "stops serving a ring that has none"),
        Case::new("call eventfd full", full_call)
            .with(|s| s.queues = 2)
            .differs(Qemu, "writes it blocking, and all queues share a thread")
            .differs(Reference, BLOCKS),
        Case::new("call pipe full", full_pipe)
            .with(|s| s.queues = 2)
            .reconnect()
            .differs(Qemu, "reads and writes it as an eventfd, blocking")
            .differs(Reference, BLOCKS),
        Case::new("call pipe without reader", broken_pipe)
            .reconnect()
            .differs(Qemu, "gives up on the connection")
            .differs(Reference, "stops at the first call it cannot send"),
        Case::new("kick pipe without writer", dead_kick).reconnect(),
        Case::new("kick is a regular file", file_kick).reconnect(),
        Case::new("two queues, only the second used", second_only).with(|s| s.queues = 2),
    ]
}

fn read() -> Op {
    Op::Read {
        sector: 0,
        len: 512,
    }
}

/// Keeps up to 32 in flight until `total` have come back, each by its call.
fn many(d: &mut Driver, total: usize) -> Outcome {
    const DEPTH: u64 = 32;
    for slot in 0..DEPTH {
        let chain = d.prepare(slot, &read())?;
        d.place(0, slot as u16 * 4, &chain);
        d.rings[0].queue(slot as u16 * 4);
    }
    d.rings[0].publish();
    d.rings[0].notify();
    let mut done = 0;
    while done < total {
        let limit = d.limit;
        let back = d.rings[0]
            .wait(1, limit)
            .map_err(|error| format!("after {done}: {error}"))?;
        done += back.len();
        for used in back {
            must(
                used.len == 513,
                &format!("request {done}: used length {}", used.len),
            )?;
            d.rings[0].queue(used.head as u16);
        }
        d.rings[0].publish();
        d.rings[0].notify();
    }
    let limit = d.limit;
    d.rings[0].watch(DEPTH as usize, limit)?;
    let _ = d.rings[0].called();
    Ok(())
}

fn early_kick(d: &mut Driver) -> Outcome {
    let chain = d.prepare(0, &read())?;
    d.place(0, 0, &chain);
    d.offer(0, 0);
    std::thread::sleep(QUIET);
    must(d.rings[0].used_idx() == 0, "a disabled ring was served")?;
    d.enable(0, true)?;
    d.settled(0, 0)?;
    Ok(())
}

fn early_work(d: &mut Driver) -> Outcome {
    let chain = d.prepare(0, &read())?;
    d.place(0, 0, &chain);
    d.offer(0, 0);
    d.configure(0)?;
    d.enable(0, true)?;
    d.settled(0, 0)?;
    Ok(())
}

/// Offers `count` reads whose completion `count - 1` others precede.
fn offer_some(d: &mut Driver, count: u64) -> Outcome {
    for slot in 0..count {
        let chain = d.prepare(slot, &read())?;
        d.place(0, slot as u16 * 4, &chain);
        d.rings[0].queue(slot as u16 * 4);
    }
    Ok(())
}

fn event_index(d: &mut Driver) -> Outcome {
    if d.features & bit(VIRTIO_RING_F_EVENT_IDX) == 0 {
        return Ok(());
    }
    let limit = d.limit;
    // A device may always call for its first completion.
    d.request(0, &read())?;
    let _ = d.rings[0].called();
    offer_some(d, 3)?;
    let start = d.rings[0].seen();
    d.rings[0].publish_quiet(start.wrapping_add(3));
    d.rings[0].notify();
    d.rings[0].watch(3, limit)?;
    std::thread::sleep(QUIET);
    must(!d.rings[0].called(), "called before the fourth completion")?;
    offer_some(d, 1)?;
    d.rings[0].publish_quiet(start.wrapping_add(3));
    d.rings[0].notify();
    d.rings[0].wait(1, limit)?;
    Ok(())
}

fn no_interrupt(d: &mut Driver) -> Outcome {
    let limit = d.limit;
    d.request(0, &read())?;
    let _ = d.rings[0].called();
    d.rings[0].set_no_interrupt(true);
    offer_some(d, 8)?;
    d.rings[0].publish();
    d.rings[0].notify();
    d.rings[0].watch(8, limit)?;
    std::thread::sleep(QUIET);
    let called = d.rings[0].called();
    d.rings[0].set_no_interrupt(false);
    must(!called, "called although interrupts were off")?;
    d.request(0, &read())?;
    Ok(())
}

fn spurious(d: &mut Driver) -> Outcome {
    for _ in 0..1000 {
        d.rings[0].notify();
    }
    std::thread::sleep(QUIET);
    must(d.rings[0].used_idx() == 0, "something was completed")
}

fn one_kick(d: &mut Driver) -> Outcome {
    let limit = d.limit;
    for _ in 0..200 {
        offer_some(d, 32)?;
        d.rings[0].publish();
        d.rings[0].notify();
        d.rings[0].wait(32, limit)?;
    }
    Ok(())
}

fn new_kick(d: &mut Driver) -> Outcome {
    d.request(0, &read())?;
    d.rings[0].renew_kick();
    d.frontend.set_vring_kick(0, &d.rings[0].kick)?;
    d.request(0, &read())?;
    Ok(())
}

fn new_call(d: &mut Driver) -> Outcome {
    d.request(0, &read())?;
    d.rings[0].renew_call();
    d.frontend.set_vring_call(0, &d.rings[0].call)?;
    d.request(0, &read())?;
    Ok(())
}

fn no_call(d: &mut Driver) -> Outcome {
    let limit = d.limit;
    wire::send(
        &d.stream,
        &message(request::SET_VRING_CALL, wire::VERSION, &words(&[NO_FD])),
        &[],
    )?;
    // A round trip: the message before it has been dealt with.
    d.config(8)?;
    offer_some(d, 4)?;
    d.rings[0].publish();
    d.rings[0].notify();
    d.rings[0].watch(4, limit)?;
    d.frontend.set_vring_call(0, &d.rings[0].call)?;
    d.request(0, &read())?;
    Ok(())
}

/// Makes the first ring's call impossible, then demands the second's work.
fn others_go_on(d: &mut Driver) -> Outcome {
    offer_some(d, 4)?;
    d.rings[0].publish();
    d.rings[0].notify();
    d.request(1, &read())?;
    let limit = d.limit;
    d.rings[0].watch(4, limit)?;
    d.request(1, &read())?;
    Ok(())
}

fn full_call(d: &mut Driver) -> Outcome {
    let call = EventFd::new(0)?;
    // One more does not fit, and the file is in blocking mode.
    call.write(u64::MAX - 1)?;
    d.frontend.set_vring_call(0, &call)?;
    let done = others_go_on(d);
    // Whoever is stuck in a write gets free again.
    let _ = call.read();
    d.frontend.set_vring_call(0, &d.rings[0].call)?;
    done
}

fn set_call(d: &Driver, file: &impl AsFd) -> Outcome {
    let bytes = message(request::SET_VRING_CALL, wire::VERSION, &words(&[0]));
    Ok(wire::send(&d.stream, &bytes, &[file.as_fd()])?)
}

fn full_pipe(d: &mut Driver) -> Outcome {
    let (reader, mut writer) = std::io::pipe()?;
    rustix::pipe::fcntl_setpipe_size(&writer, 4096)?;
    writer.write_all(&[0; 4096])?;
    set_call(d, &writer)?;
    let done = others_go_on(d);
    drop((reader, writer));
    done
}

fn broken_pipe(d: &mut Driver) -> Outcome {
    let limit = d.limit;
    let (reader, writer) = std::io::pipe()?;
    set_call(d, &writer)?;
    drop(reader);
    d.config(8)?;
    offer_some(d, 4)?;
    d.rings[0].publish();
    d.rings[0].notify();
    d.rings[0].watch(4, limit)?;
    Ok(())
}

fn set_kick(d: &Driver, file: &impl AsFd) -> Outcome {
    let bytes = message(request::SET_VRING_KICK, wire::VERSION, &words(&[0]));
    Ok(wire::send(&d.stream, &bytes, &[file.as_fd()])?)
}

fn dead_kick(d: &mut Driver) -> Outcome {
    let (reader, writer) = std::io::pipe()?;
    set_kick(d, &reader)?;
    drop(writer);
    std::thread::sleep(QUIET);
    Ok(())
}

fn file_kick(d: &mut Driver) -> Outcome {
    set_kick(d, &d.guest.files[0])?;
    std::thread::sleep(QUIET);
    Ok(())
}

fn second_only(d: &mut Driver) -> Outcome {
    for _ in 0..10 {
        d.request(1, &read())?;
    }
    Ok(())
}
