//! What goes wrong in the pod, written down for `pericarp why`, in the words that containerd is told.
//!
//! Told by `pod` when something fails or ends. Nothing here may fail the pod: a note that cannot be
//! written is a line in the log.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use pericarp_api::agent;
use pericarp_pod::history::{BASE, Cause, History, Kind};

use crate::{
    bundle::{Bundle, Kind as Role},
    process::Exit,
    spec::{Prepared, Source},
};

const NAME: &str = "io.kubernetes.cri.container-name";
/// Less than this is left of a full file system, bytes; of a small one, a sixteenth of it.
const LEFT: u64 = 64 << 10;
/// Two words of one kill are no further apart, milliseconds.
const JUST_NOW: u64 = 10_000;
const COMMAND: &str = "its command";
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Milliseconds since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |passed| passed.as_millis());
    u64::try_from(now).unwrap_or(u64::MAX)
}

/// What a container is to somebody who asks why it ended.
#[derive(Debug, Default)]
struct About {
    name: String,
    memory_limit: Option<u64>,
    /// Where it may write, and where that is on the host.
    places: Vec<(String, PathBuf)>,
}

/// The end of a command that is to be noted, and what is looked at for its cause.
#[derive(Debug)]
pub(crate) struct Noteworthy {
    name: String,
    exit: Exit,
    places: Vec<(String, PathBuf)>,
}

#[derive(Debug, Default)]
struct State {
    history: History,
    containers: HashMap<String, About>,
    /// They were told to end.
    told: HashSet<String>,
}

impl State {
    /// What a container is called.
    fn name(&self, id: &str) -> String {
        let about = self.containers.get(id);
        about.map_or_else(|| id.to_owned(), |about| about.name.clone())
    }
}

/// The notes of a pod.
#[derive(Debug)]
pub(crate) struct Chronicle {
    base: PathBuf,
    namespace: String,
    state: Mutex<State>,
}

impl Chronicle {
    pub(crate) fn new(namespace: &str, pod: &str) -> Self {
        let history = History {
            namespace: namespace.to_owned(),
            id: pod.to_owned(),
            name: pod.to_owned(),
            ..History::default()
        };
        Self {
            base: BASE.into(),
            namespace: namespace.to_owned(),
            state: Mutex::new(State {
                history,
                ..State::default()
            }),
        }
    }

    /// The pod's namespace, which is containerd's.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns of a container before it is made.
    pub(crate) fn learn(&self, id: &str, bundle: &Bundle) {
        let limit = bundle.spec["linux"]["resources"]["memory"]["limit"].as_u64();
        let about = About {
            name: bundle.annotation(NAME).unwrap_or(id).to_owned(),
            memory_limit: limit.filter(|limit| *limit > 0),
            places: Vec::new(),
        };
        let mut state = self.state();
        if bundle.kind() != Role::Member {
            state.history.name = bundle.pod_name(id);
            state.history.uid = bundle.pod_uid().to_owned();
        }
        state.told.remove(id);
        state.containers.insert(id.to_owned(), about);
    }

    /// Learns where it may write: its root, and directories of the host, as far as they are shared.
    /// How full a disk is, the guest alone knows.
    pub(crate) fn learn_places(
        &self,
        id: &str,
        root: Option<PathBuf>,
        prepared: &Prepared,
        shown: &[agent::Source],
    ) {
        let mounts = &prepared.spec["mounts"];
        let volumes = prepared
            .sources
            .iter()
            .zip(shown)
            .filter_map(|((index, source), shown)| {
                let Source::Host(bind, _) = source else {
                    return None;
                };
                let place = mounts[*index]["destination"].as_str()?;
                let is_shared = shown.file_system.is_none();
                let wanted = is_shared && !bind.read_only && bind.path.is_dir();
                wanted.then(|| (place.to_owned(), bind.path.clone()))
            });
        let root = root.map(|root| ("/".to_owned(), root));
        // Before the lock: a dead server lets us wait.
        let places: Vec<_> = root.into_iter().chain(volumes).collect();
        if let Some(about) = self.state().containers.get_mut(id) {
            about.places = places;
        }
    }

