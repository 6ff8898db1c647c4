//! Whoever does nothing wrong, beside all that is wrong, and must notice nothing.

/// Somebody with a device.
pub(super) trait Innocent {
    /// Does some I/O and compares what comes of it.
    ///
    /// # Errors
    /// What is not as it should be.
    fn turn(&mut self) -> Result<(), String>;

    /// Looks at what is left when it is over.
    ///
    /// # Errors
    /// What is not as it should be.
    fn finish(&mut self) -> Result<(), String> {
        Ok(())
    }
}
