//! A script: bytes taken from the front, zeros when there are none left.

/// What is left of a script.
#[derive(Debug)]
pub(crate) struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn take(&mut self, count: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(count.min(self.0.len()));
        self.0 = tail;
        head
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let got = self.take(N);
        bytes[..got.len()].copy_from_slice(got);
        bytes
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Mostly a guest address that means something, with its neighbours.
    pub(crate) fn address(&mut self) -> u64 {
        let kind = self.u8();
        let offset = u64::from(self.u16());
        match kind & 7 {
            0..=3 => offset % crate::memory::END,
            4 => crate::memory::FAR + offset % (crate::memory::SMALL + 8),
            5 => crate::memory::END - offset % 32 + 8,
            6 => crate::memory::SEAM - offset % 64,
            _ => self.u64(),
        }
    }
}

/// Types of requests, for the seeds.
pub(crate) const KINDS: [(u8, &str); 6] = [
    (0, "read"),
    (1, "write"),
    (4, "flush"),
    (8, "serial"),
    (11, "discard"),
    (13, "zeroes"),
];
