//! Tests of the disk: what is in it, that it is made once, and that nothing broken is used.

use std::{cell::Cell, os::unix::fs::PermissionsExt as _, process::Stdio, sync::mpsc};

use super::*;
use crate::testing::{
    ARCHIVE, Builder, Dir, archived, entry, is_root, listed, program_is_there, skip,
};

fn never() -> bool {
    false
}

fn builder() -> Builder {
    use entry::{device, dir, fifo, file, hard_link, symlink};
    Builder::new().layer(&[
        dir("./").mode(0o755).at(1),
        dir("d").mode(0o700).owner(70_000, 80_000).at(1_700_000_000),
        file("d/small", "small").mode(0o4711).owner(1, 2).at(12_345),
        file("d/large", &"0123456789".repeat(100_000)).at(1_800_000_000),
        file("empty", ""),
        hard_link("hard", "d/large"),
        symlink("link", "../../etc"),
        fifo("pipe"),
        device("null", 1, 3),
        file("capable", "c").xattr(
            "security.capability",
            b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        ),
    ])
}

fn have_program(test: &str) -> bool {
    program_is_there(test, "mkfs.erofs", "erofs-utils")
}

fn run(making: &Making) {
    let output = making.command().unwrap().output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn make(directory: &Path, image: &Image) -> PathBuf {
    let cache = Cache::open(directory, Rights::of_this_process()).unwrap();
    match cache.look_up(image, &never).unwrap() {
        Found::Ready(path) => panic!("{} is there already", path.display()),
        Found::Missing(mut making) => {
            making.unpack(image, &Limits::default(), &never).unwrap();
            run(&making);
            making.finish().unwrap()
        }
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(LOCK))
        .collect();
    names.sort();
    names
}

#[test]
fn a_disk_is_made_once_and_always_the_same() {
    if !have_program("a_disk_is_made_once_and_always_the_same") {
        return;
    }
    let dir = Dir::new("disk");
    let image = builder().whole().open(&dir).unwrap();
    let one = make(&dir.path().join("one"), &image);
    // Made in a directory of another name, later, with entries listed in another order.
    let other = make(&dir.path().join("a-much-longer-name"), &image);
    let bytes = fs::read(&one).unwrap();
    assert!(bytes == fs::read(&other).unwrap());
    assert_eq!(bytes.len() % 4096, 0);
    assert_eq!(
        names(&dir.path().join("one")).len(),
        1,
        "nothing else stays"
    );
    let cache = Cache::open(&dir.path().join("one"), Rights::of_this_process()).unwrap();
    let found = cache.look_up(&image, &never).unwrap();
    assert!(matches!(found, Found::Ready(path) if path == one));
    // Another image is another disk.
    let image = Builder::new().whole().open(&dir).unwrap();
    assert!(matches!(
        cache.look_up(&image, &never).unwrap(),
        Found::Missing(_)
    ));
}

#[test]
fn the_kernel_sees_the_tree_in_it() {
    const NAME: &str = "the_kernel_sees_the_tree_in_it";
    if !have_program(NAME) {
        return;
    }
    if !is_root() {
        return skip(NAME, "mounting needs root");
    }
    let dir = Dir::new("mount");
    let image = builder().whole().open(&dir).unwrap();
    let disk = make(&dir.path().join("cache"), &image);
    let tree = dir.path().join("tree");
    rootfs::unpack(&image, &tree, Rights::Root, &Limits::default(), &never).unwrap();
    let mounted = dir.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    // In a mount namespace of its own: whatever happens here, nothing stays mounted.
    let output = Command::new("unshare")
        .args(["--mount", "--propagation=private", "sh", "-c"])
        .arg(format!(
            "mount -t erofs -o ro,loop \"$1\" \"$0\" || exit 77\n{ARCHIVE}"
        ))
        .args([&mounted, &disk])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) {
        return skip(NAME, &format!("no EROFS from a loop device here: {errors}"));
    }
    assert!(output.status.success(), "{errors}");
    let (seen, expected) = (output.stdout, archived(&tree));
    assert!(
        seen == expected,
        "disk:\n{}tree:\n{}",
        listed(&seen),
        listed(&expected)
    );
    let seen = listed(&seen);
    for part in [
        "-rws--x--x  1/2",
        "1970-01-01 03:25:45 ./d/small",
        "20 security.capability",
        "70000/80000",
    ] {
        assert!(seen.contains(part), "{part} is not in:\n{seen}");
    }
}

