//! Landlock rules that allow nothing but the removal of the own sockets, to
//! connect to their neighbours where that was asked for, and what shared
//! directories are shared for: third step of [`crate::enter`]. It holds for
//! rings too, since Landlock checks the act and not the system call; it does not
//! touch what is open already.

use std::os::fd::AsFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use crate::ConfineError;
use crate::report::{Confinement, Measure};
use crate::socket::SocketFile;
use crate::tree::Tree;

/// The newest ABI whose rights we know to be safe to deny. The crate leaves out
/// what the running kernel does not know.
const NEWEST: ABI = ABI::V10;

pub(crate) fn forbid(
    sockets: &[SocketFile],
    trees: &[Tree],
    report: &mut Confinement,
) -> Result<(), ConfineError> {
    let status = apply(sockets, trees).map_err(ConfineError::Landlock)?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi,
        LandlockStatus::NotEnabled => {
            report.lacks(Measure::Landlock, "landlock (disabled at boot)");
            return Ok(());
        }
        LandlockStatus::NotImplemented => {
            report.lacks(Measure::Landlock, "landlock (not in this kernel)");
            return Ok(());
        }
    };
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(ConfineError::NotEnforced);
    }
    let mut denied = vec![if trees.is_empty() {
        "no files"
    } else {
        "no files but the shared"
    }];
    if !sockets.is_empty() {
        denied.push("own socket removable");
    }
    if abi >= ABI::V4 {
        denied.push("no TCP");
    }
    if abi >= ABI::V6 {
        denied.push("no abstract sockets, no signals out");
    }
    report.holds(
        Measure::Landlock,
        format!("landlock {abi:?} ({})", denied.join(", ")),
    );
    Ok(())
}

fn apply(
    sockets: &[SocketFile],
    trees: &[Tree],
) -> Result<landlock::RestrictionStatus, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for socket in sockets {
        let mut access = BitFlags::from(AccessFs::RemoveFile);
        if socket.has_neighbours() {
            access |= AccessFs::ResolveUnix;
        }
        rules = rules.add_rule(PathBeneath::new(socket.as_fd(), access))?;
    }
    for tree in trees {
        // Not to execute, to command devices or to connect to sockets: nobody
        // here does. What is made may be renamed from directory to directory.
        let access = if tree.is_read_only() {
            AccessFs::ReadFile | AccessFs::ReadDir
        } else {
            AccessFs::from_all(NEWEST)
                & !(AccessFs::Execute | AccessFs::IoctlDev | AccessFs::ResolveUnix)
        };
        rules = rules.add_rule(PathBeneath::new(tree.as_fd(), access))?;
    }
    rules.restrict_self()
}
