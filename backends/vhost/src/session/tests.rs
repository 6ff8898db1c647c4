//! Sessions over a socket pair, with a device that only takes notes.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use pericarp_ring::{Chain, ChainError};
use pericarp_uring::EngineKind;

use super::*;
use crate::device::{ConfigRefused, Step};
use crate::pool::{Pool, PoolOptions};

/// Remembers the features it was told of.
#[derive(Debug, Default)]
struct Notes(Mutex<Vec<u64>>);

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
        self.0.lock().unwrap().push(features);
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

/// Plays messages to a session; returns the answers' payloads and the notes.
fn play(messages: &[(FrontendReq, &[u8])]) -> (Vec<Vec<u8>>, Vec<u64>) {
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
    for (request, payload) in messages {
        for word in [*request as u32, 0x9, payload.len() as u32] {
            theirs.write_all(&word.to_ne_bytes()).unwrap();
        }
        theirs.write_all(payload).unwrap();
    }
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let handles = pool.handles();
    let safety = CrashSafety::default();
    let mut session = Session::new(
        ours,
        Stop::new().unwrap(),
        &device,
        0,
        &handles,
        &safety,
        None,
    );
    session.begin();
    session.run();
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
    let notes = device.0.lock().unwrap().clone();
    (answers, notes)
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
