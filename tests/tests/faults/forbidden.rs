//! Machines without io_uring: the kernel has none, or a filter or `io_uring_disabled`
//! refuses it. What is chosen by itself is then the synchronous engine, which is said; who
//! asks for io_uring gets one line. For the block server `hostile/environment.rs` plays
//! the ranges, too.

use std::fs;

use pericarp_tests::bounded::poll;
use pericarp_tests::forbidden::{IO_URING_SETUP, without};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use rustix::process::Signal;

use super::programs::{LIMIT, Program, ending, picture};

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;

fn with_engine(program: Program, engine: &str, dir: &std::path::Path) -> Process {
    let mut command = command(&program.path());
    program.describe(dir, &mut command);
    command.args(["--io-engine", engine]);
    Process::start(&mut command, 2 * LIMIT).unwrap()
}

#[test]
fn programs_serve_without_io_uring_and_say_so() {
    let test = "programs_serve_without_io_uring_and_say_so";
    for program in [Program::Block, Program::Fs, Program::Net] {
        let Some(_ground) = program.ground(test) else {
            continue;
        };
        for errno in [EPERM, ENOSYS] {
            without(IO_URING_SETUP, errno, || {
                let scratch = Scratch::new();
                let dir = scratch.path("d");
                program.prepare(&dir);
                let mut process = with_engine(program, "auto", &dir);
                let there = poll(LIMIT, || {
                    let ended = process.ended().is_some();
                    (ended || dir.join("c").exists()).then_some(!ended)
                });
                assert_eq!(there, Some(true), "{}", process.output().last(9));
                program
                    .answers(&dir)
                    .unwrap_or_else(|e| panic!("{program:?}: {e}"));
                let said = process.output().find("io_uring is not available here");
                assert!(said.is_some(), "{program:?}: {}", process.output().last(9));
                process.signal(Signal::TERM);
                let code = process.wait(LIMIT).and_then(|status| status.code());
                assert_eq!(code, Some(0), "{program:?}: {}", process.output().last(9));
            });
        }
    }
}

#[test]
fn who_asks_for_io_uring_is_told_that_there_is_none() {
    let test = "who_asks_for_io_uring_is_told_that_there_is_none";
    for program in [Program::Block, Program::Fs, Program::Net] {
        let Some(_ground) = program.ground(test) else {
            continue;
        };
        for errno in [EPERM, ENOSYS] {
            without(IO_URING_SETUP, errno, || {
                let scratch = Scratch::new();
                let dir = scratch.path("d");
                program.prepare(&dir);
                let before = picture(&dir);
                let mut process = with_engine(program, "uring", &dir);
                let code = process.wait(LIMIT).and_then(|status| status.code());
                let said = process.output().last(9);
                assert!(said.contains("io_uring"), "{program:?}: {said}");
                let wrong = ending(program, &said, code, &[1]);
                assert!(wrong.is_empty(), "{program:?}: {wrong:?}: {said}");
                assert_eq!(picture(&dir), before, "{program:?}");
                fs::remove_dir_all(&dir).unwrap();
            });
        }
    }
}
