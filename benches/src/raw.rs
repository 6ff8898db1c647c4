//! The raw numbers of a run, as [`Run::save`](crate::turns::Run::save) wrote
//! them, read back. Called by `draw`.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::Outcome;
use crate::plot::Case;
use crate::turns::{Measured, Row};

/// All cases of a file, in their order.
///
/// # Errors
/// When it cannot be read or is no such file.
pub fn read(path: &Path) -> Outcome<Vec<Case>> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    cases(&text).map_err(|e| format!("{}: {e}", path.display()).into())
}

fn cases(text: &str) -> Outcome<Vec<Case>> {
    let raw: Value = serde_json::from_str(text)?;
    let results = raw["results"].as_array();
    let mut cases: Vec<Case> = Vec::new();
    for turn in results.ok_or("has no 'results'; name a raw file of a bench")? {
        let (Some(case), Some(target)) = (turn["case"].as_str(), turn["target"].as_str()) else {
            return Err("a result without 'case' or 'target'; name a raw file of a bench".into());
        };
        let rows = entry(
            &mut cases,
            |known| known.0 == case,
            || (case.into(), vec![]),
        );
        let row = entry(
            &mut rows.1,
            |row| row.target == target,
            || Row {
                target: target.to_owned(),
                results: Vec::new(),
            },
        );
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let cpu = match &turn["backend_cpu_us_per_io"] {
            Value::Null => &turn["cpu_us_per_io"]["all"],
            of_the_backend => of_the_backend,
        };
        row.results.push(Measured {
            iops: number(&turn["iops"]),
            p50_us: number(&turn["p50_us"]),
            p99_us: number(&turn["p99_us"]),
            cpu_us: number(cpu),
            ..Measured::default()
        });
    }
    Ok(cases)
}

/// The first element that `is` the one, made at the end if there is none.
fn entry<T>(list: &mut Vec<T>, is: impl Fn(&T) -> bool, make: impl FnOnce() -> T) -> &mut T {
    let at = list.iter().position(is).unwrap_or_else(|| {
        list.push(make());
        list.len() - 1
    });
    &mut list[at]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_come_together_by_case_and_target() {
        let text = r#"{"results": [
            {"case": "a", "target": "x", "iops": 1, "p50_us": 2, "p99_us": 3, "backend_cpu_us_per_io": 4},
            {"case": "a", "target": "y", "iops": 5, "cpu_us_per_io": {"all": 6}},
            {"case": "a", "target": "x", "iops": 3, "backend_cpu_us_per_io": 8},
            {"case": "b", "target": "x", "iops": 7}]}"#;
        let cases = cases(text).unwrap();
        assert_eq!((cases.len(), cases[0].1.len()), (2, 2));
        let x = &cases[0].1[0];
        assert_eq!((x.median(|m| m.iops), x.median(|m| m.cpu_us)), (2.0, 6.0));
        assert_eq!(cases[0].1[1].median(|m| m.cpu_us), 6.0);
        assert!(cases[1].1[0].median(|m| m.cpu_us).is_nan());
    }

    #[test]
    fn other_files_are_refused() {
        for text in ["", "{}", r#"{"results": [{"case": "a"}]}"#] {
            assert!(cases(text).is_err(), "{text}");
        }
    }
}
