//! The table a person reads: medians, with minimum and maximum of the rounds.

use crate::turns::{Measured, Row};

/// A column of ratios: its heading and the target that is 1.
pub type Ratio<'a> = (&'a str, &'a str);

/// Prints one case. Ratios are those of the medians; a target that was not
/// measured leaves its column empty.
pub fn print(case: &str, rows: &[Row], ratios: &[Ratio<'_>]) {
    println!("\n{case}");
    let headings: String = ratios.iter().map(|(name, _)| column(name)).collect();
    println!(
        "{:<20} {:>9} {:>19}{headings} {:>9} {:>9} {:>11}",
        "target", "IOPS", "min .. max", "p50 us", "p99 us", "CPU us/IO"
    );
    for row in rows {
        let iops = |row: &Row| median(&row.results, |m| m.iops);
        let of = |list: fn(f64, f64) -> f64| row.results.iter().map(|m| m.iops).reduce(list);
        let (low, high) = (of(f64::min), of(f64::max));
        let to_others: String = ratios
            .iter()
            .map(|(_, base)| {
                let base = rows.iter().find(|row| row.target == *base);
                column(&base.map_or("-".into(), |base| format!("{:.2}", iops(row) / iops(base))))
            })
            .collect();
        println!(
            "{:<20} {:>9.0} {:>19}{to_others} {:>9.1} {:>9.1} {:>11.2}",
            row.target,
            iops(row),
            format!(
                "{:.0} .. {:.0}",
                low.unwrap_or(f64::NAN),
                high.unwrap_or(f64::NAN)
            ),
            median(&row.results, |m| m.p50_us),
            median(&row.results, |m| m.p99_us),
            median(&row.results, |m| m.cpu_us),
        );
    }
}

fn column(text: &str) -> String {
    format!(" {text:>10}")
}

/// The middle value; the mean of the two middle ones for an even count.
fn median(results: &[Measured], of: impl Fn(&Measured) -> f64) -> f64 {
    let mut values: Vec<f64> = results.iter().map(of).collect();
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

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_two() {
        let measured = |iops| Measured {
            iops,
            p50_us: 0.0,
            p99_us: 0.0,
            cpu_us: 0.0,
        };
        let of = |values: &[f64]| {
            let list: Vec<_> = values.iter().copied().map(measured).collect();
            median(&list, |m| m.iops)
        };
        assert!((of(&[5.0, 1.0, 3.0]) - 3.0).abs() < 1e-9);
        assert!((of(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(of(&[]).is_nan());
    }
}
