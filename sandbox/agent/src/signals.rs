//! Signals by their number, as a host gives it.
//!
//! Called by `container`, which sends them to processes of containers and to nobody else.

// UNSAFETY: rustix has no safe form of a signal without a name, as real-time signals are.
#![expect(unsafe_code)]

use rustix::process::Signal;

/// The last of the kernel (`_NSIG`).
const LAST: u32 = 64;

/// The signal with this number. Real-time signals are among them, since images may ask to be
/// stopped by one: those that the libc keeps for itself are of this program, not of another.
pub(crate) fn numbered(number: u32) -> Option<Signal> {
    if !(1..=LAST).contains(&number) {
        return None;
    }
    let number = i32::try_from(number).ok()?;
    // SAFETY: the kernel has a signal of this number. What the libc of this program does with it
    // is not disturbed: it is sent to others, which have a libc of their own.
    Some(unsafe { Signal::from_raw_unchecked(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_the_kernel_has_a_number() {
        assert_eq!(numbered(9), Some(Signal::KILL));
        // SIGRTMIN+3, which has systemd power off.
        assert_eq!(numbered(37).map(Signal::as_raw), Some(37));
        assert_eq!(numbered(64).map(Signal::as_raw), Some(64));
        for none in [0, 65, u32::MAX] {
            assert_eq!(numbered(none), None, "{none}");
        }
    }
}
