//! Sessions over a socket pair, with a device that only takes notes.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use pericarp_ring::{Chain, ChainError};
use pericarp_uring::EngineKind;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::message::{
    VhostUserMemory, VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserVringAddr,
    VhostUserVringAddrFlags,
};

use super::*;
use crate::device::{ConfigRefused, Step};
use crate::pool::{Pool, PoolOptions};

/// Remembers what it was told.
#[derive(Debug, Default)]
struct Notes {
    features: Mutex<Vec<u64>>,
    served: Mutex<Vec<(u16, bool)>>,
}

impl Device for Notes {
    type Request = ();

    fn features(&self) -> u64 {
        0b110
    }

    fn queue_count(&self) -> u16 {
        2
    }

    fn max_queue_size(&self) -> u16 {
        64
    }

    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3]
    }

    fn write_config(&self, offset: usize, bytes: &[u8]) -> Result<(), ConfigRefused> {
        let end = offset + bytes.len();
        Err(ConfigRefused { offset, end })
    }

    fn negotiated(&self, features: u64) {
        self.features.lock().unwrap().push(features);
    }

    fn serves(&self, queue: u16, on: bool) {
        self.served.lock().unwrap().push((queue, on));
    }

    fn files(&self) -> &[OwnedFd] {
        &[]
    }

    fn start(&self, _: Result<(), ChainError>, _: Chain<'_>, (): &mut ()) -> Step {
        Step::Done { written: 0 }
    }

    fn resume(&self, _: Chain<'_>, (): &mut (), _: i32) -> Step {
        Step::Done { written: 0 }
    }
}

/// A message with the descriptors that go along.
type Sent<'a> = (FrontendReq, &'a [u8], &'a [BorrowedFd<'a>]);

fn send(stream: &UnixStream, (request, payload, fds): &Sent<'_>) {
    let words = [*request as u32, 0x9, payload.len() as u32];
    let header = words.map(u32::to_ne_bytes).concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let parts = [IoSlice::new(&header), IoSlice::new(payload)];
    let sent = sendmsg(stream, &parts, &mut control, SendFlags::empty());
    assert_eq!(sent, Ok(header.len() + payload.len()));
}

/// Plays messages to a session; returns the answers' payloads and the features it told of.
fn play(messages: &[(FrontendReq, &[u8])]) -> (Vec<Vec<u8>>, Vec<u64>) {
    let messages = messages
        .iter()
        .map(|&(request, payload)| (request, payload, &[][..]));
    let (answers, notes) = play_with(&messages.collect::<Vec<_>>());
    let features = notes.features.lock().unwrap().clone();
    (answers, features)
}

/// The same with descriptors, and with all of the notes.
fn play_with(messages: &[Sent<'_>]) -> (Vec<Vec<u8>>, Arc<Notes>) {
    let device = Arc::new(Notes::default());
    let pool = Pool::<Notes>::new(&PoolOptions {
        poll_limit: std::time::Duration::from_micros(10),
        workers: 1,
        engine: EngineKind::Sync,
        depth: 8,
        files: 8,
        commands: false,
        register_memory: false,
        polled: false,
        descriptors: false,
        threads: None,
        cpus: Vec::new(),
    })
    .unwrap();
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    for message in messages {
        send(&theirs, message);
    }
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let stop = Stop::new().unwrap();
    let handles = pool.handles();
    let running = pool.start(&stop).unwrap();
    let safety = CrashSafety::default();
    let mut session = Session::new(ours, stop, &device, 0, &handles, &safety, None);
    session.begin();
    session.run();
    running.end();
    let mut bytes = Vec::new();
    // A session that ends with messages unread resets the connection.
    let _ = theirs.read_to_end(&mut bytes);
    let mut answers = Vec::new();
    let mut rest = bytes.as_slice();
    while let Some((header, tail)) = rest.split_first_chunk::<12>() {
        let size = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]) as usize;
        answers.push(tail[..size].to_vec());
        rest = &tail[size..];
    }
    (answers, device)
}

const ACK: VhostUserProtocolFeatures = VhostUserProtocolFeatures::REPLY_ACK;

#[test]
fn a_session_starts_without_the_features_of_the_last_one() {
    let (_, notes) = play(&[]);
    assert_eq!(notes, [0]);
}

#[test]
fn a_reset_tells_the_device_even_if_the_features_stay() {
    let features = (features::VERSION_1 | 0b10).to_ne_bytes();
    let (_, notes) = play(&[
        (FrontendReq::SET_FEATURES, &features),
        (FrontendReq::RESET_DEVICE, &[]),
        (FrontendReq::SET_FEATURES, &features),
    ]);
    let told = features::VERSION_1 | 0b10;
    assert_eq!(notes, [0, told, told]);
}

#[test]
fn what_was_not_offered_is_refused_with_an_answer() {
    let (answers, notes) = play(&[
        (
            FrontendReq::SET_PROTOCOL_FEATURES,
            &ACK.bits().to_ne_bytes(),
        ),
        (FrontendReq::SET_FEATURES, &(1u64 << 60).to_ne_bytes()),
        (FrontendReq::SET_VRING_NUM, &[7, 0, 0, 0, 16, 0, 0, 0]),
        (FrontendReq::SET_VRING_NUM, &[1, 0, 0, 0, 65, 0, 0, 0]),
        (FrontendReq::SET_VRING_NUM, &[1, 0, 0, 0, 64, 0, 0, 0]),
    ]);
    let code = |answer: &Vec<u8>| answer[0];
    assert_eq!(
        answers.iter().map(code).collect::<Vec<_>>(),
        [0, 1, 1, 1, 0]
    );
    assert_eq!(notes, [0]);
}