    /// A container was told to end, so that its end is nobody's fault.
    pub(crate) fn told_to_end(&self, id: &str) {
        self.state().told.insert(id.to_owned());
    }

    pub(crate) fn forget(&self, id: &str) {
        let mut state = self.state();
        state.containers.remove(id);
        state.told.remove(id);
    }

    /// A container was not made, or not started.
    pub(crate) fn refused(&self, id: &str, phase: &str, error: &str) {
        let name = self.state().name(id);
        self.note(
            Kind::Refused,
            phase,
            Some(name),
            error.to_owned(),
            Vec::new(),
        );
    }

    /// The machine has ended by itself.
    pub(crate) fn lost(&self, kind: Kind, sentence: String, evidence: Vec<String>) {
        self.note(kind, "run", None, sentence, evidence);
    }

    /// The guest's kernel has killed a process of a container: the first one, by which it ended, or
    /// another.
    pub(crate) fn out_of_memory(&self, id: &str, its_end: bool) {
        let (name, limit) = {
            let state = self.state();
            let about = state.containers.get(id);
            let limit = about.and_then(|about| about.memory_limit);
            (state.name(id), limit)
        };
        // The same kill comes by two ways, in no order: one that was said of the command is not said
        // of a process again.
        if !its_end && self.has_told_of_memory(&name) {
            return;
        }
        let what = match its_end {
            true => COMMAND,
            false => "a process of it",
        };
        let limit = match limit {
            Some(limit) => format!("its limit is {}", size(limit)),
            None => "it has no limit but the machine's memory".to_owned(),
        };
        let sentence = format!(
            "container {name}: the guest's kernel killed {what} for want of memory; {limit}"
        );
        self.note(Kind::OutOfMemory, "run", Some(name), sentence, Vec::new());
    }

    /// Whether what was said last of a container, just now, is that its command was killed for want of
    /// memory.
    fn has_told_of_memory(&self, name: &str) -> bool {
        let state = self.state();
        let mut causes = state.history.causes.iter().rev();
        let last = causes.find(|one| one.container.as_deref() == Some(name));
        last.is_some_and(|one| {
            one.kind == Kind::OutOfMemory
                && one.sentence.contains(&format!("killed {COMMAND} "))
                && now().saturating_sub(one.at) < JUST_NOW
        })
    }

    /// The command of a container has ended: what is to be noted of that, with [`Chronicle::ended`].
    /// What ended well, or when it was told to, is not.
    pub(crate) fn noteworthy(&self, id: &str, exit: Exit) -> Option<Noteworthy> {
        let state = self.state();
        if exit.code == 0 || state.told.contains(id) {
            return None;
        }
        let about = state.containers.get(id)?;
        Some(Noteworthy {
            name: about.name.clone(),
            exit,
            places: about.places.clone(),
        })
    }

    /// Notes the end of a command, and whether there was no room where it wrote. A dead server lets
    /// us wait for that, so everybody else has been told by then.
    pub(crate) fn ended(&self, what: Noteworthy) {
        let Noteworthy { name, exit, places } = what;
        let how = match exit.code {
            code @ 129..=192 => format!("was ended by signal {}", code - 128),
            code => format!("ended with code {code}"),
        };
        let sentence = format!("container {name}: its command {how}");
        let full: Vec<String> = places
            .iter()
            .filter_map(|(place, path)| fullness(path).map(|said| format!("{place} {said}")))
            .collect();
        match full.first() {
            None => self.note(Kind::Exit, "run", Some(name), sentence, Vec::new()),
            Some(first) => {
                let sentence = format!("{sentence}, and the file system at {first}");
                self.note(Kind::DiskFull, "run", Some(name), sentence, full);
            }
        }
    }

    fn note(
        &self,
        kind: Kind,
        phase: &str,
        container: Option<String>,
        sentence: String,
        evidence: Vec<String>,
    ) {
        let mut state = self.state();
        state.history.add(Cause {
            at: now(),
            kind,
            phase: phase.to_owned(),
            container,
            sentence,
            evidence,
            times: 1,
        });
        if let Err(error) = state.history.write(&self.base) {
            log::warn!("what went wrong is not written down: {error}");
        }
    }
}

