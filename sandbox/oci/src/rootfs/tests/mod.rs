//! Tests of unpacking: what layers mean together, here; what hostile ones try and what a plain user
//! gets, in the other two files.

mod hostile;
mod properties;

use std::{collections::BTreeMap, path::PathBuf, process::Command};

use super::*;
use crate::testing::{
    Builder, Dir, Entry, archived, compress, entry, is_root, listed, program_is_there, skip, tar_of,
};

fn never() -> bool {
    false
}

fn unpack_to(
    dir: &Dir,
    builder: &Builder,
    rights: Rights,
) -> Result<(PathBuf, Report), RootfsError> {
    let image = builder.clone().whole().open(dir).unwrap();
    let target = dir.path().join("root");
    unpack(&image, &target, rights, &Limits::default(), &never).map(|report| (target, report))
}

fn layers(layers: &[&[Entry]]) -> Builder {
    layers
        .iter()
        .fold(Builder::new(), |builder, entries| builder.layer(entries))
}

/// All names below a directory, each with its content or its kind.
fn listing(root: &Path) -> BTreeMap<String, String> {
    fn walk(root: &Path, below: &Path, found: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(below).unwrap() {
            let path = entry.unwrap().path();
            let name = path
                .strip_prefix(root)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned();
            let kind = path.symlink_metadata().unwrap().file_type();
            let what = if kind.is_dir() {
                walk(root, &path, found);
                "/".to_owned()
            } else if kind.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if kind.is_file() {
                fs::read_to_string(&path).unwrap()
            } else {
                "special".to_owned()
            };
            found.insert(name, what);
        }
    }
    let mut found = BTreeMap::new();
    walk(root, root, &mut found);
    found
}

fn unpacked(all: &[&[Entry]]) -> Vec<(String, String)> {
    let dir = Dir::new("unpack");
    let (root, _) = unpack_to(&dir, &layers(all), Rights::of_this_process()).unwrap();
    listing(&root).into_iter().collect()
}

