//! A pod goes, and all that it had. The part of `worker` that takes things away.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use super::cgroups;
use super::places::Places;
use super::plan;
use super::seen::{Seen, State};
use super::spec::Pod;
use super::volumes;
use super::worker::{Next, Worker};
use crate::cri::CallError;

/// How long after its time a container may take to be gone before its sandbox is stopped anyway.
const BEYOND: Duration = Duration::from_secs(10);
/// How often it is looked at meanwhile.
const STEP: Duration = Duration::from_millis(500);

impl Worker {
    /// A pod that is to be gone.
    pub(super) fn end(&mut self, pod: &Pod, seen: &Seen) -> Result<Next, CallError> {
        self.probes.end();
        let grace = self.grace_left(pod);
        let plan = plan::end(pod, seen);
        let late = grace.is_zero() && self.end.is_some_and(|end| end.elapsed() > BEYOND);
        let waits = !plan.kill.is_empty() || !self.kills.is_empty();
        if waits && !late {
            let new = plan.kill.iter().any(|kill| !self.kills.has(&kill.id));
            self.kill_all(pod, seen, plan.kill, grace);
            if new && !self.is_forced {
                self.say(pod, seen, false);
            }
            return Ok(Next::After(STEP));
        }
        for sandbox in seen.sandboxes.iter().filter(|one| one.ready) {
            self.shared.client.stop_sandbox(&sandbox.id)?;
        }
        if !self.is_forced && seen.ready().is_some() {
            // Those who watch learn how its containers ended.
            let seen = self.see(pod)?;
            self.say(pod, &seen, true);
        }
        self.take_away(pod, seen)
    }

    /// How long its containers have from now on. It gets less when the pod is deleted again with
    /// less time, never more.
    fn grace_left(&mut self, pod: &Pod) -> Duration {
        let now = Instant::now();
        let mut grace = Duration::from_secs(pod.grace().into());
        if self.is_forced {
            grace = Duration::ZERO;
        } else if self.end.is_none()
            && let Some(said) = pod.metadata.deletion_timestamp.as_deref()
            && let Ok(at) = humantime::parse_rfc3339(said)
        {
            // The time is that of the end. It may have begun before this process.
            let left = at.duration_since(SystemTime::now()).unwrap_or_default();
            // It has no fraction of a second: what was asked for is given.
            grace = grace.min(left + Duration::from_secs(1));
        }
        let end = self.end.map_or(now + grace, |end| end.min(now + grace));
        self.end = Some(end);
        end.saturating_duration_since(now)
    }

    /// All that it had goes; the pod itself at last.
    fn take_away(&mut self, pod: &Pod, seen: &Seen) -> Result<Next, CallError> {
        let shared = &self.shared;
        for sandbox in &seen.sandboxes {
            shared.client.remove_sandbox(&sandbox.id)?;
        }
        // Those of a sandbox that is not known any more.
        for container in &seen.containers {
            match shared.client.remove(&container.id) {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        let uid = &pod.metadata.uid;
        if let Err(error) = erase(&shared.places, pod) {
            log::warn!(
                "pod {}: its files are not gone yet: {error}",
                pod.full_name()
            );
            return Ok(Next::After(Duration::from_secs(2)));
        }
        cgroups::remove(&super::sandbox::cgroup(&shared.cgroup_parent, uid));
        if !self.is_forced {
            shared.forget(&self.object);
        }
        Ok(Next::Gone)
    }

    /// Removes containers that are history, but the last of each name: its log is asked for when
    /// one does not come up.
    pub(super) fn tidy(&self, pod: &Pod, seen: &Seen) {
        for one in &seen.containers {
            let kept = [seen.latest(&one.name), seen.previous(&one.name)];
            let kept = kept.into_iter().flatten().any(|kept| kept.id == one.id);
            if kept || one.state != State::Exited {
                continue;
            }
            if let Err(error) = self.shared.client.remove(&one.id) {
                log::debug!("container {} stays: {error}", one.id);
                continue;
            }
            let logs = self.shared.places.logs(pod);
            let (name, attempt) = (&one.name, one.attempt);
            if let Err(error) = super::logs::remove(&logs.join(Places::log_of(name, attempt))) {
                log::warn!("a log of {name} stays: {error}");
            }
            let words = self
                .shared
                .places
                .termination(&pod.metadata.uid, name, attempt);
            let _ = fs::remove_file(words);
        }
        for sandbox in seen.sandboxes.iter().skip(1) {
            let mut inside = seen.containers.iter();
            if sandbox.ready || inside.any(|one| one.sandbox == sandbox.id) {
                continue;
            }
            if let Err(error) = self.shared.client.remove_sandbox(&sandbox.id) {
                log::debug!("sandbox {} stays: {error}", sandbox.id);
            }
        }
    }
}

/// Removes a pod's files. Nothing of it runs any more.
fn erase(places: &Places, pod: &Pod) -> io::Result<()> {
    volumes::tear_down(&places.pod(&pod.metadata.uid))?;
    volumes::remove::tree(&places.logs(pod))
}

/// Removes the files of pods that nobody knows, which a power cut left.
pub(super) fn erase_unknown(places: &Places, is_known: impl Fn(&str) -> bool) -> io::Result<()> {
    for name in names(&places.pods())? {
        if !is_known(&name) {
            volumes::tear_down(&places.pod(&name))?;
        }
    }
    for name in names(&places.all_logs())? {
        let uid = name.rsplit('_').next().unwrap_or(&name);
        if !is_known(uid) {
            volumes::remove::tree(&places.all_logs().join(&name))?;
        }
    }
    Ok(())
}

fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::Scratch;

    #[test]
    fn files_of_unknown_pods_go() {
        let scratch = Scratch::new();
        let places = Places::new(scratch.path());
        erase_unknown(&places, |_| false).unwrap();
        for uid in ["a-1", "b-2"] {
            fs::create_dir_all(places.volume(uid, "empty-dir", "v")).unwrap();
            fs::create_dir_all(places.all_logs().join(format!("n_p_{uid}/c"))).unwrap();
        }
        erase_unknown(&places, |uid| uid == "a-1").unwrap();
        assert_eq!(names(&places.pods()).unwrap(), ["a-1"]);
        assert_eq!(names(&places.all_logs()).unwrap(), ["n_p_a-1"]);
    }
}
