//! The accesses to ring memory that driver and device race for.
//!
//! [`SplitQueue`](crate::SplitQueue) is the only caller. In a program each is
//! one instruction. In this crate's tests they ask the memory model first:
//! `notification` runs the queue's own code under `loom`, which tries every
//! order and every stale value that the language allows.
#![expect(unsafe_code)]
// UNSAFETY: guest memory is reached through raw pointers only.

use std::ptr;
use std::sync::atomic::{AtomicU16, Ordering, fence};

#[cfg(test)]
use crate::notification::model;

/// Which of the two fences of the notification protocol this is. Programs do
/// not care; the model takes one out to show that it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fence {
    /// Between used.idx and the driver's wish to be called.
    BeforeCall,
    /// Between our wish to be kicked and avail.idx.
    BeforeSleep,
}

/// Reads two bytes that the driver may write at any time.
///
/// # Safety
/// `at` is valid and 2-byte aligned.
#[inline]
pub(crate) unsafe fn read_u16(at: *const u8) -> u16 {
    #[cfg(test)]
    if let Some(value) = model::load(at, Ordering::Relaxed) {
        return value;
    }
    // SAFETY: the caller's promise.
    unsafe { ptr::read_volatile(at.cast()) }
}

/// Writes two bytes that the driver may read at any time.
///
/// # Safety
/// As [`read_u16`].
#[inline]
pub(crate) unsafe fn write_u16(at: *mut u8, value: u16) {
    #[cfg(test)]
    if model::store(at, value, Ordering::Relaxed) {
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { ptr::write_volatile(at.cast(), value) }
}

/// Writes four bytes that the driver reads after an index said so.
///
/// # Safety
/// `at` is valid and 4-byte aligned.
#[inline]
pub(crate) unsafe fn write_u32(at: *mut u8, value: u32) {
    #[cfg(test)]
    if model::store_wide(at, value) {
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { ptr::write_volatile(at.cast(), value) }
}

/// Loads a ring index.
///
/// # Safety
/// As [`read_u16`], and all accesses by us to these bytes are atomic.
#[inline]
pub(crate) unsafe fn load_index(at: *mut u8, order: Ordering) -> u16 {
    #[cfg(test)]
    if let Some(value) = model::load(at, order) {
        return value;
    }
    // SAFETY: the caller's promise.
    unsafe { AtomicU16::from_ptr(at.cast()) }.load(order)
}

/// Stores a ring index.
///
/// # Safety
/// As [`load_index`].
#[inline]
pub(crate) unsafe fn store_index(at: *mut u8, value: u16, order: Ordering) {
    #[cfg(test)]
    if model::store(at, value, order) {
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { AtomicU16::from_ptr(at.cast()) }.store(value, order);
}

/// A full fence: what was stored before it is visible before anything after it
/// is loaded.
#[inline]
pub(crate) fn full_fence(which: Fence) {
    #[cfg(test)]
    if model::fence(which) {
        return;
    }
    let _ = which;
    fence(Ordering::SeqCst);
}
