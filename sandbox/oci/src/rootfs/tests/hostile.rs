//! Tests of layers that were made to do harm.

use std::cell::Cell;

use super::*;

/// Each tries to write to, read from or delete `outside`, which lies beside the root. All of it is
/// in a directory of the test's own: were the code wrong, nothing else would be harmed.
#[test]
fn hostile_layers_reach_nothing_outside() {
    use entry::{dir, file, hard_link, symlink};
    let dir_path = Dir::new("hostile");
    let outside = dir_path.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let absolute = outside.to_str().unwrap();
    // True: it has to be refused. False: it ends somewhere inside.
    let cases: Vec<(bool, Vec<Entry>)> = vec![
        (true, vec![file("../outside/new", "x")]),
        (true, vec![file("a/../../outside/new", "x")]),
        (true, vec![file("..", "x")]),
        (true, vec![dir("../outside")]),
        (true, vec![file(".wh...", "")]),
        (true, vec![file("a/.wh...", "")]),
        (true, vec![file("../.wh.outside", "")]),
        (true, vec![file("../outside/.wh..wh..opq", "")]),
        (true, vec![hard_link("h", "../outside/secret")]),
        (true, vec![hard_link("h", &format!("{absolute}/secret"))]),
        (
            true,
            vec![symlink("s", "../outside"), hard_link("h", "s/secret")],
        ),
        (true, vec![symlink("s", "../outside"), file("s/new", "x")]),
        (true, vec![symlink("s", absolute), file("s/secret", "x")]),
        (
            true,
            vec![symlink("s", "/proc/self/root"), dir("s/oci-no-such-name")],
        ),
        (
            true,
            vec![symlink("a", "b"), symlink("b", "a"), file("a/x", "x")],
        ),
        (true, vec![file("f", "x"), file("f/x", "x")]),
        (true, vec![file("x/.wh.y/z", "x")]),
        (true, vec![file("/", "x")]),
        (true, vec![symlink("./", "x")]),
        (true, vec![hard_link("h", "h")]),
        (true, vec![hard_link("h", "/")]),
        (true, vec![dir("d"), hard_link("h", "d")]),
        (true, vec![symlink("s", "")]),
        (true, vec![file("f", "x").owner(u64::from(u32::MAX), 0)]),
        (true, vec![file(&"d/".repeat(200), "x")]),
        (false, vec![file(&format!("{absolute}/new"), "x")]),
        (
            false,
            vec![symlink("s", "../outside/secret"), file("s", "x")],
        ),
        (false, vec![symlink("s", absolute), file(".wh.s", "")]),
        (
            false,
            vec![symlink("s", absolute), file("s/.wh.secret", "")],
        ),
        (
            false,
            vec![symlink("s", absolute), file("s/.wh..wh..opq", "")],
        ),
        (
            false,
            vec![symlink("s", absolute), dir("s"), file("s/secret", "x")],
        ),
        (
            false,
            vec![
                symlink("s", "../outside/secret"),
                hard_link("h", "s"),
                file("h", "x"),
            ],
        ),
        (
            false,
            vec![symlink("s", "../outside"), dir("s").mode(0o000)],
        ),
    ];
    for (number, (refused, entries)) in cases.into_iter().enumerate() {
        // In one layer, and with the preparation in a lower one.
        for split in [0, entries.len() - 1] {
            let (lower, upper) = entries.split_at(split);
            let result = unpack_to(
                &dir_path,
                &layers(&[lower, upper]),
                Rights::of_this_process(),
            );
            assert_eq!(result.is_err(), refused, "case {number}: {result:?}");
            if let Err(error) = &result {
                let text = error.to_string();
                assert!(
                    matches!(error, RootfsError::Entry { .. }),
                    "case {number}: {text}"
                );
                assert!(text.len() < 600, "case {number}: {text}");
            }
            let target = dir_path.path().join("root");
            assert_eq!(
                target.exists(),
                !refused,
                "case {number}: nothing half done stays"
            );
            if target.exists() {
                remove(&target).unwrap();
            }
            let outside = listing(&outside);
            assert_eq!(outside.len(), 1, "case {number}");
            assert_eq!(outside["secret"], "secret", "case {number}");
        }
    }
}

#[test]
fn a_tree_cannot_be_made_deep_through_links() {
    use entry::{dir, symlink};
    let mut entries = vec![];
    let mut base = String::new();
    for step in 0..6 {
        let deep = format!("{base}{}", "d/".repeat(30));
        entries.push(dir(&deep));
        let link = format!("l{step}");
        entries.push(symlink(&link, deep.trim_end_matches('/')));
        base = format!("{link}/");
    }
    let dir_path = Dir::new("deep");
    let error = unpack_to(&dir_path, &layers(&[&entries]), Rights::of_this_process()).unwrap_err();
    assert!(
        error.to_string().contains("too deep in the tree"),
        "{error}"
    );
}

#[test]
fn bombs_and_impatience_end_it() {
    let dir_path = Dir::new("bomb");
    let zeros = "\0".repeat(3 << 20);
    let image = Builder::new()
        .packed_layer(&[entry::file("zeros", &zeros)], "gzip")
        .whole()
        .open(&dir_path)
        .unwrap();
    let target = dir_path.path().join("root");
    let limits = Limits {
        bytes: 1 << 20,
        ..Limits::default()
    };
    let error = unpack(&image, &target, Rights::User, &limits, &never).unwrap_err();
    assert!(
        matches!(error, RootfsError::Limit { what: "bytes", .. }),
        "{error}"
    );
    let limits = Limits {
        entries: 0,
        ..Limits::default()
    };
    let error = unpack(&image, &target, Rights::User, &limits, &never).unwrap_err();
    assert!(
        matches!(
            error,
            RootfsError::Limit {
                what: "entries",
                ..
            }
        ),
        "{error}"
    );
    let asked = Cell::new(0);
    let stop = || asked.replace(asked.get() + 1) == 5;
    let error = unpack(&image, &target, Rights::User, &Limits::default(), &stop).unwrap_err();
    assert!(matches!(error, RootfsError::Stopped), "{error}");
    assert!(!target.exists());

    // The same behind the archive's end.
    let tar = [tar_of(&[entry::file("a", "1")]), vec![0; 3 << 20]].concat();
    let mut builder = Builder::new();
    builder.add(
        "application/vnd.oci.image.layer.v1.tar+gzip",
        &compress("gzip", &tar),
        &tar,
    );
    let image = builder.whole().open(&dir_path).unwrap();
    let limits = Limits {
        bytes: 1 << 20,
        ..Limits::default()
    };
    let error = unpack(&image, &target, Rights::User, &limits, &never).unwrap_err();
    assert!(
        matches!(error, RootfsError::Limit { what: "bytes", .. }),
        "{error}"
    );
    unpack(&image, &target, Rights::User, &Limits::default(), &never).unwrap();
}
