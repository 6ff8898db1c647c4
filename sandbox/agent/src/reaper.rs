//! Collects every child that ends and tells whoever watches it.
//!
//! This is the first process, so children are not only the crun it starts: what crun started
//! detached is handed over by the kernel when crun ends, and it may have ended before crun has
//! said which process it was. Hence one place that reaps, and nobody else waits for a child. A
//! process id stays taken until its status has been matched, under one lock: no signal and no
//! status can go to a later process of the same id.

use std::{
    collections::HashMap,
    io,
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions},
};

/// Called once with the status, from the thread that reaps: must not wait for anything.
pub(crate) type Watch = Box<dyn FnOnce(ExitStatus) + Send>;

#[derive(Default)]
pub(crate) struct Reaper {
    state: Mutex<State>,
    /// There is a child again.
    spawned: Condvar,
}

#[derive(Default)]
struct State {
    watched: HashMap<Pid, Watch>,
    /// Starts whose process is not known by its id yet.
    starting: usize,
    /// Ended while something was starting, and watched by nobody: perhaps what was started.
    unclaimed: HashMap<Pid, ExitStatus>,
    /// Whether something has been spawned since there were no children.
    children: bool,
}

/// While it lives, the end of an unknown process is remembered.
pub(crate) struct Starting<'a>(&'a Reaper);

impl Reaper {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic ends this program, so nobody sees a state left half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Spawns `command` and watches it.
    pub(crate) fn spawn(&self, command: &mut Command, watch: Watch) -> io::Result<Pid> {
        let mut state = self.state();
        // Dropping the handle neither waits for the child nor ends it.
        let pid = Pid::from_child(&command.spawn()?);
        state.watched.insert(pid, watch);
        state.children = true;
        drop(state);
        self.spawned.notify_all();
        Ok(pid)
    }

    /// Something is about to start a process that only it knows.
    pub(crate) fn starting(&self) -> Starting<'_> {
        self.state().starting += 1;
        Starting(self)
    }

    fn reap_ended(&self) {
        loop {
            let mut state = self.state();
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => (pid, ExitStatus::from_raw(status.as_raw())),
                Err(Errno::INTR) => continue,
                Ok(None) | Err(_) => return,
            };
            let watch = state.watched.remove(&pid);
            if watch.is_none() && state.starting > 0 {
                state.unclaimed.insert(pid, status);
            }
            drop(state);
            if let Some(watch) = watch {
                watch(status);
            }
        }
    }

    /// Sends a signal to a watched process. False when it has ended.
    pub(crate) fn signal(&self, pid: Pid, signal: Signal) -> bool {
        let state = self.state();
        state.watched.contains_key(&pid) && rustix::process::kill_process(pid, signal).is_ok()
    }

    /// Reaps for ever.
    pub(crate) fn run(&self) -> ! {
        loop {
            // Only looks: the id is given free under the lock.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            match rustix::process::waitid(WaitId::All, options) {
                Ok(_) => self.reap_ended(),
                Err(Errno::CHILD) => {
                    let mut state = self.state();
                    while !state.children {
                        state = self
                            .spawned
                            .wait(state)
                            .unwrap_or_else(PoisonError::into_inner);
                    }
                    state.children = false;
                }
                Err(_) => {}
            }
        }
    }
}

impl Starting<'_> {
    /// The process that was started is this one, a child of ours by now.
    pub(crate) fn watch(self, pid: Pid, watch: Watch) {
        let mut state = self.0.state();
        match state.unclaimed.remove(&pid) {
            Some(status) => {
                drop(state);
                watch(status);
            }
            None => {
                state.watched.insert(pid, watch);
                state.children = true;
                drop(state);
                self.0.spawned.notify_all();
            }
        }
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.starting -= 1;
        if state.starting == 0 {
            state.unclaimed = HashMap::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, mpsc},
        thread,
        time::Duration,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// The one test that has children, because the reaper takes all of the process.
    #[test]
    fn every_status_arrives_where_it_belongs() {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let reaper = Arc::new(Reaper::new());
        let background = Arc::clone(&reaper);
        thread::spawn(move || background.run());

        let (sender, receiver) = mpsc::channel();
        for code in 0..20 {
            let sender = sender.clone();
            let watch: Watch = Box::new(move |status| {
                let _ = sender.send((code, status.code()));
            });
            let mut command = Command::new("/bin/sh");
            command.args(["-c", &format!("exit {code}")]);
            reaper.spawn(&mut command, watch).unwrap();
        }
        for _ in 0..20 {
            let (code, seen) = receiver.recv_timeout(LIMIT).unwrap();
            assert_eq!(seen, Some(code));
        }

        // An orphan that ends before anybody asks for it, as after `crun run --detach`.
        let file = std::env::temp_dir().join(format!("pericarp-reaper-{}", std::process::id()));
        let script = format!("(sleep 0.1; exit 9) & echo $! > {}", file.display());
        let (sender, receiver) = mpsc::channel();
        let start = reaper.starting();
        let parent_over = sender.clone();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]);
        reaper
            .spawn(
                &mut command,
                Box::new(move |s| parent_over.send(s).unwrap()),
            )
            .unwrap();
        assert!(receiver.recv_timeout(LIMIT).unwrap().success());
        thread::sleep(Duration::from_millis(500));
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        let pid = Pid::from_raw(text.trim().parse().unwrap()).unwrap();
        start.watch(pid, Box::new(move |status| sender.send(status).unwrap()));
        assert_eq!(receiver.recv_timeout(LIMIT).unwrap().code(), Some(9));
        assert!(!reaper.signal(pid, Signal::KILL));

        // A running one is signalled.
        let (sender, receiver) = mpsc::channel();
        let mut command = Command::new("/bin/sleep");
        command.arg("60");
        let watch: Watch = Box::new(move |status| sender.send(status).unwrap());
        let pid = reaper.spawn(&mut command, watch).unwrap();
        assert!(reaper.signal(pid, Signal::TERM));
        assert_eq!(receiver.recv_timeout(LIMIT).unwrap().signal(), Some(15));
    }
}
