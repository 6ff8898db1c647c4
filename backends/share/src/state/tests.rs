//! What a successor reads of what was written, where it was written last.

use std::ffi::CString;

use rustix::fs::MemfdFlags;

use super::*;
use crate::NodeId;

pub(crate) fn memory() -> File {
    let file = File::from(rustix::fs::memfd_create(c"state", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(State::bytes(2, 16)).unwrap();
    file
}

fn open(file: &File) -> State {
    State::open(file.try_clone().unwrap(), 0, (2, 16), [1; 64]).unwrap()
}

#[test]
fn a_move_that_was_not_ended_is_seen() {
    let file = memory();
    let state = open(&file);
    let long = CString::new("x".repeat(255)).unwrap();
    let spot = |name| Spot {
        parent: NodeId(17),
        name,
    };
    let ended = state.begin_move(NodeId(5), spot(c"ended")).unwrap();
    let _left = state.begin_move(NodeId(6), spot(&long)).unwrap();
    state.end_move(ended, None);
    drop(state);
    let state = open(&file);
    assert_eq!(state.take_moves(), [(NodeId(6), NodeId(17), long)]);
    state.clear_moves();
    assert_eq!(state.take_moves(), []);
}

#[test]
fn more_moves_than_there_is_room_for_are_let_go() {
    let state = open(&memory());
    let spot = Spot {
        parent: NodeId::ROOT,
        name: c"n",
    };
    let moves: Vec<_> = (0..)
        .map_while(|n| state.begin_move(NodeId(n + 1), spot))
        .collect();
    assert_eq!(moves.len(), MOVES);
    for moving in moves {
        state.end_move(moving, None);
    }
    assert!(state.begin_move(NodeId(1), spot).is_some());
}

#[test]
fn a_slot_counts_for_its_own_request() {
    let file = memory();
    let state = open(&file);
    let slot = state.slot(1, 15).unwrap();
    assert!(state.slot(2, 0).is_none() && state.slot(0, 16).is_none());
    assert_eq!(slot.read(0, 0), None);
    let intent = Intent {
        unique: 9,
        opcode: 3,
        digest: 4,
        time: 5,
        subject: (6, 7),
        other: (8, 9),
        progress: 10,
        ..Intent::default()
    };
    slot.begin(&intent);
    let begun = Intent {
        phase: Phase::Begun,
        ..intent
    };
    let state = open(&file);
    let slot = state.slot(1, 15).unwrap();
    assert_eq!(slot.read(9, 3), Some(begun));
    assert_eq!(slot.read(8, 3), None);
    assert_eq!(slot.read(9, 4), None);
    assert_eq!(state.slot(0, 15).unwrap().read(9, 3), None);
    slot.progress(11);
    let done = Intent {
        phase: Phase::Done,
        node: 20,
        handle: 21,
        errno: 22,
        progress: 11,
        ..intent
    };
    slot.done(&done);
    assert_eq!(slot.read(9, 3), Some(done));
    // The next one there.
    let next = Intent {
        unique: 11,
        node: 30,
        ..Intent::default()
    };
    slot.done(&next);
    assert_eq!(slot.read(9, 3), None);
    assert_eq!(slot.read(11, 0).map(|i| (i.node, i.digest)), Some((30, 0)));
}

#[test]
fn room_is_made_as_it_is_needed() {
    let file = memory();
    let state = open(&file);
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
    let before = blocks();
    assert!(before < 1 << 20, "{before}");
    for index in [0, 5, 700, 10_000] {
        state.reserve_node(index).unwrap();
        state.set_lookups(index, 1);
    }
    assert!(blocks() >= before + 10_000 * (NODE * WORD) as u64);
    assert!(state.reserve_node(MOST_NODES).is_err());
    assert!(state.reserve_open(MOST_OPEN).is_err());
}
