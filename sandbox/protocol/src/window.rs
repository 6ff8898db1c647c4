//! The credit of one stream, seen from its sender and from its receiver.
//!
//! Both ends keep the books so that a peer that sends more than it may, or hands out credit that
//! was never used, is caught at once. Pure arithmetic: no input or output.

use thiserror::Error;

use crate::WINDOW;

/// The other side broke the rules of flow control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum WindowError {
    /// More bytes than the window allows.
    #[error("more output than it was allowed to send")]
    Overrun,
    /// Credit for bytes that were never sent.
    #[error("credit for bytes that were never sent")]
    Excess,
}

/// What the sender of a stream may still send.
#[derive(Debug)]
pub struct SendWindow {
    left: u32,
}

impl Default for SendWindow {
    fn default() -> Self {
        Self { left: WINDOW }
    }
}

impl SendWindow {
    /// Bytes that may be sent now.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left as usize
    }

    /// Books `amount` sent bytes, which the caller has kept within [`SendWindow::left`].
    pub fn sent(&mut self, amount: usize) {
        debug_assert!(amount <= self.left());
        self.left = self
            .left
            .saturating_sub(u32::try_from(amount).unwrap_or(u32::MAX));
    }

    /// Books credit from the receiver.
    ///
    /// # Errors
    ///
    /// The receiver returns more than it got.
    pub fn credit(&mut self, amount: u32) -> Result<(), WindowError> {
        match self.left.checked_add(amount) {
            Some(left) if left <= WINDOW => {
                self.left = left;
                Ok(())
            }
            _ => Err(WindowError::Excess),
        }
    }
}

/// What the receiver of a stream must still be ready to take.
#[derive(Debug)]
pub struct ReceiveWindow {
    left: u32,
    /// Taken by the reader and not yet told to the sender.
    owed: u32,
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self {
            left: WINDOW,
            owed: 0,
        }
    }
}

impl ReceiveWindow {
    /// Books `amount` bytes that arrived.
    ///
    /// # Errors
    ///
    /// The sender has sent more than it may.
    pub fn received(&mut self, amount: usize) -> Result<(), WindowError> {
        let amount = u32::try_from(amount).map_err(|_| WindowError::Overrun)?;
        self.left = self.left.checked_sub(amount).ok_or(WindowError::Overrun)?;
        Ok(())
    }

    /// Books `amount` bytes that the reader has taken. Returns the credit to send now, if it is
    /// enough to be worth a frame: a quarter of the window.
    pub fn taken(&mut self, amount: usize) -> Option<u32> {
        self.owed = self
            .owed
            .saturating_add(u32::try_from(amount).unwrap_or(u32::MAX));
        if self.owed < WINDOW / 4 {
            return None;
        }
        let credit = std::mem::take(&mut self.owed);
        self.left = self.left.saturating_add(credit).min(WINDOW);
        Some(credit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_window_stops_until_credit_comes() {
        let (mut send, mut receive) = (SendWindow::default(), ReceiveWindow::default());
        let all = WINDOW as usize;
        send.sent(all);
        assert_eq!(send.left(), 0);
        assert_eq!(receive.received(all), Ok(()));
        assert_eq!(receive.taken(100), None);
        let credit = receive.taken(all - 100).unwrap();
        assert_eq!(credit, WINDOW);
        assert_eq!(send.credit(credit), Ok(()));
        assert_eq!(send.left(), all);
    }

    #[test]
    fn cheats_are_caught() {
        assert_eq!(
            ReceiveWindow::default().received(WINDOW as usize + 1),
            Err(WindowError::Overrun)
        );
        assert_eq!(SendWindow::default().credit(1), Err(WindowError::Excess));
        let mut send = SendWindow::default();
        send.sent(10);
        assert_eq!(send.credit(u32::MAX), Err(WindowError::Excess));
        assert_eq!(send.credit(10), Ok(()));
    }
}
