//! The thread of a device against a backend that does as it is told.

use std::io::{Read, Write};
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, channel};

use super::*;
use crate::memory::{Backing, GRAIN};
use crate::virtio::{Back, Ring, VERSION_1};

/// A backend that is never that slow, and a test that does not wait for ever.
const PATIENCE: Duration = Duration::from_secs(20);

/// Messages of the protocol, by number.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;

/// MQ, REPLY_ACK and CONFIG.
const PROTOCOL: u64 = 1 | (1 << 3) | (1 << 9);
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What a fake backend says and does.
#[derive(Clone, Copy)]
struct Manner {
    features: u64,
    /// It ends the connection on this message.
    dies_at: Option<u32>,
    /// It never answers this message.
    silent_at: Option<u32>,
}

const WELL: Manner = Manner {
    features: VERSION_1 | (1 << 30) | 0xff,
    dies_at: None,
    silent_at: None,
};

/// Serves a connection; what it hears goes to `heard`.
fn serve(mut stream: UnixStream, manner: Manner, heard: &mpsc::Sender<(u32, Vec<u8>)>) {
    loop {
        let mut header = [0; 12];
        if stream.read_exact(&mut header).is_err() {
            return;
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags) = (word(0), word(4));
        let mut payload = vec![0; word(8) as usize];
        stream.read_exact(&mut payload).unwrap();
        let _ = heard.send((request, payload.clone()));
        if manner.dies_at == Some(request) {
            return;
        }
        if manner.silent_at == Some(request) {
            continue;
        }
        let number = |value: u64| value.to_le_bytes().to_vec();
        let reply = match request {
            GET_FEATURES => number(manner.features),
            GET_PROTOCOL_FEATURES => number(PROTOCOL),
            GET_QUEUE_NUM => number(2),
            GET_VRING_BASE | GET_CONFIG => payload,
            _ if flags & NEED_REPLY != 0 => number(0),
            _ => continue,
        };
        let mut answer = request.to_le_bytes().to_vec();
        answer.extend((VERSION | REPLY).to_le_bytes());
        answer.extend((reply.len() as u32).to_le_bytes());
        answer.extend(reply);
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

/// Gives out connections to backends of these manners, in order.
#[derive(Clone)]
struct Street {
    manners: Arc<Mutex<Vec<Manner>>>,
    heard: mpsc::Sender<(u32, Vec<u8>)>,
}

impl Dial for Street {
    fn dial(&self) -> std::io::Result<UnixStream> {
        let mut manners = self.manners.lock().unwrap();
        if manners.is_empty() {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        let manner = manners.remove(0);
        let (ours, theirs) = UnixStream::pair()?;
        let heard = self.heard.clone();
        std::thread::spawn(move || serve(theirs, manner, &heard));
        Ok(ours)
    }
}

struct Fixture {
    started: Started,
    heard: Receiver<(u32, Vec<u8>)>,
    street: Street,
    ram: Arc<Ram>,
}

fn fixture(manners: &[Manner]) -> Fixture {
    let (sender, heard) = channel();
    let street = Street {
        manners: Arc::new(Mutex::new(manners.to_vec())),
        heard: sender,
    };
    let ram = Arc::new(Ram::new(GRAIN, Backing::default()).unwrap());
    let stream = street.dial().unwrap();
    let kind = Kind::Other {
        id: 2,
        config_size: 16,
    };
    let dialer = Box::new(street.clone());
    let started = start("test", kind, stream, dialer, Arc::clone(&ram)).unwrap();
    Fixture {
        started,
        heard,
        street,
        ram,
    }
}

impl Fixture {
    fn shown(manners: &[Manner]) -> Self {
        let fixture = fixture(manners);
        let offer = fixture.started.offer(Instant::now() + PATIENCE).unwrap();
        assert_eq!(offer.queues, 2);
        assert_eq!(offer.features & (1 << 30), 0);
        fixture.started.show(vec![0; 16]);
        fixture
    }

    fn activation() -> Activation {
        let ring = Ring {
            index: 1,
            size: 64,
            descriptors: 0x1000,
            available: 0x2000,
            used: 0x3000,
            kick: Arc::new(event::new().unwrap()),
            call: Arc::new(event::new().unwrap()),
        };
        Activation {
            features: VERSION_1 | 1,
            rings: vec![ring],
        }
    }

    /// The next message of this kind.
    fn wait_for(&self, request: u32) -> Vec<u8> {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.heard.recv_timeout(left) {
                Ok((heard, payload)) if heard == request => return payload,
                Ok(_) => {}
                Err(e) => panic!("message {request} did not come: {e}"),
            }
        }
    }

    fn until(&self, what: &str, done: impl Fn(&Started) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(&self.started) {
            assert!(Instant::now() < end, "not {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn rings_are_given_and_taken_back() {
    let mut fixture = Fixture::shown(&[WELL]);
    let activation = Fixture::activation();
    fixture.started.handle.activate(activation.clone());
    let features = fixture.wait_for(SET_FEATURES);
    assert_eq!(features, (VERSION_1 | 1 | (1 << 30)).to_le_bytes());
    fixture.wait_for(SET_MEM_TABLE);
    let address = fixture.wait_for(SET_VRING_ADDR);
    assert_eq!(address[..4], 1u32.to_le_bytes());
    let descriptors = crate::memory::RING_BASE + 0x1000;
    assert_eq!(address[8..16], descriptors.to_le_bytes());
    assert_eq!(fixture.wait_for(SET_VRING_BASE)[4..], [0; 4]);
    fixture.wait_for(SET_VRING_KICK);
    assert_eq!(fixture.wait_for(SET_VRING_ENABLE)[4..], [1, 0, 0, 0]);
    fixture.until("busy", |started| !started.mirror.is_quiet());

    let call = Arc::new(event::new().unwrap());
    assert!(fixture.started.handle.set_call(1, call));
    fixture.wait_for(SET_VRING_CALL);
    assert!(fixture.started.handle.write_config(4, &[7]));
    let written = fixture.wait_for(SET_CONFIG);
    assert_eq!((&written[..4], written[12]), (&[4, 0, 0, 0][..], 7));

    fixture.started.handle.reset();
    fixture.wait_for(GET_VRING_BASE);
    fixture.until("quiet", |started| started.mirror.is_quiet());
    fixture.started.handle.remove();
    fixture.until("over", |started| started.thread.is_finished());
}

#[test]
fn a_reset_waits_for_the_backend_or_its_end() {
    let slow = Manner {
        silent_at: Some(GET_VRING_BASE),
        ..WELL
    };
    let mut fixture = Fixture::shown(&[slow]);
    fixture.started.handle.activate(Fixture::activation());
    fixture.wait_for(SET_VRING_ENABLE);
    fixture.started.mirror.set_busy(true);
    fixture.started.handle.reset();
    fixture.wait_for(GET_VRING_BASE);
    // It may still write to the guest's memory.
    std::thread::sleep(Duration::from_millis(50));
    assert!(!fixture.started.mirror.is_quiet());
    fixture.started.handle.lifeline.cut();
    fixture.until("quiet", |started| started.mirror.is_quiet());
}

#[test]
fn a_backend_that_dies_is_dialled_until_it_is_back() {
    let fragile = Manner {
        dies_at: Some(SET_VRING_CALL),
        ..WELL
    };
    let mute = Manner {
        dies_at: Some(GET_FEATURES),
        ..WELL
    };
    let mut fixture = Fixture::shown(&[fragile, mute, WELL]);
    let activation = Fixture::activation();
    // As if two requests were done.
    use vm_memory::{Bytes, GuestAddress};
    let memory = fixture.ram.mmap();
    memory.write_obj(2u16, GuestAddress(0x3002)).unwrap();
    fixture.started.handle.activate(activation.clone());
    fixture.wait_for(SET_VRING_BASE);
    assert_eq!(fixture.wait_for(SET_VRING_BASE)[4..], [2, 0, 0, 0]);
    fixture.wait_for(SET_VRING_ENABLE);
    fixture.until("back", |started| started.watch.reconnects() == 1);
    // What was rung meanwhile is rung again.
    let ring = &activation.rings[0];
    fixture.until("rung", |_| {
        event::is_written(&ring.kick) && event::is_written(&ring.call)
    });
    assert!(fixture.started.watch.is_connected());
}

#[test]
fn a_backend_that_comes_back_with_less_breaks_the_device_until_its_reset() {
    let fragile = Manner {
        dies_at: Some(SET_VRING_KICK),
        ..WELL
    };
    let less = Manner {
        features: VERSION_1 | (1 << 30),
        ..WELL
    };
    let mut fixture = Fixture::shown(&[fragile, less]);
    let call = Arc::new(event::new().unwrap());
    *fixture.started.changed.lock().unwrap() = Some(Arc::clone(&call));
    fixture.started.handle.activate(Fixture::activation());
    fixture.until("broken", |started| started.mirror.is_broken());
    fixture.until("called", |_| event::is_written(&call));
    fixture.started.handle.reset();
    fixture.until("whole", |started| !started.mirror.is_broken());
    fixture.street.manners.lock().unwrap().push(WELL);
    fixture.until("back", |started| started.watch.is_connected());
}

#[test]
fn one_that_does_not_answer_is_left_in_time() {
    let silent = Manner {
        silent_at: Some(GET_FEATURES),
        ..WELL
    };
    let fixture = fixture(&[silent]);
    let limit = Instant::now() + Duration::from_millis(20);
    let error = fixture.started.offer(limit).unwrap_err();
    assert!(error.contains("does not answer"), "{error}");
    fixture.until("over", |started| started.thread.is_finished());
    let old = Manner {
        features: 1,
        ..WELL
    };
    let fixture = self::fixture(&[old]);
    let error = fixture
        .started
        .offer(Instant::now() + PATIENCE)
        .unwrap_err();
    assert!(error.contains("VERSION_1"), "{error}");
}

#[test]
fn a_device_without_a_backend_goes_at_once() {
    let fragile = Manner {
        dies_at: Some(SET_VRING_ENABLE),
        ..WELL
    };
    let mut fixture = Fixture::shown(&[fragile]);
    fixture.started.handle.activate(Fixture::activation());
    fixture.wait_for(SET_VRING_ENABLE);
    fixture.started.handle.remove();
    fixture.until("over", |started| started.thread.is_finished());
    assert!(fixture.started.mirror.is_quiet());
    let nothing = fixture.heard.recv_timeout(Duration::from_millis(1));
    assert!(matches!(nothing, Err(RecvTimeoutError::Timeout) | Ok(_)));
}
