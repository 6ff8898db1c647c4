//! The terminal that a guest's console is typed at: its own line editing and echo are off while
//! the guest has it, since the guest has those, and its keys for signals are the guest's, too.
//! Used by `main` before the process is confined, and once more in the end.

use rustix::io::Errno;
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// The command by which a terminal gets its settings back, TCSETS2 (asm-generic/ioctls.h).
pub const RESTORE: u32 = 0x402c_542b;

/// A terminal that is the guest's until this is dropped.
#[derive(Debug)]
pub struct Raw(Termios);

impl Raw {
    /// Takes stdin, if that is a terminal.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn enter() -> Result<Option<Self>, Errno> {
        if !isatty(stdin()) {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // What we log still begins its lines at the left.
        raw.output_modes = before.output_modes;
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nobody is left to hear of an error.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.0);
    }
}