#[test]
fn the_configuration_space_is_padded_with_zeros_and_bounded() {
    let ask = |offset: u32, size: u32| {
        let mut payload: Vec<u8> = [offset, size, 0]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect();
        payload.resize(12 + size as usize, 0xee);
        payload
    };
    let (answers, _) = play(&[
        (FrontendReq::GET_CONFIG, &ask(1, 4)),
        (FrontendReq::GET_CONFIG, &ask(0, 257)),
    ]);
    assert_eq!(answers[0][12..], [2, 3, 0, 0]);
    assert!(answers[1].is_empty(), "an empty answer is a refusal");
}

#[test]
fn a_request_that_nobody_knows_ends_the_session_unless_it_can_be_refused() {
    let (answers, _) = play(&[
        (FrontendReq::SET_LOG_BASE, &[0; 16]),
        (FrontendReq::GET_QUEUE_NUM, &[]),
    ]);
    assert!(answers.is_empty());
    let (answers, _) = play(&[
        (
            FrontendReq::SET_PROTOCOL_FEATURES,
            &ACK.bits().to_ne_bytes(),
        ),
        (FrontendReq::SET_LOG_BASE, &[0; 16]),
        (FrontendReq::GET_QUEUE_NUM, &[]),
    ]);
    assert_eq!(answers[1], 1u64.to_ne_bytes());
    assert_eq!(answers[2], 2u64.to_ne_bytes());
}

#[test]
fn the_other_end_of_a_connection_is_no_bell() {
    let name = format!("pericarp-bell-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let _ = std::fs::remove_file(&path);
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    // What a front end has, who could pass it on to the device.
    let own = UnixStream::connect(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let (pair, _other) = UnixStream::pair().unwrap();
    let (ack, first) = (ACK.bits().to_ne_bytes(), 0u64.to_ne_bytes());
    let messages: [Sent<'_>; 3] = [
        (FrontendReq::SET_PROTOCOL_FEATURES, &ack, &[]),
        (FrontendReq::SET_VRING_CALL, &first, &[own.as_fd()]),
        (FrontendReq::SET_VRING_CALL, &first, &[pair.as_fd()]),
    ];
    let (answers, _) = play_with(&messages);
    assert_eq!(answers[1], 1u64.to_ne_bytes(), "it was taken");
    assert_eq!(
        answers[2],
        0u64.to_ne_bytes(),
        "pairs are what front ends use"
    );
}

/// Where the regions are, in the guest's addresses and in the front end's. The rings are in the
/// first.
const REGIONS: [(u64, u64); 2] = [(0, 0x7000_0000), (0x10_0000, 0x7100_0000)];
const REGION_SIZE: u64 = 0x1_0000;

fn region(which: usize) -> VhostUserMemoryRegion {
    let (guest, user) = REGIONS[which];
    VhostUserMemoryRegion::new(guest, REGION_SIZE, user, 0)
}

#[test]
fn a_memory_table_that_changes_leaves_a_served_queue_so() {
    let memory = || {
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(REGION_SIZE).unwrap();
        memory
    };
    let (first, second, more) = (memory(), memory(), memory());
    let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let table = [VhostUserMemory::new(1).as_slice(), region(0).as_slice()].concat();
    let (guest, user) = REGIONS[1];
    let added = VhostUserSingleMemoryRegion::new(guest, REGION_SIZE, user, 0);
    let rings = REGIONS[0].1;
    let addresses = VhostUserVringAddr::new(
        1,
        VhostUserVringAddrFlags::empty(),
        rings,
        rings + 0x2000,
        rings + 0x1000,
        0,
    );
    let [off, on, size] = [0, 1, 16].map(|number| VhostUserVringState::new(1, number));
    let (features, protocol) = (features::VERSION_1 | features::PROTOCOL, ACK.bits());
    let set_up: [Sent<'_>; 7] = [
        (
            FrontendReq::SET_PROTOCOL_FEATURES,
            &protocol.to_ne_bytes(),
            &[],
        ),
        (FrontendReq::SET_FEATURES, &features.to_ne_bytes(), &[]),
        (FrontendReq::SET_MEM_TABLE, &table, &[first.as_fd()]),
        (FrontendReq::SET_VRING_NUM, size.as_slice(), &[]),
        (FrontendReq::SET_VRING_ADDR, addresses.as_slice(), &[]),
        (
            FrontendReq::SET_VRING_KICK,
            &1u64.to_ne_bytes(),
            &[kick.as_fd()],
        ),
        (FrontendReq::SET_VRING_ENABLE, on.as_slice(), &[]),
    ];
    let changes: [Sent<'_>; 4] = [
        (FrontendReq::SET_MEM_TABLE, &table, &[first.as_fd()]),
        (FrontendReq::SET_MEM_TABLE, &table, &[second.as_fd()]),
        (FrontendReq::ADD_MEM_REG, added.as_slice(), &[more.as_fd()]),
        (FrontendReq::REM_MEM_REG, added.as_slice(), &[]),
    ];
    let stop: [Sent<'_>; 1] = [(FrontendReq::GET_VRING_BASE, off.as_slice(), &[])];
    for messages in [
        [&set_up[..], &stop].concat(),
        [&set_up[..], &changes, &stop].concat(),
    ] {
        let (answers, notes) = play_with(&messages);
        let (base, acks) = answers.split_last().unwrap();
        assert_eq!(acks.len() + 1, messages.len());
        assert!(
            acks.iter().all(|ack| *ack == 0u64.to_ne_bytes()),
            "{acks:?}"
        );
        assert_eq!(*base, off.as_slice());
        assert_eq!(*notes.served.lock().unwrap(), [(1, true), (1, false)]);
        assert_eq!(*notes.features.lock().unwrap(), [0, features]);
    }
}
