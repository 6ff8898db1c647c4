//! On whose behalf a thread acts. Guards that take on a caller's ids, an umask,
//! or give up CAP_FSETID for the length of one system call. The ids are the
//! thread's own (raw `setresuid`, not the library's, which is for the whole
//! process). Called by `share`.
//!
//! A filter has to allow on each thread that calls: `setresuid`, `setresgid`,
//! `setgroups`, `getgroups`, `capget`, `capset`, `umask`, `unshare(CLONE_FS)`.
//!
//! What could not be put back ends the process: a worker that goes on as
//! somebody else is worse.

use std::cell::Cell;
use std::marker::PhantomData;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{getegid, geteuid, getgroups, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, capabilities, set_capabilities, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::calls::own_umask;

/// Who a guest says is asking, in the guest's ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process, 0 if it is not known.
    pub pid: u32,
    /// A group that the caller is in besides: that of the directory something
    /// is created in, where the guest says so. Without it a setgid bit of a
    /// member's new file is lost, never kept for a stranger.
    pub group: Option<u32>,
}

/// Not to be sent: what it restores is its thread's.
type OfThisThread = PhantomData<*const ()>;

/// The thread is the caller until this is dropped.
#[derive(Debug)]
#[must_use = "the ids are put back at once"]
pub(crate) struct As {
    own: Option<Own>,
    _thread: OfThisThread,
}

#[derive(Debug)]
struct Own {
    uid: Option<Uid>,
    gid: Option<Gid>,
    groups: Option<Vec<Gid>>,
    capabilities: Option<CapabilitySets>,
}

impl As {
    /// Takes on ids of the host. Nothing changes where they are the thread's
    /// own, or where the process has no right to others (it is not root): then
    /// it creates as itself.
    ///
    /// `override_access` keeps CAP_DAC_OVERRIDE: the guest's kernel has checked
    /// permissions already, and knows all groups of the caller, as we do not.
    pub(crate) fn caller(
        uid: u32,
        gid: u32,
        group: Option<u32>,
        override_access: bool,
    ) -> Result<Self, Errno> {
        let (own_uid, own_gid) = (geteuid(), getegid());
        let mut guard = Self {
            own: None,
            _thread: PhantomData,
        };
        if own_uid.as_raw() == uid && own_gid.as_raw() == gid {
            return Ok(guard);
        }
        let before = capabilities(None)?;
        let needed = CapabilitySet::SETUID | CapabilitySet::SETGID;
        if !before.effective.contains(needed) {
            return Ok(guard);
        }
        let own = guard.own.insert(Own {
            uid: None,
            gid: None,
            groups: None,
            capabilities: None,
        });
        // Supplementary groups first, then the group, then the user: each takes
        // a right that the next step drops. Ours would let the caller's file
        // keep a setgid bit of a group it is not in (CVE-2022-0358).
        let groups = getgroups()?;
        let wanted: Vec<Gid> = group.into_iter().map(Gid::from_raw).collect();
        if groups != wanted {
            set_thread_groups(&wanted)?;
            own.groups = Some(groups);
        }
        if own_gid.as_raw() != gid {
            set_thread_res_gid(None, Gid::from_raw(gid), None)?;
            own.gid = Some(own_gid);
        }
        if own_uid.as_raw() != uid {
            set_thread_res_uid(None, Uid::from_raw(uid), None)?;
            own.uid = Some(own_uid);
            own.capabilities = Some(before);
            let mut kept = before;
            kept.effective = CapabilitySet::empty();
            if override_access {
                kept.effective |= before.permitted & CapabilitySet::DAC_OVERRIDE;
            }
            set_capabilities(None, kept)?;
        }
        Ok(guard)
    }
}

impl Drop for As {
    fn drop(&mut self) {
        let Some(own) = self.own.take() else {
            return;
        };
        let restore = || {
            if let Some(uid) = own.uid {
                set_thread_res_uid(None, uid, None)?;
            }
            // The user's change has the kernel set or clear the effective ones.
            if let Some(sets) = own.capabilities {
                set_capabilities(None, sets)?;
            }
            if let Some(gid) = own.gid {
                set_thread_res_gid(None, gid, None)?;
            }
            if let Some(groups) = own.groups {
                set_thread_groups(&groups)?;
            }
            Ok::<(), Errno>(())
        };
        if restore().is_err() {
            std::process::abort();
        }
    }
}

/// The thread has no CAP_FSETID until this is dropped: the kernel then takes
/// setuid and setgid from what it changes. security.capability goes with any
/// change, CAP_FSETID or not.
#[derive(Debug)]
#[must_use = "the capability is taken back at once"]
pub(crate) struct WithoutFsetid {
    before: Option<CapabilitySets>,
    _thread: OfThisThread,
}

