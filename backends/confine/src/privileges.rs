//! Gives up what the process could do by being who it is: capabilities, gain by
//! `execve`, dumps. Second step of [`crate::enter`]; it changes no user id.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use crate::report::{Confinement, Measure};
use crate::sharing::Kept;
use crate::{ConfineError, step};

pub(crate) fn drop_all(kept: &Kept, report: &mut Confinement) -> Result<(), ConfineError> {
    step("set no_new_privs", set_no_new_privs(true))?;
    report.holds(Measure::NoNewPrivs, "no_new_privs");

    let bounded = drop_bounding_set(kept.capabilities)?;
    match clear_ambient_capability_set() {
        // Linux before 4.3 has no ambient set.
        Ok(()) | Err(Errno::INVAL) => {}
        error => step("clear the ambient capabilities", error)?,
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: kept.capabilities,
        permitted: kept.capabilities,
        inheritable: none,
    };
    step("drop the capabilities", set_capabilities(None, sets))?;
    if step("read the capabilities", capabilities(None))? != sets {
        return Err(ConfineError::Capabilities);
    }
    let (wanted, count) = (kept.wanted.iter().count(), kept.capabilities.iter().count());
    report.holds(
        Measure::Capabilities,
        match count {
            _ if count < wanted => format!("{count} of {wanted} capabilities wanted"),
            1 => "1 capability".to_owned(),
            _ => format!("{count} capabilities"),
        },
    );
    if !bounded {
        // Without consequence while no_new_privs holds, but true.
        report.lacks(
            Measure::Capabilities,
            "capability bounding set (needs CAP_SETPCAP)",
        );
    }

    step(
        "make the process undumpable",
        set_dumpable_behavior(DumpableBehavior::NotDumpable),
    )?;
    let zero = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    step("forbid core files", setrlimit(Resource::Core, zero))?;
    report.holds(Measure::Dumps, "no dumps");
    Ok(())
}

/// Whether nothing else is in the set; an unprivileged process cannot change it.
fn drop_bounding_set(kept: CapabilitySet) -> Result<bool, ConfineError> {
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last capability this kernel knows.
            Err(Errno::INVAL) => return Ok(true),
            Err(Errno::PERM) => return Ok(false),
            error => step("drop the capability bounding set", error)?,
        }
    }
    Ok(true)
}
