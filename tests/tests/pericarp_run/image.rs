//! OCI images: what an image says about its container, and the container's own
//! writable layer.

use std::fs;
use std::path::PathBuf;

use pericarp_tests::oci;

use super::rig::*;

impl Rig {
    /// An OCI archive of the rig's root in two layers. The upper one adds a user
    /// and takes a file away.
    pub(crate) fn oci(&self) -> PathBuf {
        let archive = self.scratch.path("image.tar");
        if archive.exists() {
            return archive;
        }
        let lower = self.tree();
        fs::write(lower.join("etc/taken"), "in the lower layer").unwrap();
        let upper = self.scratch.path("upper");
        fs::create_dir_all(upper.join("etc")).unwrap();
        fs::create_dir_all(upper.join("home/ada")).unwrap();
        fs::write(upper.join("etc/.wh.taken"), "").unwrap();
        fs::write(
            upper.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nada:x:1234:1235::/home/ada:/bin/sh\n",
        )
        .unwrap();
        fs::write(
            upper.join("etc/group"),
            "root:x:0:\nada:x:1235:\nmath:x:77:ada\n",
        )
        .unwrap();
        let config = r#"{"User":"ada","Env":["PATH=/bin","GREETING=hello"],
            "Entrypoint":["/bin/sh","-c"],"Cmd":["echo $GREETING from $(id -u):$(id -g) in $PWD"],
            "WorkingDir":"/home/ada","StopSignal":"SIGUSR1"}"#;
        let image = oci::Image {
            name: None,
            layers: vec![&lower, &upper],
            config,
        };
        oci::archive(&self.scratch, &[image], &archive);
        archive
    }
}

#[test]
fn an_image_says_how_it_is_run() {
    let Some(rig) = Rig::new("an_image_says_how_it_is_run", &IMAGE) else {
        return;
    };
    let image = rig.oci();
    let image = image.to_str().unwrap();
    let run = rig.run(&["--image", image], b"");
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(run.text(), "hello from 1234:1235 in /home/ada\n");
    assert_eq!(run.stderr, "");
    rig.assert_clean();
}

#[test]
fn the_command_line_has_the_last_word_and_writes_are_discarded() {
    let name = "the_command_line_has_the_last_word_and_writes_are_discarded";
    let Some(rig) = Rig::new(name, &IMAGE) else {
        return;
    };
    let image = rig.oci();
    let image = image.to_str().unwrap();
    let script = r"
        echo release=$(uname -r)
        echo user=$(id -u):$(id -g) groups=$(id -G)
        echo home=$HOME
        echo cwd=$PWD
        echo greeting=$GREETING own=$OWN inherited=$PERICARP_TEST_INHERITED
        echo pid=$$
        echo hostname=$(hostname)
        echo taken=$(cat /etc/taken 2>/dev/null || echo gone)
        echo caps=$(grep CapEff /proc/self/status)
        echo new > /tmp/new && cat /tmp/new | sed s/^/written=/
        rm /bin/yes && echo removed=$(ls /bin/yes 2>/dev/null || echo gone)
        dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null && echo big=$(ls -l /big | awk '{print $5}')
        exit 3";
    let arguments = [
        "--image",
        image,
        "--entrypoint",
        "/bin/sh",
        "-u",
        "0:math",
        "-w",
        "/made/here",
        "-e",
        "GREETING=bye",
        "-e",
        "OWN=1",
        "-e",
        "PERICARP_TEST_INHERITED",
        "--",
        "-c",
        script,
    ];
    let mut command = rig.command(&arguments);
    command.env("PERICARP_TEST_INHERITED", "yes");
    let run = Running::start(command).wait();
    assert_eq!(run.code, 3, "{}", run.stderr);
    let seen = run.values();
    let is = |key: &str, value: &str| assert_eq!(seen.get(key).unwrap(), value, "{key}");
    assert_ne!(seen["release"], host_release());
    is("user", "0:77 groups=77");
    is("home", "/root");
    is("cwd", "/made/here");
    is("greeting", "bye own=1 inherited=yes");
    is("pid", "1");
    is("taken", "gone");
    is("written", "new");
    is("removed", "gone");
    is("big", "67108864");
    rig.assert_clean();

    // The next run sees nothing of it, and finds the disk made already.
    let script = "ls /tmp/new /bin/yes";
    let run = rig.run(
        &["--image", image, "--entrypoint", "sh", "--", "-c", script],
        b"",
    );
    assert_eq!(run.text(), "/bin/yes\n", "{}", run.stderr);
    rig.assert_clean();
}

#[test]
fn the_same_image_runs_in_a_container() {
    let Some(rig) = Rig::new("the_same_image_runs_in_a_container", &RUNC_IMAGE) else {
        return;
    };
    let image = rig.oci();
    let image = image.to_str().unwrap();
    let run = rig.run(&["--runtime", "runc", "--image", image], b"");
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(run.text(), "hello from 1234:1235 in /home/ada\n");
    let script = "uname -r; echo x > /x; cat /x /etc/taken";
    let line = [
        "--runtime",
        "runc",
        "--image",
        image,
        "-u",
        "root",
        "--",
        script,
    ];
    let run = rig.run(&line, b"");
    assert_eq!(run.text(), format!("{}\nx\n", host_release()));
    assert_eq!(run.code, 1, "{}", run.stderr);
    rig.assert_clean();
}
