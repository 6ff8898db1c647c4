//! The table a person reads: medians, with minimum and maximum of the rounds.

use crate::turns::{Measured, Row};

/// A column of ratios: its heading and the target that is 1.
pub type Ratio<'a> = (&'a str, &'a str);

/// Prints one case. Ratios are those of the medians; a target that was not
/// measured leaves its column empty.
pub fn print(case: &str, rows: &[Row], ratios: &[Ratio<'_>]) {
    print!("\n{}", text(case, rows, ratios));
}

/// The table of one case. It has a column for each process whose CPU time was
/// looked at, and one for the rig, if any row has one.
pub fn text(case: &str, rows: &[Row], ratios: &[Ratio<'_>]) -> String {
    let headings: String = ratios.iter().map(|(name, _)| column(name)).collect();
    let columns = optional(rows);
    let more: String = columns
        .iter()
        .map(|(name, _)| format!(" {name:>9}"))
        .collect();
    let mut text = format!(
        "{case}\n{:<20} {:>9} {:>19}{headings} {:>9} {:>9} {:>11}{more}",
        "target", "IOPS", "min .. max", "p50 us", "p99 us", "CPU us/IO"
    );
    let rigs = rows.iter().any(|row| !row.rig().is_empty());
    if rigs {
        text += "  rig";
    }
    text.push('\n');
    for row in rows {
        let span = row.span();
        let to_others: String = ratios
            .iter()
            .map(|(_, base)| {
                let base = rows.iter().find(|row| row.target == *base);
                let ratio = base.map(|base| row.median(|m| m.iops) / base.median(|m| m.iops));
                column(&ratio.map_or("-".into(), |ratio| format!("{ratio:.2}")))
            })
            .collect();
        text += &format!(
            "{:<20} {:>9.0} {:>19}{to_others} {:>9.1} {:>9.1} {:>11.2}",
            row.target,
            row.median(|m| m.iops),
            format!("{:.0} .. {:.0}", span.0, span.1),
            row.median(|m| m.p50_us),
            row.median(|m| m.p99_us),
            row.median(|m| m.cpu_us),
        );
        for (_, of) in &columns {
            let value = row.optional(*of);
            text += &value.map_or(format!(" {:>9}", "-"), |value| format!(" {value:>9.2}"));
        }
        if rigs {
            text += &format!("  {}", row.rig());
        }
        text.push('\n');
    }
    text
}

/// A heading, and where its number is.
type Column = (&'static str, fn(&Measured) -> Option<f64>);

/// Those columns that any row has something in.
fn optional(rows: &[Row]) -> Vec<Column> {
    let all: [Column; 8] = [
        ("backend", |m| m.shares?.backend),
        ("guest", |m| m.shares?.guest),
        ("fio", |m| m.shares?.fio),
        ("store", |m| m.shares?.store),
        ("fairness", |m| m.fairness),
        ("KiB", |m| m.memory_kib),
        ("fds", |m| m.descriptors.map(|count| count as f64)),
        ("in flight", |m| m.in_flight.map(|most| most as f64)),
    ];
    let seen = |(_, of): &Column| rows.iter().any(|row| row.optional(*of).is_some());
    all.into_iter().filter(seen).collect()
}

fn column(text: &str) -> String {
    format!(" {text:>10}")
}

impl Row {
    /// The median of one of its numbers.
    pub fn median(&self, of: impl Fn(&Measured) -> f64) -> f64 {
        median(self.results.iter().map(of).collect())
    }

    /// The slowest and the fastest turn, operations per second.
    pub fn span(&self) -> (f64, f64) {
        let of = |list: fn(f64, f64) -> f64| {
            let all = self.results.iter().map(|m| m.iops);
            all.reduce(list).unwrap_or(f64::NAN)
        };
        (of(f64::min), of(f64::max))
    }

    /// What its turns ran on.
    pub fn rig(&self) -> &'static str {
        self.results.first().map_or("", |m| m.rig)
    }

    /// The median of what not every row has.
    fn optional(&self, of: fn(&Measured) -> Option<f64>) -> Option<f64> {
        let values: Vec<f64> = self.results.iter().filter_map(of).collect();
        (!values.is_empty()).then(|| median(values))
    }
}

/// The middle value; the mean of the two middle ones for an even count, not a
/// number for none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n.is_multiple_of(2) => f64::midpoint(values[middle - 1], values[middle]),
        _ => values[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::turns::Shares;

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_two() {
        let of = |values: &[f64]| median(values.to_vec());
        assert!((of(&[5.0, 1.0, 3.0]) - 3.0).abs() < 1e-9);
        assert!((of(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(of(&[]).is_nan());
    }

    fn row(target: &'static str, iops: [f64; 3], shares: Option<Shares>) -> Row {
        let results = iops.map(|iops| Measured {
            iops,
            p50_us: 10.0,
            p99_us: 20.0,
            cpu_us: 4.0,
            shares,
            rig: if shares.is_some() { "native" } else { "" },
            ..Measured::default()
        });
        Row {
            target: target.to_owned(),
            results: results.to_vec(),
        }
    }

    fn words(line: &str) -> String {
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_table_without_shares_has_no_columns_for_them() {
        let rows = [row("a", [100.0, 300.0, 200.0], None)];
        let text = text("case", &rows, &[("of a", "a"), ("of b", "b")]);
        let lines: Vec<String> = text.lines().map(words).collect();
        assert_eq!(lines[0], "case");
        assert!(lines[1].ends_with("CPU us/IO"), "{text}");
        assert_eq!(lines[2], "a 200 100 .. 300 1.00 - 10.0 20.0 4.00");
    }

    #[test]
    fn a_column_stands_for_each_process_that_was_looked_at() {
        let fio = Shares {
            fio: Some(4.0),
            ..Shares::default()
        };
        let guest = Shares {
            backend: Some(1.0),
            guest: Some(3.0),
            fio: Some(2.0),
            ..Shares::default()
        };
        let rows = [
            row("runc", [100.0; 3], Some(fio)),
            row("guest", [50.0; 3], Some(guest)),
        ];
        let text = text("case", &rows, &[("of runc", "runc")]);
        let lines: Vec<String> = text.lines().map(words).collect();
        assert!(
            lines[1].ends_with("CPU us/IO backend guest fio rig"),
            "{text}"
        );
        assert!(lines[2].ends_with("1.00 10.0 20.0 4.00 - - 4.00 native"));
        assert!(lines[3].ends_with("0.50 10.0 20.0 4.00 1.00 3.00 2.00 native"));
    }
}
