//! The tables of `tests/README.md` and `SECURITY.md` name tests that exist: a test that is
//! renamed or removed must not leave a claim behind.
//!
//! Called by `check`. Reads, changes nothing.

use std::fs;
use std::path::Path;

use crate::command::Failure;
use crate::house;

/// The documents, and how many names they have at least: fewer would mean that the tables
/// are written in another way now.
const TABLES: [(&str, usize); 2] = [("tests/README.md", 100), ("SECURITY.md", 40)];

/// Prints every name that is no test's and fails when there is one.
pub(crate) fn inspect(root: &Path) -> Result<(), Failure> {
    let mut files = Vec::new();
    house::collect(root, &mut files).map_err(|e| format!("cannot list the source tree: {e}"))?;
    let mut source = String::new();
    for file in files {
        source.push_str(
            &fs::read_to_string(&file)
                .map_err(|e| format!("cannot read {}: {e}", file.display()))?,
        );
    }
    let mut nobodys = 0;
    for (document, fewest) in TABLES {
        let text = fs::read_to_string(root.join(document))
            .map_err(|e| format!("cannot read {document}: {e}"))?;
        let (count, missing) = missing(&text, &source);
        for name in &missing {
            eprintln!("{document}: no test or act is called {name}");
        }
        if count < fewest {
            let few = format!("{count} names of tests in {document} are few");
            return Err(format!("{few}: how are they written?").into());
        }
        nobodys += missing.len();
    }
    match nobodys {
        0 => Ok(()),
        few => Err(format!("{few} names in documents are nobody's").into()),
    }
}

/// How many names the rows of tables have, and those that are not in `source`.
fn missing(text: &str, source: &str) -> (usize, Vec<String>) {
    let (mut count, mut missing) = (0, Vec::new());
    for row in text.lines().filter(|line| line.starts_with("| ")) {
        // What a row is about comes first; the tests are in its last column.
        let tests = row.trim_end_matches([' ', '|']).rsplit('|').next();
        for name in names(tests.unwrap_or_default()) {
            count += 1;
            let function = name.rsplit("::").next().unwrap_or(&name);
            let known = source.contains(&format!("fn {function}("))
                || source.contains(&format!("\"{name}\""));
            if !known {
                missing.push(name);
            }
        }
    }
    (count, missing)
}

/// Functions between backticks, and acts between quotes.
fn names(tests: &str) -> Vec<String> {
    let functions = tests.split('`').skip(1).step_by(2).filter(|word| {
        let name = word.rsplit("::").next().unwrap_or(word);
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        name.matches('_').count() > 1 && name.chars().all(plain)
    });
    let acts = tests.split('"').skip(1).step_by(2);
    functions.chain(acts).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "fn it_holds_here() {}\nAct::new(\"a loop of two\", looped)";

    #[test]
    fn names_of_rows_are_looked_up() {
        let good = "| a fault | `part::it_holds_here`, \"a loop of two\"; `fuzz rings` |";
        assert_eq!(missing(good, SOURCE), (2, Vec::new()));
        let bad = "| `not_in_this_column` | `it_holds_no_more`, \"a loop of three\" |";
        let names = ["it_holds_no_more", "a loop of three"].map(str::to_owned);
        assert_eq!(missing(bad, SOURCE), (2, names.to_vec()));
    }

    #[test]
    fn lines_that_are_no_rows_name_nothing() {
        assert_eq!(missing("`it_holds_no_more`", SOURCE), (0, Vec::new()));
        assert_eq!(missing("|---|---|", SOURCE), (0, Vec::new()));
    }
}
