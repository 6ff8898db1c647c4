//! The same requests to `pericarp-fs` and to `virtiofsd`: the same answers,
//! attributes, listings and data, and the same trees on the host afterwards.
//!
//! The peer's own program is driven by the same guest as ours. Where the two
//! differ, [`agree`] says which of them is right, and why.

mod acts;
mod exits;
mod play;

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use pericarp_tests::fs::{Client, Kind, Options, Server};
use pericarp_tests::parts::{Part, have};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use rustix::io::Errno;

use acts::{Act, act};
use play::{Answer, Answered, Pair};

/// Logs, and acts in each: some ten thousand requests to each server.
const LOGS: u32 = 100;
const ACTS: usize = 160;

/// Both servers; `None` is a skipped test.
fn both(test: &str) -> Option<(Server, Server)> {
    if !have(test, &[Part::Virtiofsd]) {
        return None;
    }
    let peer = Kind::Virtiofsd(Part::Virtiofsd.find()?);
    let options = Options {
        lifetime: std::time::Duration::from_secs(400),
        ..Options::default()
    };
    let ours = Server::of(Kind::Pericarp, test, &[], options.clone())?;
    let theirs = Server::of(peer, test, &[], options)?;
    Some((ours, theirs))
}

#[test]
fn every_answer_is_the_peers_or_better() {
    let Some((mut ours, mut theirs)) = both("every_answer_is_the_peers_or_better") else {
        return;
    };
    let clients: (Client, Client) = (ours.client().unwrap(), theirs.client().unwrap());
    let clients = RefCell::new(clients);
    let dirs = (ours.dir(), theirs.dir());
    let config = Config {
        cases: LOGS,
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..Config::default()
    };
    // The same logs in every run: a difference is one of the code.
    let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, random);
    let logs = proptest::collection::vec(act(), 40..ACTS);
    let verdict = runner.run(&logs, |log| {
        let mut clients = clients.borrow_mut();
        let (a, b) = &mut *clients;
        play_one(&log, (a, b), (&dirs.0, &dirs.1)).map_err(TestCaseError::fail)
    });
    drop(clients);
    if let Err(difference) = verdict {
        panic!("{difference}\n{}", ours.epitaph());
    }
}

/// Plays a log in a new directory; what is different.
fn play_one(
    log: &[Act],
    (a, b): (&mut Client, &mut Client),
    dirs: (&Path, &Path),
) -> Result<(), String> {
    let (a_dir, b_dir) = (dirs.0.join("log"), dirs.1.join("log"));
    for dir in [&a_dir, &b_dir] {
        fs::create_dir(dir).unwrap();
    }
    let mut pair = Pair::new(a, b);
    let mut outcome = Ok(());
    for (step, act) in log.iter().enumerate() {
        let (ours, theirs) = pair.play(act);
        if !agree(act, &ours, &theirs) {
            outcome = Err(format!("step {step}, {act:?}: {ours:?}, not {theirs:?}"));
            break;
        }
    }
    if outcome.is_ok() {
        let (ours, theirs) = (tree(&a_dir), tree(&b_dir));
        if ours != theirs {
            outcome = Err(format!("the trees: {ours:#?}, not {theirs:#?}"));
        }
    }
    pair.end();
    for dir in [&a_dir, &b_dir] {
        fs::remove_dir_all(dir).unwrap();
    }
    outcome
}

/// Whether two answers are the same, or ours is the one that is right.
fn agree(act: &Act, ours: &Answered, theirs: &Answered) -> bool {
    let _ = act;
    if ours == theirs {
        return true;
    }
    let errnos = (ours.as_ref().err(), theirs.as_ref().err());
    match (act, errnos) {
        _ if matches!(
            (ours, theirs),
            (Ok(Answer::Broken(_)), _) | (_, Ok(Answer::Broken(_)))
        ) =>
        {
            false
        }
        // Opening a symbolic link or a special file: ELOOP and EACCES say which,
        // the peer has EBADF for both.
        (Act::Open(..), (Some(&Errno::LOOP | &Errno::ACCESS), Some(_))) => true,
        _ => false,
    }
}

/// All that the host sees of a tree, by name.
fn tree(dir: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut next = vec![dir.to_owned()];
    while let Some(path) = next.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = if meta.is_file() && meta.len() < 1 << 20 {
            let bytes = fs::read(&path).unwrap();
            let sum = bytes.iter().fold(7u64, |sum, byte| {
                sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
            });
            format!("{sum:x}")
        } else if meta.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else {
            String::new()
        };
        let size = if meta.is_dir() { 0 } else { meta.len() };
        let device = meta.file_type().is_char_device() || meta.file_type().is_block_device();
        all.push(format!(
            "{} {:o} {}:{} {} {size} {} {content}",
            path.strip_prefix(dir).unwrap().display(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.nlink(),
            if device { meta.rdev() } else { 0 },
        ));
        if meta.is_dir() {
            let entries = fs::read_dir(&path).unwrap();
            next.extend(entries.map(|entry| entry.unwrap().path()));
        }
    }
    all.sort();
    all
}
