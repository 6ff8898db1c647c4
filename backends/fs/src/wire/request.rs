//! What guests send, field by field. Any of it may be a lie.

use std::ffi::CStr;

use pericarp_share::{Caller, Errno};

use super::{EXTENSION_GROUPS, IN_HEADER};

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Header {
    /// Bytes of the request, this header included.
    pub(crate) len: u32,
    pub(crate) opcode: u32,
    /// Comes back in the reply.
    pub(crate) unique: u64,
    /// Whom it is about.
    pub(crate) node: u64,
    pub(crate) caller: Caller,
    /// Bytes of extensions at its end.
    pub(crate) extensions: usize,
}

impl Header {
    pub(crate) fn parse(bytes: &[u8; IN_HEADER]) -> Self {
        let mut fields = Fields(bytes);
        // There are as many bytes as fields ask for.
        let mut read = || -> Result<Self, Errno> {
            Ok(Self {
                len: fields.u32()?,
                opcode: fields.u32()?,
                unique: fields.u64()?,
                node: fields.u64()?,
                caller: Caller {
                    uid: fields.u32()?,
                    gid: fields.u32()?,
                    pid: fields.u32()?,
                    group: None,
                },
                extensions: usize::from(fields.u16()?) * 8,
            })
        };
        read().unwrap_or_default()
    }
}

/// The bytes of a request that are not read yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Errno> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next bytes up to a NUL, and it.
    pub(crate) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[name.count_bytes() + 1..];
        Ok(name)
    }

    /// Takes the extensions off the end, `bytes` of them, and finds the group
    /// that the guest says the caller is in, too.
    pub(crate) fn group(&mut self, bytes: usize) -> Result<Option<u32>, Errno> {
        let start = self.0.len().checked_sub(bytes).ok_or(Errno::INVAL)?;
        let mut rest = Fields(&self.0[start..]);
        self.0 = &self.0[..start];
        let mut group = None;
        while !rest.0.is_empty() {
            let (size, kind) = (rest.u32()? as usize, rest.u32()?);
            let body = size.checked_sub(8).ok_or(Errno::INVAL)?;
            let mut body = Fields(rest.bytes(body)?);
            if kind == EXTENSION_GROUPS && body.u32()? > 0 {
                // Linux sends one, that of the directory.
                group = Some(body.u32()?);
            }
        }
        Ok(group)
    }
}

/// Two names, one after the other.
pub(crate) fn names<'a>(fields: &mut Fields<'a>) -> Result<(&'a CStr, &'a CStr), Errno> {
    Ok((fields.name()?, fields.name()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_field_by_field() {
        let mut bytes = [0; IN_HEADER];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = index as u8;
        }
        let header = Header::parse(&bytes);
        assert_eq!(header.len, 0x0302_0100);
        assert_eq!(header.opcode, 0x0706_0504);
        assert_eq!(header.unique, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(header.node, 0x1716_1514_1312_1110);
        assert_eq!(header.caller.uid, 0x1b1a_1918);
        assert_eq!(header.caller.gid, 0x1f1e_1d1c);
        assert_eq!(header.caller.pid, 0x2322_2120);
        assert_eq!(header.extensions, 0x2524 * 8);
    }

    #[test]
    fn names_end_with_a_nul_or_are_none() {
        let mut fields = Fields(b"a\0bc\0d");
        assert_eq!(names(&mut fields).unwrap(), (c"a", c"bc"));
        assert_eq!(fields.name(), Err(Errno::INVAL));
        assert_eq!(Fields(b"").name(), Err(Errno::INVAL));
        assert_eq!(Fields(b"\0").name(), Ok(c""));
    }

    #[test]
    fn a_group_is_found_among_extensions_and_lies_are_refused() {
        let group = |size: u32, kind: u32, count: u32, group: u32| {
            let fields = [size, kind, count, group];
            fields.map(u32::to_le_bytes).concat()
        };
        let good = [b"name\0".to_vec(), group(16, 32, 1, 77)].concat();
        let mut fields = Fields(&good);
        assert_eq!(fields.group(16), Ok(Some(77)));
        assert_eq!(fields.0, b"name\0");
        // Another kind is passed over, an empty one names nobody.
        let both = [group(16, 1, 1, 5), group(16, 32, 1, 6)].concat();
        assert_eq!(Fields(&both).group(32), Ok(Some(6)));
        assert_eq!(Fields(&group(16, 32, 0, 6)).group(16), Ok(None));
        assert_eq!(Fields(b"").group(0), Ok(None));
        // Longer than the request, than itself, or than it says.
        assert_eq!(Fields(&good).group(24), Err(Errno::INVAL));
        for size in [0, 7, 8, 12, 17, u32::MAX] {
            let lie = group(size, 32, 1, 6);
            assert_eq!(Fields(&lie).group(16), Err(Errno::INVAL), "{size}");
        }
    }
}
