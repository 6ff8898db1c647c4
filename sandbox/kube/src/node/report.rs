//! What is said of a pod, and what it has too much of. The part of `worker` that judges.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use super::events::Sort;
use super::places::Places;
use super::quantity::Quantity;
use super::seen::{Instance, Seen, State};
use super::shared::Shared;
use super::spec::Pod;
use super::status::{self, Reason, Report};
use super::volumes;
use super::worker::Worker;

/// How often volumes with a limit are measured, as by a kubelet.
const MEASURED: Duration = Duration::from_secs(10);
/// The most that is kept of what a container says at its end.
const WORDS: u64 = 4096;
/// The same where its log is taken for that, and how many lines of it.
const WORDS_OF_LOG: (u64, usize) = (2048, 80);

impl Worker {
    /// Says how the pod is.
    pub(super) fn say(&self, pod: &Pod, seen: &Seen, over: bool) {
        let status = status::status(&Report {
            pod,
            old: self.old_status(),
            seen,
            healths: &|id| self.probes.health(id),
            waits: &self.waits,
            failed: self.verdict.as_ref(),
            over,
            host_ip: &self.shared.address,
            now: SystemTime::now(),
            last_words: &|one| last_words(&self.shared, pod, one),
            causes: &self.causes,
        });
        if status != *self.old_status() {
            self.shared.set_status(&self.object, &status);
        }
    }

    /// Says of a pod that makes no sense that it has failed.
    pub(super) fn fail_unread(&self, reason: &Reason) {
        let mut status = self.old_status().clone();
        status["phase"] = json!("Failed");
        status["reason"] = json!(reason.word);
        status["message"] = json!(reason.message);
        if status != *self.old_status() {
            self.shared.set_status(&self.object, &status);
        }
    }

    /// Whether the pod has to end, and why.
    pub(super) fn judge(&mut self, pod: &Pod) -> Option<Reason> {
        if self.time_left(pod) == Some(Duration::ZERO) {
            let message = "Pod was active on the node longer than the specified deadline";
            self.tell(pod, None, Sort::Normal, "DeadlineExceeded", message);
            return Some(Reason::new("DeadlineExceeded", message));
        }
        let limited = volumes::limited(pod, &self.shared.places);
        if limited.is_empty() || self.measured.is_some_and(|when| when.elapsed() < MEASURED) {
            return None;
        }
        let mut verdict = None;
        for (name, path, limit) in limited {
            let most = u64::try_from(limit.value()).unwrap_or_default();
            match volumes::size::used(&path, most) {
                Ok(used) if used > most => {
                    let message = too_large(&name, limit);
                    self.tell(pod, None, Sort::Warning, "Evicted", &message);
                    verdict = Some(Reason::new("Evicted", message));
                    break;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => log::warn!("{}: cannot be measured: {error}", path.display()),
            }
        }
        self.measured = Some(Instant::now());
        verdict
    }

    /// After which time it is to be judged again.
    pub(super) fn until_judged(&self, pod: &Pod) -> Duration {
        let limited = !volumes::limited(pod, &self.shared.places).is_empty();
        let often = if limited { MEASURED } else { Duration::MAX };
        self.time_left(pod).map_or(often, |left| left.min(often))
    }

    /// How long the pod may still be active, if there is a limit.
    fn time_left(&self, pod: &Pod) -> Option<Duration> {
        let limit = u64::try_from(pod.spec.active_deadline_seconds?).unwrap_or_default();
        let since = self.old_status()["startTime"].as_str()?;
        let since = humantime::parse_rfc3339(since).ok()?;
        let active = since.elapsed().unwrap_or_default();
        Some(Duration::from_secs(limit).saturating_sub(active))
    }
}

fn too_large(volume: &str, limit: Quantity) -> String {
    let bytes = limit.value();
    let mebibytes = bytes >> 20;
    let limit = if mebibytes << 20 == bytes && bytes > 0 {
        format!("{mebibytes}Mi")
    } else {
        bytes.to_string()
    };
    format!("Usage of EmptyDir volume \"{volume}\" exceeds the limit \"{limit}\". ")
}

/// What a container said at its end.
fn last_words(shared: &Shared, pod: &Pod, one: &Instance) -> String {
    let Some(container) = pod.all_containers().find(|of| of.name == one.name) else {
        return String::new();
    };
    if one.state != State::Exited {
        return String::new();
    }
    let (uid, attempt) = (&pod.metadata.uid, one.attempt);
    let words = shared.places.termination(uid, &one.name, attempt);
    let words = end_of(&words, WORDS, usize::MAX);
    let of_log = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    if !words.is_empty() || !of_log || one.exit_code == 0 {
        return words;
    }
    let log = shared
        .places
        .logs(pod)
        .join(Places::log_of(&one.name, attempt));
    let text = end_of(&log, WORDS_OF_LOG.0 * 4, WORDS_OF_LOG.1);
    // Each line has its time, its stream and a tag before it.
    let lines = text.split_inclusive('\n');
    let text: String = lines
        .filter_map(|line| line.splitn(4, ' ').nth(3))
        .collect();
    tail(&text, usize::try_from(WORDS_OF_LOG.0).unwrap_or(usize::MAX)).to_owned()
}

/// The end of a file, in so many bytes and lines; nothing of what cannot be read.
fn end_of(path: &Path, bytes: u64, lines: usize) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(bytes)))?;
        let mut end = Vec::new();
        file.take(bytes).read_to_end(&mut end)?;
        Ok(end)
    };
    let end = read().unwrap_or_default();
    let end = String::from_utf8_lossy(&end).into_owned();
    let all: Vec<&str> = end.split_inclusive('\n').collect();
    all[all.len().saturating_sub(lines)..].concat()
}

/// The last bytes of a text, in whole characters.
fn tail(text: &str, bytes: usize) -> &str {
    let mut at = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(at) {
        at += 1;
    }
    &text[at..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::Scratch;

    #[test]
    fn ends_are_of_whole_lines_and_characters() {
        let scratch = Scratch::new();
        let file = scratch.path().join("f");
        std::fs::write(&file, "one\ntwo\nthree\n").unwrap();
        assert_eq!(end_of(&file, 100, 2), "two\nthree\n");
        assert_eq!(end_of(&file, 6, 9), "three\n");
        assert_eq!(end_of(&scratch.path().join("none"), 6, 9), "");
        assert_eq!(tail("a\u{20ac}b", 3), "b");
        assert_eq!(tail("ab", 9), "ab");
    }

    #[test]
    fn limits_are_said_as_they_are_written() {
        let of = |text: &str| too_large("v", text.parse().unwrap());
        assert_eq!(
            of("2Mi"),
            "Usage of EmptyDir volume \"v\" exceeds the limit \"2Mi\". "
        );
        assert!(of("1000").contains("\"1000\""));
    }
}
