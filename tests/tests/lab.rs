//! The lab itself. What is tested in it has a suite of its own, `monitor`.

use pericarp_tests::lab::Lab;
use pericarp_tests::parts::skip;
use pericarp_tests::scratch::Scratch;

/// False is a skipped test, and says so.
fn usable(test: &str) -> bool {
    if Lab::is_here() {
        return true;
    }
    Lab::lacks().is_none_or(|why| skip(test, &why))
}

#[test]
fn what_a_command_returns_and_leaves_comes_back() {
    if !usable("what_a_command_returns_and_leaves_comes_back") || Lab::is_here() {
        return;
    }
    let scratch = Scratch::new();
    let out = scratch.path("out");
    std::fs::create_dir_all(&out).unwrap();
    let mut lab = Lab::new(
        "echo left >/run/lab/file\n\
         touch /usr/not-to-be 2>/dev/null && echo WRITABLE\n\
         echo \"in $PWD: $NAME\"; exit 7",
    );
    lab.directory = "/usr/share".into();
    lab.variables.push(("NAME".into(), "va lue".into()));
    lab.out = Some(out.clone());
    let report = lab.run().expect("the lab");
    assert_eq!(report.code, 7, "{}", report.output);
    assert!(
        report.output.contains("in /usr/share: va lue"),
        "{}",
        report.output
    );
    assert!(!report.output.contains("WRITABLE"), "{}", report.output);
    assert_eq!(std::fs::read_to_string(out.join("file")).unwrap(), "left\n");
}
