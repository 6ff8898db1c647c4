//! The machine's ACPI tables as Intel's compiler reads them: taken apart, and the code
//! among them put together again, without an error or a warning.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs;
use std::process::Command;

use pericarp_tests::parts::{Part, have};
use pericarp_tests::scratch::Scratch;
use pericarp_vmm::acpi::tables;

/// Each table of the body, by its name.
fn split(body: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at + 36 <= body.len() {
        let size = u32::from_le_bytes(body[at + 4..at + 8].try_into().unwrap()) as usize;
        let name = String::from_utf8(body[at..at + 4].to_vec()).unwrap();
        found.push((name, body[at..at + size].to_vec()));
        at = (at + size).next_multiple_of(16);
    }
    found
}

#[test]
fn every_table_is_read_without_a_complaint() {
    if !have("every_table_is_read_without_a_complaint", &[Part::Iasl]) {
        return;
    }
    let iasl = Part::Iasl.find().unwrap();
    let scratch = Scratch::new();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&iasl);
        let output = command.current_dir(scratch.dir()).args(arguments).output();
        let output = output.unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}");
        let complains = ["Error  ", "Warning  ", "ncorrect checksum", "nvalid"]
            .iter()
            .any(|word| said.contains(word));
        assert!(!complains, "{arguments:?}: {said}");
        said
    };
    let tables = split(&tables(4).body);
    let names: Vec<&str> = tables.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["DSDT", "FACP", "APIC", "MCFG", "XSDT"]);
    for (name, bytes) in &tables {
        let file = format!("{name}.dat");
        fs::write(scratch.path(&file), bytes).unwrap();
        run(&["-d", &file]);
    }
    let code = fs::read_to_string(scratch.path("DSDT.dsl")).unwrap();
    for wanted in ["PNP0A08", "PNP0501", "_DSM", "_S5", "0x0000004000000000"] {
        assert!(code.contains(wanted), "no {wanted}: {code}");
    }
    let said = run(&["-oa", "-p", "again", "DSDT.dsl"]);
    assert!(said.contains("0 Errors"), "{said}");
    let again = fs::read(scratch.path("again.aml")).unwrap();
    // The creator is the compiler's then.
    assert_eq!(again[36..], tables[0].1[36..], "{code}");
}
