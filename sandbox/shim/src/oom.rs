//! How soon the host's kernel ends a pod when the host has no memory left (`oom_score_adj`,
//! proc_pid_oom_score_adj(5)).
//!
//! containerd makes itself and its shims all but unkillable, and a machine that inherited that would
//! outlive the host's own services. `machine` starts its processes as any other program; each of the
//! pod's containers then says, by its configuration, how soon it may go, and the machine goes with
//! the first (`pod`).

use std::{fs, io};

const OURS: &str = "/proc/self/oom_score_adj";

/// As long as this is there, children are as killable as any program.
#[derive(Debug)]
pub(crate) struct Ordinary(Option<String>);

impl Ordinary {
    pub(crate) fn begin() -> Self {
        let ours = fs::read_to_string(OURS).unwrap_or_default();
        let protected = ours.trim().parse().is_ok_and(|score: i32| score < 0);
        let raised = protected && fs::write(OURS, "0").is_ok();
        Self(raised.then_some(ours))
    }
}

impl Drop for Ordinary {
    fn drop(&mut self) {
        if let Some(score) = &self.0
            && let Err(error) = fs::write(OURS, score.trim())
        {
            log::warn!("the shim is no longer protected from want of memory: {error}");
        }
    }
}

/// Has these processes go as soon as the score says.
pub(crate) fn set(processes: &[u32], score: i32) {
    for process in processes {
        match fs::write(format!("/proc/{process}/oom_score_adj"), score.to_string()) {
            // It has ended, which others notice.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("oom_score_adj {score} of process {process}: {error}"),
            Ok(()) => {}
        }
    }
}

/// A process that came later is as killable as the machine's others.
pub(crate) fn as_killable_as(machine: u32, process: u32) {
    let score = fs::read_to_string(format!("/proc/{machine}/oom_score_adj"));
    if let Some(score) = score.ok().and_then(|text| text.trim().parse().ok()) {
        set(&[process], score);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn of(process: u32) -> String {
        let score = fs::read_to_string(format!("/proc/{process}/oom_score_adj"));
        score.unwrap().trim().to_owned()
    }

    #[test]
    fn children_are_ordinary_and_then_as_they_are_said_to_be() {
        // Lowering it again takes a privilege.
        if !rustix::process::geteuid().is_root() || fs::write(OURS, "-5").is_err() {
            return;
        }
        let ordinary = Ordinary::begin();
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        drop(ordinary);
        assert_eq!(of(std::process::id()), "-5");
        assert_eq!(of(child.id()), "0");
        set(&[child.id()], 900);
        assert_eq!(of(child.id()), "900");
        child.kill().unwrap();
        child.wait().unwrap();
        set(&[child.id()], 900);
        fs::write(OURS, "0").unwrap();
    }
}
