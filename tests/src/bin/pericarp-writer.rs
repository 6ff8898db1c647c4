//! `pericarp-writer TAG PAUSE TARGET=PLACE ...`: what runs in a pod of `pericarp-endure`. It writes and
//! compares on each target, a step every PAUSE milliseconds, and says on stdout what it found at the
//! beginning and what it has had flushed. It ends with code 3 at the first error.
//!
//! ```text
//! disk=/dev/xvda        blocks of a device        found disk 5 12     what is there at the beginning
//! file=/data/blocks     blocks of a file          ready disk          all of it was said
//! tree=/data/tree       files that come and go    flushed disk 5 13 9 block, generation, compared so far
//! net=10.88.0.1:7000    what is sent comes back   error disk: why
//! ```

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use pericarp_tests::endure::store::{BLOCKS, Store};
use pericarp_tests::model::Sequence;
use pericarp_tests::verified::{BLOCK, origin, pattern};

/// Longer than a connection may be silent while what carries it is started again.
const SILENCE: Duration = Duration::from_secs(100);
/// Files of a tree at a time.
const FILES: usize = 8;
/// What the guest ends with when something is wrong.
const WRONG: u8 = 3;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [tag, pause, targets @ ..] = &words[..] else {
        eprintln!("pericarp-writer: takes a tag, a pause in milliseconds and targets");
        return ExitCode::from(2);
    };
    let (Ok(tag), Ok(pause)) = (tag.parse::<usize>(), pause.parse::<u64>()) else {
        eprintln!("pericarp-writer: '{tag} {pause}': are no numbers");
        return ExitCode::from(2);
    };
    let (wrong, errors) = channel();
    for (index, target) in targets.iter().enumerate() {
        let (name, place) = target.split_once('=').unwrap_or((target, ""));
        let (name, place) = (name.to_owned(), place.to_owned());
        let wrong = wrong.clone();
        let work = Work {
            name,
            tag: 2 * tag + index,
            pause: Duration::from_millis(pause),
        };
        thread::spawn(move || {
            let done = work.run(&place);
            let text = done.err().map_or("ended".to_owned(), |e| e.to_string());
            let _ = wrong.send(format!("error {}: {text}", work.name));
        });
    }
    drop(wrong);
    if let Ok(error) = errors.recv() {
        let _ = say(&error);
    }
    ExitCode::from(WRONG)
}

/// One line; it is whole, whoever else writes.
fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes())?;
    out.flush()
}

struct Work {
    name: String,
    tag: usize,
    pause: Duration,
}

impl Work {
    fn run(&self, place: &str) -> io::Result<()> {
        match self.name.as_str() {
            "disk" | "file" => self.blocks(Path::new(place)),
            "tree" => self.tree(Path::new(place)),
            "net" => self.net(place),
            _ => Err(io::Error::other("no such target")),
        }
    }

    fn flushed(&self, block: usize, generation: u32, compared: u64) -> io::Result<()> {
        let name = &self.name;
        say(&format!("flushed {name} {block} {generation} {compared}"))?;
        thread::sleep(self.pause);
        Ok(())
    }

    fn ready(&self) -> io::Result<()> {
        say(&format!("ready {}", self.name))
    }

    fn blocks(&self, path: &Path) -> io::Result<()> {
        let mut store = Store::open(path, self.tag)?;
        let name = &self.name;
        for (block, generation) in store.generations().iter().enumerate() {
            if *generation > 0 {
                say(&format!("found {name} {block} {generation}"))?;
            }
        }
        self.ready()?;
        let mut sequence = Sequence::new(u64::from(std::process::id()) << 8 | self.tag as u64);
        let mut any = || sequence.below(BLOCKS as u64) as usize;
        for compared in 1.. {
            let block = any();
            let generation = store.write(block)?;
            store.compare(any())?;
            self.flushed(block, generation, compared)?;
        }
        Ok(())
    }

    fn tree(&self, top: &Path) -> io::Result<()> {
        let _ = fs::remove_dir_all(top);
        fs::create_dir_all(top)?;
        self.ready()?;
        for round in 1..=u32::MAX {
            let dir = top.join(format!("round-{}", round % 4));
            fs::create_dir(&dir)?;
            for file in 0..FILES {
                let (new, name) = (dir.join("new"), dir.join(format!("{file}")));
                fs::write(&new, pattern(file, round))?;
                fs::rename(&new, &name)?;
            }
            let listed = fs::read_dir(&dir)?.count();
            if listed != FILES {
                return Err(io::Error::other(format!("{listed} names of {FILES}")));
            }
            for file in 0..FILES {
                let name = dir.join(format!("{file}"));
                let bytes = fs::read(&name)?;
                if bytes != pattern(file, round) {
                    let what = format!("{} is not what was written", name.display());
                    return Err(io::Error::other(what));
                }
                fs::remove_file(&name)?;
            }
            fs::remove_dir(&dir)?;
            self.flushed(0, round, u64::from(round) * FILES as u64)?;
        }
        Ok(())
    }

    fn net(&self, place: &str) -> io::Result<()> {
        let mut stream = TcpStream::connect(place)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        stream.set_nodelay(true)?;
        self.ready()?;
        let mut back = vec![0; BLOCK];
        for round in 1..=u32::MAX {
            let bytes = pattern(self.tag, round);
            stream.write_all(&bytes)?;
            stream.read_exact(&mut back)?;
            if back != bytes {
                return Err(io::Error::other(format!("back came {}", origin(&back))));
            }
            self.flushed(0, round, round.into())?;
        }
        Ok(())
    }
}
