//! Gives up what the process could do by being who it is: capabilities, gain by
//! `execve`, dumps. Second step of [`crate::enter`]; it changes no user id.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use crate::report::{Confinement, Measure};
use crate::{ConfineError, step};

pub(crate) fn drop_all(report: &mut Confinement) -> Result<(), ConfineError> {
    step("set no_new_privs", set_no_new_privs(true))?;
    report.holds(Measure::NoNewPrivs, "no_new_privs");

    let bounded = drop_bounding_set()?;
    match clear_ambient_capability_set() {
        // Linux before 4.3 has no ambient set.
        Ok(()) | Err(Errno::INVAL) => {}
        error => step("clear the ambient capabilities", error)?,
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    step("drop the capabilities", set_capabilities(None, sets))?;
    if step("read the capabilities", capabilities(None))? != sets {
        return Err(ConfineError::Capabilities);
    }
    report.holds(Measure::Capabilities, "0 capabilities");
    if !bounded {
        // Without consequence while no_new_privs holds, but true.
        report.lacks(
            Measure::Capabilities,
            "empty capability bounding set (needs CAP_SETPCAP)",
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

/// Whether the set is empty; an unprivileged process cannot change it.
fn drop_bounding_set() -> Result<bool, ConfineError> {
    for bit in 0..64 {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // Past the last capability this kernel knows.
            Err(Errno::INVAL) => return Ok(true),
            Err(Errno::PERM) => return Ok(false),
            error => step("drop the capability bounding set", error)?,
        }
    }
    Ok(true)
}