#[test]
fn nothing_broken_is_ever_used() {
    if !have_program("nothing_broken_is_ever_used") {
        return;
    }
    let dir = Dir::new("broken");
    let image = builder().whole().open(&dir).unwrap();
    let directory = dir.path().join("cache");
    let disk = make(&directory, &image);
    let cache = Cache::open(&directory, Rights::of_this_process()).unwrap();
    let good = fs::read(&disk).unwrap();
    let is_ready = || matches!(cache.look_up(&image, &never).unwrap(), Found::Ready(_));
    assert!(is_ready());
    let mut other = good.clone();
    other[1024 + 50] ^= 1;
    for bad in [
        &good[..good.len() - 4096],
        &good[..100],
        &[],
        &vec![0; good.len()],
        &other,
    ] {
        fs::write(&disk, bad).unwrap();
        assert!(!is_ready());
    }
    fs::write(&disk, &good).unwrap();
    assert!(is_ready());
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(!is_ready(), "anybody may have changed it");
    fs::remove_file(&disk).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &disk).unwrap();
    assert!(!is_ready());
    // And it is replaced by a good one.
    let made = match cache.look_up(&image, &never).unwrap() {
        Found::Ready(_) => panic!("a link is ready"),
        Found::Missing(mut making) => {
            making.unpack(&image, &Limits::default(), &never).unwrap();
            run(&making);
            making.finish().unwrap()
        }
    };
    assert_eq!(fs::read(made).unwrap(), good);
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(
        Cache::open(&directory, Rights::User),
        Err(DiskError::Open { .. })
    ));
}

#[test]
fn a_program_that_made_nothing_is_noticed() {
    let dir = Dir::new("nothing");
    let image = builder().whole().open(&dir).unwrap();
    let cache = Cache::open(&dir.path().join("cache"), Rights::User).unwrap();
    for content in [None, Some(vec![0; 8192])] {
        let Found::Missing(mut making) = cache.look_up(&image, &never).unwrap() else {
            panic!("nothing was made");
        };
        making.unpack(&image, &Limits::default(), &never).unwrap();
        if let Some(content) = content {
            fs::write(making.disk(), content).unwrap();
        }
        assert!(matches!(making.finish(), Err(DiskError::NotWhole { .. })));
        assert_eq!(names(&dir.path().join("cache")), [""; 0]);
    }
}

#[test]
fn one_run_makes_it_and_the_other_waits() {
    let dir = Dir::new("lock");
    let image = builder().whole().open(&dir).unwrap();
    let directory = dir.path().join("cache");
    let cache = Cache::open(&directory, Rights::User).unwrap();
    let Found::Missing(making) = cache.look_up(&image, &never).unwrap() else {
        panic!("nothing was made");
    };
    // It can be told to give up.
    let asked = Cell::new(0);
    let stop = || asked.replace(asked.get() + 1) == 2;
    assert!(matches!(
        cache.look_up(&image, &stop),
        Err(DiskError::Stopped)
    ));
    let (send, receive) = mpsc::channel();
    let waiting = {
        let path = dir.path().join("image.tar");
        let directory = directory.clone();
        thread::spawn(move || {
            let location = crate::image::Location { path, name: None };
            let image = Image::open(&location).unwrap();
            let cache = Cache::open(&directory, Rights::User).unwrap();
            let found = cache.look_up(&image, &never).unwrap();
            send.send(()).unwrap();
            matches!(found, Found::Missing(_))
        })
    };
    assert!(
        receive.recv_timeout(Duration::from_millis(200)).is_err(),
        "it waits"
    );
    drop(making);
    assert!(
        waiting.join().unwrap(),
        "nothing was finished, so it is the other's turn"
    );
}

#[test]
fn what_dead_runs_left_is_removed() {
    let dir = Dir::new("dead");
    let image = builder().whole().open(&dir).unwrap();
    let directory = dir.path().join("cache");
    let cache = Cache::open(&directory, Rights::User).unwrap();
    let Found::Missing(alive) = cache.look_up(&image, &never).unwrap() else {
        panic!("nothing was made");
    };
    fs::create_dir_all(directory.join("dead.unfinished/root/d")).unwrap();
    fs::write(directory.join("dead.unfinished/root/d/f"), "").unwrap();
    fs::set_permissions(
        directory.join("dead.unfinished/root/d"),
        fs::Permissions::from_mode(0o0),
    )
    .unwrap();
    let other = Builder::new().whole().open(&dir).unwrap();
    let found = cache.look_up(&other, &never).unwrap();
    let left = names(&directory);
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(!left.contains(&"dead.unfinished".to_owned()));
    drop(found);
    drop(alive);
    // Of the very image that is looked up.
    fs::create_dir(directory.join(format!("{}-1-user.unfinished", image.digest().hex()))).unwrap();
    assert!(matches!(
        cache.look_up(&image, &never).unwrap(),
        Found::Missing(_)
    ));
    assert_eq!(names(&directory), [""; 0]);
}
