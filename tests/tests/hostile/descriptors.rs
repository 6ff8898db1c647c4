//! Descriptors that are not what they should be: kicks that cannot be waited
//! for, calls that cannot be written, ring memory that goes and comes back.
//!
//! Ours alone is held to these; what the peers do here was not looked into.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use pericarp_tests::conformance::{Case, Outcome};
use pericarp_tests::frontend::{Chain, Driver, HEADER, Op, STATUS};
use pericarp_tests::wire::{self, message, request, words};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags, fcntl_setfl};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::{OK, judged, must};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("ring memory removed and added again", ring_memory),
        Case::new("a device file as kick", |d| {
            let null = File::open("/dev/null")?;
            refused(d, request::SET_VRING_KICK, null.as_fd())
        })
        .reconnect(),
        Case::new("a directory as call", |d| {
            let directory = File::open("/")?;
            refused(d, request::SET_VRING_CALL, directory.as_fd())
        })
        .reconnect(),
        Case::new(
            "calls that cannot be registered, 600 of them",
            unregistrable,
        )
        .reconnect(),
        Case::new("a socket that lingers as call", |d| {
            let socket = std::net::TcpListener::bind("127.0.0.1:0")?;
            refused(d, request::SET_VRING_CALL, socket.as_fd())
        })
        .reconnect(),
        Case::new("a full call that blocks who writes it", full_call).reconnect(),
        Case::new("a call that comes after the completion", late_call).reconnect(),
        Case::new("kicked while enabled and disabled, 500 times", restless),
    ]
}

/// Sends a descriptor and expects a refusal as the answer.
fn refused(d: &mut Driver, code: u32, fd: BorrowedFd<'_>) -> Outcome {
    let flags = wire::VERSION | wire::NEED_REPLY;
    wire::send(&d.stream, &message(code, flags, &words(&[0])), &[fd])?;
    let (_, answer) = wire::receive(&d.stream)?;
    must(answer != words(&[0]), "the descriptor was taken")
}

/// A descriptor of a pipe that may be named and not used. Each attempt to start
/// a queue with it fails; none may cost the worker a place for good, which the
/// next front end would miss.
fn unregistrable(d: &mut Driver) -> Outcome {
    let (_reader, writer) = std::io::pipe()?;
    let path = format!("/proc/self/fd/{}", writer.as_fd().as_raw_fd());
    let named = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let flags = wire::VERSION | wire::NEED_REPLY;
    let enable = |d: &Driver, on: u32| -> Outcome {
        let number = [0u32.to_ne_bytes(), on.to_ne_bytes()].concat();
        wire::send(
            &d.stream,
            &message(request::SET_VRING_ENABLE, flags, &number),
            &[],
        )?;
        wire::receive(&d.stream)?;
        Ok(())
    };
    enable(d, 0)?;
    let order = message(request::SET_VRING_CALL, flags, &words(&[0]));
    wire::send(&d.stream, &order, &[named.as_fd()])?;
    wire::receive(&d.stream)?;
    for _ in 0..600 {
        enable(d, 1)?;
        enable(d, 0)?;
    }
    Ok(())
}

fn ring_memory(d: &mut Driver) -> Outcome {
    let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    if !d.protocol.contains(slots) {
        return Ok(());
    }
    let region = d.guest.table()[0];
    for _ in 0..5 {
        d.request(0, &Op::Flush)?;
        d.frontend.remove_mem_region(&region)?;
        d.frontend.add_mem_region(&region)?;
    }
    d.request(0, &Op::Flush)?;
    Ok(())
}

/// Waits for used.idx, not for a call.
fn completed(d: &Driver, index: u16) -> Outcome {
    let end = Instant::now() + d.limit;
    while d.rings[0].used_idx() != index {
        must(Instant::now() < end, "the request did not complete")?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Offers a flush in slot 0 without waiting for anything.
fn offer(d: &mut Driver) -> Outcome {
    d.head(0, 4, 0)?;
    let chain = Chain::new().read(HEADER(0), 16).write(STATUS(0), 1);
    d.place(0, 0, &chain);
    d.rings[0].queue(0);
    d.rings[0].publish();
    d.rings[0].notify();
    Ok(())
}

fn full_call(d: &mut Driver) -> Outcome {
    let call = eventfd(0, EventfdFlags::CLOEXEC)?;
    let flags = wire::VERSION | wire::NEED_REPLY;
    let order = message(request::SET_VRING_CALL, flags, &words(&[0]));
    wire::send(&d.stream, &order, &[call.as_fd()])?;
    wire::receive(&d.stream)?;
    // The flag belongs to the description, which both sides share.
    fcntl_setfl(&call, OFlags::empty())?;
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes())?;
    for _ in 0..20 {
        let index = d.rings[0].used_idx().wrapping_add(1);
        offer(d)?;
        completed(d, index)?;
        judged(d, STATUS(0), &[OK])?;
    }
    Ok(())
}

fn late_call(d: &mut Driver) -> Outcome {
    let flags = wire::VERSION | wire::NEED_REPLY;
    let without = words(&[wire::NO_FD]);
    let order = message(request::SET_VRING_CALL, flags, &without);
    wire::send(&d.stream, &order, &[])?;
    wire::receive(&d.stream)?;
    let index = d.rings[0].used_idx().wrapping_add(1);
    offer(d)?;
    completed(d, index)?;
    let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let order = message(request::SET_VRING_CALL, flags, &words(&[0]));
    wire::send(&d.stream, &order, &[call.as_fd()])?;
    wire::receive(&d.stream)?;
    let mut count = [0; 8];
    let end = Instant::now() + d.limit;
    while rustix::io::read(&call, &mut count).is_err() {
        must(Instant::now() < end, "never called")?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn restless(d: &mut Driver) -> Outcome {
    let running = std::sync::atomic::AtomicBool::new(true);
    let kick = d.rings[0].kick.try_clone()?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while running.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = kick.write(1);
                std::thread::yield_now();
            }
        });
        let outcome = (0..500).try_for_each(|_| -> Outcome {
            d.enable(0, false)?;
            Ok(d.enable(0, true)?)
        });
        running.store(false, std::sync::atomic::Ordering::Relaxed);
        outcome
    })?;
    d.request(0, &Op::Flush)?;
    Ok(())
}
