//! Addresses as the messages carry them, and how many there may be.
//!
//! Used by both sides; which interface gets what is in `proto/agent.proto`.

use std::net::IpAddr;

/// Most interfaces of a machine beside its own loopback interface.
pub const MAX_INTERFACES: usize = 8;
/// Most routes, and most neighbours.
pub const MAX_ROUTES: usize = 4096;
/// Most addresses of an interface.
pub const MAX_ADDRESSES: usize = 256;
/// Most bytes of a name of an interface (`IFNAMSIZ`, without the zero at its end).
pub const MAX_NAME: usize = 15;
/// Most bytes of a `resolv.conf`.
pub const MAX_RESOLV_CONF: usize = 16 << 10;

/// An address as bytes; none for none.
#[must_use]
pub fn bytes(ip: Option<IpAddr>) -> Vec<u8> {
    match ip {
        None => Vec::new(),
        Some(IpAddr::V4(ip)) => ip.octets().to_vec(),
        Some(IpAddr::V6(ip)) => ip.octets().to_vec(),
    }
}

/// Bytes that are an address, or none at all. `Err` for anything else.
///
/// # Errors
///
/// The number of bytes.
pub fn address(bytes: &[u8]) -> Result<Option<IpAddr>, usize> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let sixteen = <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    four.or(sixteen).map(Some).map_err(|_| bytes.len())
}

/// Whether the kernel takes this as a name of an interface.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    (1..=MAX_NAME).contains(&name.len()) && !matches!(name, "." | "..") && !name.contains(odd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back() {
        for text in ["10.0.0.1", "0.0.0.0", "fd00::1", "::"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(address(&bytes(Some(ip))), Ok(Some(ip)));
        }
        assert_eq!(address(&bytes(None)), Ok(None));
        assert_eq!(address(&[1, 2, 3]), Err(3));
        assert_eq!(address(&[0; 17]), Err(17));
    }

    #[test]
    fn names_are_the_kernels() {
        for good in ["eth0", "a", "net-1.2", "fifteen-letters"] {
            assert!(is_name(good), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "a:1",
            "sixteen--letters",
            "a\0",
        ] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
