//! Tests of the archive reader. What the `tar` crate and GNU tar write has to read back.

use proptest::prelude::*;

use super::*;
use crate::testing::{self, entry, tar_of};

fn all(mut bytes: &[u8]) -> Result<Vec<(Member, Vec<u8>)>, TarError> {
    let mut archive = Archive::new(&mut bytes);
    let mut found = Vec::new();
    while let Some(member) = archive.next()? {
        let mut content = Vec::new();
        archive.read_to_end(&mut content)?;
        found.push((member, content));
    }
    Ok(found)
}

impl Source for &mut &[u8] {}

#[test]
fn all_that_a_builder_writes_reads_back() {
    let long = "d/".repeat(150) + "end";
    let mut xattr = entry::file("with", "x").xattr("security.capability", b"\x0a\n\0=\n7 a=b\n");
    xattr.mtime = (1_700_000_000, 123_000_000);
    xattr.uid = 3_000_000_000;
    let bytes = tar_of(&[
        entry::dir("dir/"),
        entry::file("dir/a", "content of a"),
        entry::file(&long, "long"),
        entry::symlink("link", &long),
        entry::hard_link("hard", "dir/a"),
        entry::device("null", 1, 3),
        xattr,
    ]);
    let members = all(&bytes).unwrap();
    let kinds: Vec<Kind> = members.iter().map(|(member, _)| member.kind).collect();
    assert_eq!(
        kinds,
        [
            Kind::Directory,
            Kind::File,
            Kind::File,
            Kind::Symlink,
            Kind::HardLink,
            Kind::Char,
            Kind::File
        ]
    );
    assert_eq!(members[1].1, b"content of a");
    assert_eq!(members[2].0.name, long.as_bytes());
    assert_eq!(members[3].0.link, long.as_bytes());
    assert_eq!(members[4].0.link, b"dir/a");
    assert_eq!(members[5].0.device, (1, 3));
    let last = &members[6].0;
    assert_eq!(last.xattrs[0].0, b"security.capability");
    assert_eq!(last.xattrs[0].1, b"\x0a\n\0=\n7 a=b\n");
    assert_eq!(last.mtime, (1_700_000_000, 123_000_000));
    assert_eq!(last.uid, 3_000_000_000);
}

#[test]
fn gnu_tars_three_formats_read_back_the_same() {
    let dir = testing::Dir::new("tar-formats");
    let long = "n".repeat(200);
    std::fs::write(dir.path().join(&long), b"1").unwrap();
    std::fs::write(dir.path().join("short"), vec![7; 513]).unwrap();
    for format in ["gnu", "pax", "oldgnu"] {
        let output = std::process::Command::new("tar")
            .args(["--create", "--sort=name", "--format", format, "--directory"])
            .arg(dir.path())
            .args([long.as_str(), "short"])
            .output()
            .unwrap();
        let members = all(&output.stdout).unwrap();
        assert_eq!(members.len(), 2, "{format}");
        assert_eq!(members[0].0.name, long.as_bytes(), "{format}");
        assert_eq!(members[1].1, vec![7; 513], "{format}");
    }
}

#[test]
fn every_cut_and_every_flipped_header_bit_is_an_error() {
    let bytes = tar_of(&[entry::file("a", "aaaa"), entry::file("b", "bbbb")]);
    for cut in (1..2048).filter(|cut| cut % 1024 != 0) {
        assert!(all(&bytes[..cut]).is_err(), "{cut}");
    }
    for at in 0..512 {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        // Blanks and zeros around numbers mean the same; anything else has to be noticed.
        if let Ok(members) = all(&bytes) {
            assert_eq!(
                members,
                all(&tar_of(&[
                    entry::file("a", "aaaa"),
                    entry::file("b", "bbbb")
                ]))
                .unwrap(),
                "{at}"
            );
        }
    }
}

#[test]
fn what_it_does_not_understand_is_an_error() {
    let raw = |kind: u8, size: u64, text: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_path("name").unwrap();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(text);
        bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
        bytes
    };
    assert!(matches!(all(&raw(b'S', 0, b"")), Err(TarError::Sparse)));
    assert!(matches!(
        all(&raw(b'V', 0, b"")),
        Err(TarError::Kind { .. })
    ));
    assert!(matches!(
        all(&raw(b'5', 9, b"123456789")),
        Err(TarError::Kind { .. })
    ));
    assert!(matches!(
        all(&raw(b'x', 1 << 40, b"")),
        Err(TarError::TooLong)
    ));
    assert!(matches!(all(&raw(b'L', 4, b"abcd")), Err(TarError::Cut)));
    for record in [
        "x a=b\n",
        "9 a=b\n",
        "5 a=b\n",
        "6 abc\n",
        "6 =bc\n",
        "99999999999999999999 a=b\n",
    ] {
        let bytes = raw(b'x', record.len() as u64, record.as_bytes());
        assert!(matches!(all(&bytes), Err(TarError::Record)), "{record}");
    }
    let sparse = "22 GNU.sparse.major=1\n";
    let mut bytes = raw(b'x', 22, sparse.as_bytes());
    bytes.truncate(1024);
    bytes.extend(tar_of(&[entry::file("a", "")]));
    assert!(matches!(all(&bytes), Err(TarError::Sparse)));
    let mut bytes = vec![0; 512];
    bytes.extend(tar_of(&[entry::file("a", "")]));
    assert!(matches!(all(&bytes), Err(TarError::Trailer)));
    assert!(matches!(
        all(&[b'a'; 512]),
        Err(TarError::Number(_) | TarError::Checksum)
    ));
}

#[test]
fn a_size_beyond_eight_gigabytes_comes_from_its_record() {
    let mut bytes = tar_of(&[entry::file("a", "")]);
    let mut extended = tar::Header::new_ustar();
    extended.set_path("x").unwrap();
    extended.set_size(20);
    extended.set_entry_type(tar::EntryType::XHeader);
    extended.set_cksum();
    let mut whole = extended.as_bytes().to_vec();
    whole.extend_from_slice(b"20 size=10000000000\n");
    whole.resize(1024, 0);
    whole.append(&mut bytes);
    let mut archive = Archive::new(&whole[..]);
    assert_eq!(archive.next().unwrap().unwrap().size, 10_000_000_000);
}

#[test]
fn times_are_read_as_pax_writes_them() {
    for (text, expected) in [
        ("1", Some((1, 0))),
        ("1.5", Some((1, 500_000_000))),
        ("1.1234567899", Some((1, 123_456_789))),
        ("-3.5", Some((0, 0))),
        ("", None),
        ("1.x", None),
        ("+1", None),
    ] {
        assert_eq!(time(text.as_bytes()), expected, "{text}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 512..2048), kind in any::<u8>()) {
        // With a right checksum, or nothing behind it would ever be reached.
        bytes[156] = kind;
        bytes[148..156].fill(b' ');
        let sum: u32 = bytes[..512].iter().map(|&byte| u32::from(byte)).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let _ = all(&bytes);
    }

    #[test]
    fn records_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = records(&bytes);
        let _ = time(&bytes);
    }
}
