//! Plays tables of hostile acts to one server. After each act a good request on
//! the same session must be served, then one of the next session, by the same
//! process; all acts are played before the verdict.

use std::error::Error;
use std::fs;
use std::time::Duration;

use pericarp_tests::frontend::Setup;
use pericarp_tests::fs::wire::posix::O_RDWR;
use pericarp_tests::fs::wire::{Answer, Entry, ROOT};
use pericarp_tests::fs::{Client, Options, Server, Shape, Wrong};
use rustix::io::Errno;

use crate::pattern;

/// What an act returns: an error says what the server got wrong.
pub(crate) type Outcome = Result<(), Box<dyn Error>>;

/// Bytes of the file that nobody writes.
pub(crate) const HEALTH: usize = 20_000;
/// What is told of an unknown node or handle.
pub(crate) const UNKNOWN: [Errno; 3] = [Errno::STALE, Errno::BADF, Errno::NOENT];

/// What an act finds.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ground {
    /// A file of 8 KiB that acts may change.
    pub(crate) file: Entry,
    /// It, open for both.
    pub(crate) fh: u64,
    /// A directory with one file, `inner`.
    pub(crate) dir: Entry,
    /// It, open.
    pub(crate) dirh: u64,
}

/// One act.
pub(crate) struct Act {
    name: &'static str,
    act: fn(&mut Client, &Ground) -> Outcome,
    after: After,
    begun: bool,
    setup: Setup,
}

/// What is left of the session after an act.
#[derive(Clone, Copy, PartialEq, Eq)]
enum After {
    /// All of it.
    Usable,
    /// The connection: INIT begins a new session.
    Init,
    /// Nothing.
    Reconnect,
}

impl Act {
    pub(crate) fn new(name: &'static str, act: fn(&mut Client, &Ground) -> Outcome) -> Self {
        Act {
            name,
            act,
            after: After::Usable,
            begun: true,
            setup: Client::setup(),
        }
    }

    /// The session is over after it.
    pub(crate) fn ends(mut self) -> Self {
        self.after = After::Init;
        self
    }

    /// The connection need not survive it.
    pub(crate) fn reconnect(mut self) -> Self {
        self.after = After::Reconnect;
        self
    }

    /// Played before INIT.
    pub(crate) fn before_init(mut self) -> Self {
        self.begun = false;
        self.ends()
    }
}

/// Plays all acts; panics with everything that went wrong.
pub(crate) fn play(test: &str, acts: Vec<Act>) {
    let options = Options {
        lifetime: Duration::from_secs(400),
        ..Options::default()
    };
    let Some(mut server) = Server::for_test(test, &[], options) else {
        return;
    };
    fs::write(server.path("health"), pattern(77, HEALTH)).unwrap();
    fs::create_dir(server.path("dir")).unwrap();
    fs::write(server.path("dir/inner"), b"inner").unwrap();
    let total = acts.len();
    let mut faults = Vec::new();
    let mut before = None;
    for act in acts {
        fs::write(server.path("file"), pattern(78, 8192)).unwrap();
        let wrong = judge(&mut server, &act);
        if !wrong.is_empty() {
            faults.push(format!("{}: {}", act.name, wrong.join("; ")));
            server.restart();
            before = None;
        }
        before = before.or(server.footprint());
    }
    if server.is_ours()
        && let (Some(before), Some(after)) = (before, server.footprint())
        && after.fds > before.fds + 12
    {
        faults.push(format!(
            "left behind by all acts together: {before:?} -> {after:?}"
        ));
    }
    assert!(
        faults.is_empty(),
        "{} of {total} acts failed:\n  {}",
        faults.len(),
        faults.join("\n  ")
    );
}

fn judge(server: &mut Server, act: &Act) -> Vec<String> {
    let mut wrong = Vec::new();
    if let Err(error) = played(server, act) {
        wrong.push(error.to_string());
    }
    // The peer ends with its front end: only ours has to be still there.
    if server.is_ours() && !server.is_alive() {
        wrong.push(format!("the server {}", server.epitaph()));
        return wrong;
    }
    let next = server
        .client()
        .map_err(Into::into)
        .and_then(|mut c| healthy(&mut c));
    if let Err(error) = next {
        wrong.push(format!("the next session is not served: {error}"));
    }
    wrong
}

fn played(server: &mut Server, act: &Act) -> Outcome {
    let mut client = server.connect(&act.setup)?;
    let mut ground = Ground::default();
    if act.begun {
        client.init()?;
        ground.file = client.lookup(ROOT, "file")?;
        ground.fh = client.open(ground.file.node, O_RDWR)?;
        ground.dir = client.lookup(ROOT, "dir")?;
        ground.dirh = client.opendir(ground.dir.node)?;
    }
    (act.act)(&mut client, &ground)?;
    if act.after == After::Reconnect {
        return Ok(());
    }
    client.shape = Shape::default();
    client.queue = 1;
    let rest = if act.after == After::Init {
        client.init().map_err(Into::into).map(drop)
    } else {
        Ok(())
    };
    rest.and_then(|()| healthy(&mut client))
        .map_err(|error: Box<dyn Error>| {
            format!("the session is unusable after it: {error}").into()
        })
}

/// Looks up, opens, reads, lists, as any guest.
fn healthy(c: &mut Client) -> Outcome {
    let file = c.lookup(ROOT, "health")?;
    let fh = c.open(file.node, 0)?;
    let read = c.read(file.node, fh, 1000, 5000)?;
    c.release(file.node, fh)?;
    let names = c.list(ROOT, false, 4096)?;
    c.forget(file.node, 1)?;
    must(
        read == pattern(77, HEALTH)[1000..6000],
        "a good read has wrong data",
    )?;
    must(
        names.iter().any(|name| name.name == "health"),
        "a listing is short",
    )
}

/// Turns a claim into an outcome.
pub(crate) fn must(holds: bool, what: impl Into<String>) -> Outcome {
    if holds {
        Ok(())
    } else {
        Err(what.into().into())
    }
}

/// An answer to nonsense: an error, or none where there is no room or no
/// request to answer.
pub(crate) fn turned_down(answer: &Answer) -> Outcome {
    must(
        answer.used == 0 || answer.error < 0,
        format!("it is taken for good: {answer:?}"),
    )
}

/// The server said no, whatever the reason.
pub(crate) fn said_no<T: std::fmt::Debug>(answer: Result<T, Wrong>) -> Outcome {
    match answer {
        Err(Wrong::Refused(_)) => Ok(()),
        Err(wrong) => Err(wrong.into()),
        Ok(value) => Err(format!("it worked: {value:?}").into()),
    }
}

/// The server said no, or nothing was wrong with it; what counts is that it
/// answers.
pub(crate) fn said_something<T>(answer: Result<T, Wrong>) -> Outcome {
    match answer {
        Ok(_) | Err(Wrong::Refused(_)) => Ok(()),
        Err(wrong) => Err(wrong.into()),
    }
}