impl WithoutFsetid {
    /// Where `wanted`, and the thread has it.
    pub(crate) fn when(wanted: bool) -> Result<Self, Errno> {
        let mut guard = Self {
            before: None,
            _thread: PhantomData,
        };
        if wanted {
            let before = capabilities(None)?;
            if before.effective.contains(CapabilitySet::FSETID) {
                let mut less = before;
                less.effective.remove(CapabilitySet::FSETID);
                set_capabilities(None, less)?;
                guard.before = Some(before);
            }
        }
        Ok(guard)
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && set_capabilities(None, before).is_err()
        {
            std::process::abort();
        }
    }
}

thread_local! {
    /// Whether this thread's umask is its own, once it has been tried.
    static OWN_UMASK: Cell<Option<bool>> = const { Cell::new(None) };
}

/// The mode to create with, and the umask that holds until this is dropped.
#[derive(Debug)]
#[must_use = "the umask is put back at once"]
pub(crate) struct Umask {
    set: bool,
    /// For the system call.
    pub(crate) mode: Mode,
    _thread: OfThisThread,
}

impl Umask {
    /// With `by_host` the kernel applies the umask, and does not below a default
    /// access control list; otherwise we do. Where a thread can have no umask of
    /// its own the process's is made 0 and the list's rule is lost: the umask
    /// is applied always, which gives less, never more.
    pub(crate) fn new(mode: u32, mask: u32, by_host: bool) -> Self {
        let own = OWN_UMASK.get().unwrap_or_else(|| {
            let own = own_umask().is_ok();
            umask(Mode::empty());
            OWN_UMASK.set(Some(own));
            own
        });
        let mask = mask & 0o777;
        let set = by_host && own;
        let mode = if set { mode } else { mode & !mask } & 0o7777;
        if set {
            umask(Mode::from_raw_mode(mask));
        }
        Self {
            set,
            mode: Mode::from_raw_mode(mode),
            _thread: PhantomData,
        }
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        if self.set {
            umask(Mode::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type State = (Uid, Gid, Vec<Gid>, CapabilitySets);

    fn state() -> State {
        (
            geteuid(),
            getegid(),
            getgroups().unwrap(),
            capabilities(None).unwrap(),
        )
    }

    /// Each on a thread of its own, so that a failure does not spread.
    fn on_a_thread(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().unwrap();
    }

    fn is_root() -> bool {
        let root = geteuid().is_root();
        if !root {
            assert!(std::env::var_os("PERICARP_REQUIRE_ALL").is_none());
            eprintln!("SKIPPED: run as root");
        }
        root
    }

    #[test]
    fn a_caller_is_taken_on_and_put_off() {
        if !is_root() {
            return;
        }
        on_a_thread(|| {
            set_thread_groups(&[Gid::from_raw(0), Gid::from_raw(27)]).unwrap();
            let before = state();
            let guard = As::caller(1234, 2345, None, true).unwrap();
            let (uid, gid, groups, sets) = state();
            assert_eq!((uid.as_raw(), gid.as_raw()), (1234, 2345));
            assert!(groups.is_empty(), "{groups:?}");
            assert_eq!(sets.effective, CapabilitySet::DAC_OVERRIDE);
            drop(guard);
            assert_eq!(state(), before);
            let guard = As::caller(1234, 2345, Some(77), false).unwrap();
            assert_eq!(state().2, [Gid::from_raw(77)]);
            assert!(state().3.effective.is_empty());
            drop(guard);
            assert_eq!(state(), before);
        });
    }

    #[test]
    fn other_threads_and_the_own_ids_are_left_alone() {
        if !is_root() {
            return;
        }
        on_a_thread(|| {
            let before = state();
            let guard = As::caller(0, 0, None, true).unwrap();
            assert_eq!(state(), before);
            drop(guard);
            let guard = As::caller(1, 1, None, true).unwrap();
            on_a_thread_of_the_process(before.0);
            drop(guard);
            assert_eq!(state(), before);
        });
    }

    /// The process's first thread must not have changed.
    fn on_a_thread_of_the_process(uid: Uid) {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("Uid:")).unwrap();
        let effective = line.split_whitespace().nth(2).unwrap();
        assert_eq!(effective, uid.as_raw().to_string());
    }

    #[test]
    fn who_may_not_change_ids_stays() {
        if !is_root() {
            return;
        }
        on_a_thread(|| {
            let mut sets = capabilities(None).unwrap();
            sets.effective.remove(CapabilitySet::SETUID);
            set_capabilities(None, sets).unwrap();
            let before = state();
            let guard = As::caller(1234, 2345, None, true).unwrap();
            assert_eq!(state(), before);
            drop(guard);
            assert_eq!(state(), before);
        });
    }

    #[test]
    fn fsetid_comes_back() {
        if !is_root() {
            return;
        }
        on_a_thread(|| {
            let before = state();
            let guard = WithoutFsetid::when(true).unwrap();
            let now = state().3.effective;
            assert!(!now.contains(CapabilitySet::FSETID));
            drop(guard);
            assert_eq!(state(), before);
            let _guard = WithoutFsetid::when(false).unwrap();
            assert_eq!(state(), before);
        });
    }
}
