//! Names as a guest gives them: one component of a path, checked before any
//! system call sees it.

use std::ffi::CStr;

use rustix::io::Errno;

const LONGEST: usize = 255;

/// # Errors
/// ENOENT for no name, EINVAL for one that is no name of an entry (`.` and
/// `..` would lead out of a directory, `/` into another), ENAMETOOLONG.
pub(crate) fn check(name: &CStr) -> Result<&CStr, Errno> {
    match name.to_bytes() {
        b"" => Err(Errno::NOENT),
        b"." | b".." => Err(Errno::INVAL),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        bytes if bytes.len() > LONGEST => Err(Errno::NAMETOOLONG),
        _ => Ok(name),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    #[test]
    fn a_name_is_one_component() {
        let long = CString::new(vec![b'x'; LONGEST + 1]).unwrap();
        let longest = CString::new(vec![b'x'; LONGEST]).unwrap();
        for (name, error) in [
            (c"", Errno::NOENT),
            (c".", Errno::INVAL),
            (c"..", Errno::INVAL),
            (c"/", Errno::INVAL),
            (c"a/b", Errno::INVAL),
            (c"../x", Errno::INVAL),
            (&*long, Errno::NAMETOOLONG),
        ] {
            assert_eq!(check(name), Err(error), "{name:?}");
        }
        for name in [c"...", c"a", c".a", c"\xff\n", &*longest] {
            assert_eq!(check(name), Ok(name));
        }
    }
}