fn expect(all: &[&[Entry]], expected: &[(&str, &str)]) {
    let found = unpacked(all);
    let found: Vec<(&str, &str)> = found
        .iter()
        .map(|(name, what)| (&name[..], &what[..]))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn layers_lie_on_top_of_each_other() {
    use entry::{dir, file, hard_link, symlink};
    // A file over a file, over a directory, over a link; a directory over a file and over a link.
    expect(
        &[
            &[
                dir("d"),
                file("d/x", "1"),
                file("f", "1"),
                symlink("l", "d"),
                dir("e"),
                file("e/y", "1"),
                file("g", "1"),
                symlink("m", "d"),
            ],
            &[
                file("f", "2"),
                file("d", "2"),
                file("l", "2"),
                dir("g"),
                dir("m"),
                file("m/z", "2"),
                dir("e"),
            ],
        ],
        &[
            ("d", "2"),
            ("e", "/"),
            ("e/y", "1"),
            ("f", "2"),
            ("g", "/"),
            ("l", "2"),
            ("m", "/"),
            ("m/z", "2"),
        ],
    );
    // Hard links into a lower layer, twice, and onto itself.
    expect(
        &[
            &[file("a", "1")],
            &[
                hard_link("b", "./a"),
                hard_link("c/d", "b"),
                hard_link("a", "a"),
            ],
        ],
        &[("a", "1"), ("b", "1"), ("c", "/"), ("c/d", "1")],
    );
}

#[test]
fn a_parent_may_be_a_symbolic_link_inside() {
    use entry::{dir, file, symlink};
    // Names that no machine has: were this broken, it must not be the machine's own that change.
    for target in [
        "oci-usr/bin",
        "/oci-usr/bin",
        "../../../oci-usr/bin",
        "oci-usr/../oci-usr/bin",
        "hop",
    ] {
        let lower = [
            dir("oci-usr/bin"),
            symlink("bin", target),
            symlink("hop", "oci-usr/bin"),
        ];
        let found = unpacked(&[&lower, &[file("bin/tool", "x")]]);
        let expected = ("oci-usr/bin/tool".to_owned(), "x".to_owned());
        assert!(found.contains(&expected), "{target}");
        let expected = ("bin".to_owned(), format!("-> {target}"));
        assert!(found.contains(&expected), "{target}");
    }
}

#[test]
fn deletions_hide_lower_layers_and_only_those() {
    use entry::{dir, file, hard_link, symlink};
    let lower: &[Entry] = &[
        dir("d"),
        file("d/a", "1"),
        file("d/sub/b", "1"),
        file("f", "1"),
        symlink("l", "d"),
    ];
    let all_but = |gone: &[&str]| -> Vec<(&str, &str)> {
        [
            ("d", "/"),
            ("d/a", "1"),
            ("d/sub", "/"),
            ("d/sub/b", "1"),
            ("f", "1"),
            ("l", "-> d"),
        ]
        .into_iter()
        .filter(|(name, _)| !gone.contains(name))
        .collect()
    };
    expect(&[lower, &[file(".wh.f", "")]], &all_but(&["f"]));
    expect(&[lower, &[file("d/.wh.a", "")]], &all_but(&["d/a"]));
    expect(&[lower, &[file("l/.wh.a", "")]], &all_but(&["d/a"]));
    expect(&[lower, &[file(".wh.l", "")]], &all_but(&["l"]));
    expect(
        &[lower, &[file(".wh.d", "")]],
        &all_but(&["d", "d/a", "d/sub", "d/sub/b"]),
    );
    // Of what is not there.
    expect(
        &[
            lower,
            &[
                file("no/such/.wh.x", ""),
                file("f/.wh.x", ""),
                file(".wh.none", ""),
            ],
        ],
        &all_but(&[]),
    );
    // In the lowest layer there is nothing to hide.
    expect(
        &[&[file("a", "1"), file(".wh.a", ""), file(".wh..wh..opq", "")]],
        &[("a", "1")],
    );

    // What the same layer makes stays, whichever comes first.
    let new = [dir("d"), file("d/new", "2")];
    for marker in ["d/.wh..wh..opq", ".wh.d"] {
        for first in [true, false] {
            let mut upper = new.to_vec();
            upper.insert(if first { 0 } else { 2 }, file(marker, ""));
            expect(
                &[lower, &upper],
                &[("d", "/"), ("d/new", "2"), ("f", "1"), ("l", "-> d")],
            );
        }
    }
    // Below a directory that the layer only passes through.
    expect(
        &[lower, &[file("d/sub/new", "2"), file("d/.wh..wh..opq", "")]],
        &[
            ("d", "/"),
            ("d/sub", "/"),
            ("d/sub/new", "2"),
            ("f", "1"),
            ("l", "-> d"),
        ],
    );
    // Through a link, and of a name that the layer links anew.
    expect(
        &[
            lower,
            &[hard_link("d/a2", "d/a"), file("l/.wh..wh..opq", "")],
        ],
        &[("d", "/"), ("d/a2", "1"), ("f", "1"), ("l", "-> d")],
    );
    // All of the root.
    expect(
        &[lower, &[file("only", "2"), file(".wh..wh..opq", "")]],
        &[("only", "2")],
    );
    // The next layer hides what this one made.
    expect(
        &[&[file("a", "1")], &[file("a", "2")], &[file(".wh.a", "")]],
        &[],
    );
    // Notes of aufs are no files.
    expect(
        &[
            lower,
            &[
                file(".wh..wh.aufs", ""),
                dir(".wh..wh.plnk"),
                file(".wh..wh.plnk/9.9", ""),
            ],
        ],
        &all_but(&[]),
    );
}

#[test]
fn all_compressions_give_the_same_tree() {
    if !program_is_there("all_compressions", "zstd", "zstd") {
        return;
    }
    let text = "text ".repeat(100_000);
    let entries = [entry::file("big", &text), entry::file("a", "1")];
    for builder in [
        Builder::new().layer(&entries),
        Builder::new().packed_layer(&entries, "gzip"),
        Builder::new().packed_layer(&entries, "zstd"),
    ] {
        let dir = Dir::new("compressions");
        let (root, report) = unpack_to(&dir, &builder, Rights::of_this_process()).unwrap();
        assert_eq!(fs::read_to_string(root.join("big")).unwrap(), text);
        assert_eq!((report.entries, report.newest), (2, 1_000_000_000));
    }
}

#[test]
fn damage_is_told_from_bad_building() {
    let dir = Dir::new("damage");
    let entries = [entry::file("a", &"text ".repeat(1000))];
    for media in ["tar", "tar+gzip"] {
        let tar = tar_of(&entries);
        let blob = if media == "tar" {
            tar.clone()
        } else {
            compress("gzip", &tar)
        };
        for at in [3, 200, blob.len() - 1] {
            let mut builder = Builder::new();
            builder.add(
                &format!("application/vnd.oci.image.layer.v1.{media}"),
                &blob,
                &tar,
            );
            let name = format!("blobs/sha256/{}", crate::digest::Digest::of(&blob).hex());
            let at = at.min(blob.len() - 1);
            builder.files.get_mut(&name).unwrap()[at] ^= 0x55;
            let error = unpack_to(&dir, &builder, Rights::User).unwrap_err();
            assert!(
                matches!(error, RootfsError::Damaged { layer: 1, .. }),
                "{media} {at}: {error}"
            );
        }
        let mut builder = Builder::new();
        builder.add(
            &format!("application/vnd.oci.image.layer.v1.{media}"),
            &blob,
            b"other",
        );
        let error = unpack_to(&dir, &builder, Rights::User).unwrap_err();
        assert!(
            matches!(error, RootfsError::DiffId { layer: 1, .. }),
            "{error}"
        );
    }
    // The right digest of something that is no archive.
    let mut builder = Builder::new();
    builder.add(
        "application/vnd.oci.image.layer.v1.tar+gzip",
        b"no gzip",
        b"",
    );
    let error = unpack_to(&dir, &builder, Rights::User).unwrap_err();
    assert!(
        matches!(error, RootfsError::Layer { layer: 1, .. }),
        "{error}"
    );
    assert!(matches!(
        unpack_to(&dir, &layers(&[]), Rights::User),
        Ok((_, Report { entries: 0, .. }))
    ));
    // The target is there now.
    assert!(matches!(
        unpack_to(&dir, &layers(&[]), Rights::User),
        Err(RootfsError::Target { .. })
    ));
}