/// What is said of a file system that is full.
fn fullness(path: &Path) -> Option<String> {
    let found = rustix::fs::statvfs(path).ok()?;
    let (left, all) = (
        found.f_bavail.saturating_mul(found.f_frsize),
        found.f_blocks.saturating_mul(found.f_frsize),
    );
    if all > 0 && left < LEFT.min(all / 16) {
        return Some(format!(
            "is full ({} of {} are left)",
            size(left),
            size(all)
        ));
    }
    let no_files = found.f_files > 0 && found.f_favail == 0;
    no_files.then(|| format!("can have no more files ({} are there)", found.f_files))
}

fn size(bytes: u64) -> String {
    match bytes {
        0..MIB => format!("{} KiB", bytes / KIB),
        _ => format!("{} MiB", bytes / MIB),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::spec::Bind;

    #[test]
    fn what_ended_as_it_was_told_is_not_noted() {
        let base = std::env::temp_dir().join(format!("pericarp-chronicle-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&base);
        let chronicle = Chronicle {
            base: base.clone(),
            ..Chronicle::new("k8s.io", "p")
        };
        let limit = json!({"resources": {"memory": {"limit": 25_165_824}}});
        let bundle = Bundle {
            path: "/b".into(),
            spec: json!({"annotations": {NAME: "web"}, "linux": limit}),
        };
        chronicle.learn("c", &bundle);
        let noteworthy = |code| chronicle.noteworthy("c", Exit::now(code));
        assert!(noteworthy(0).is_none());
        chronicle.told_to_end("c");
        assert!(noteworthy(143).is_none());
        assert!(!base.exists());
        chronicle.learn("c", &bundle);
        let what = noteworthy(139).unwrap();
        // It may be deleted before everything has been looked at.
        chronicle.forget("c");
        chronicle.ended(what);
        chronicle.learn("c", &bundle);
        chronicle.out_of_memory("c", true);
        chronicle.refused("c", "start", "no such program");
        let all = pericarp_pod::history::all(&base);
        std::fs::remove_dir_all(&base).unwrap();
        let said: Vec<&str> = all[0]
            .causes
            .iter()
            .map(|one| one.sentence.as_str())
            .collect();
        assert_eq!(
            said,
            [
                "container web: its command was ended by signal 11",
                "container web: the guest's kernel killed its command for want of memory; its \
                 limit is 24 MiB",
                "no such program",
            ]
        );
        assert_eq!(all[0].causes[2].container.as_deref(), Some("web"));
    }

    #[test]
    fn what_the_guest_has_as_a_disk_is_not_looked_at() {
        let chronicle = Chronicle::new("k8s.io", "p");
        let bundle = Bundle {
            path: "/b".into(),
            spec: json!({}),
        };
        chronicle.learn("c", &bundle);
        let bind = |path: &str| {
            let bind = Bind {
                path: path.into(),
                read_only: false,
                follows: false,
            };
            Source::Host(bind, true)
        };
        let mounts = json!([{"destination": "/shared"}, {"destination": "/disk"}]);
        let prepared = Prepared {
            spec: json!({ "mounts": mounts }),
            sources: vec![(0, bind("/")), (1, bind("/"))],
            nodes: Vec::new(),
            shared_processes: false,
        };
        let disk = agent::Source {
            file_system: Some(agent::FileSystem::default()).into(),
            ..agent::Source::default()
        };
        let places = |root: Option<PathBuf>| {
            let shown = [agent::Source::default(), disk.clone()];
            chronicle.learn_places("c", root, &prepared, &shown);
            let what = chronicle.noteworthy("c", Exit::now(1)).unwrap();
            let places = what.places.into_iter().map(|(place, _)| place);
            places.collect::<Vec<_>>()
        };
        assert_eq!(places(None), ["/shared"]);
        assert_eq!(places(Some("/r".into())), ["/", "/shared"]);
    }

    #[test]
    fn a_file_system_with_room_is_not_full() {
        assert_eq!(fullness(Path::new("/proc/self")), None);
        assert_eq!(
            (size(65536), size(3 << 20)),
            ("64 KiB".into(), "3 MiB".into())
        );
    }
}
