//! The table a person reads: medians, with minimum and maximum of the rounds.

use crate::cases::{Case, Measured, Target};

/// Prints one case. Ratios are those of the medians, to the first row.
pub(crate) fn print(case: &Case, rows: &[(Target, Vec<Measured>)]) {
    println!("\n{}", case.name);
    println!(
        "{:<20} {:>9} {:>19} {:>7} {:>9} {:>9} {:>11}",
        "target", "IOPS", "min .. max", "ratio", "p50 us", "p99 us", "CPU us/IO"
    );
    let base = rows
        .first()
        .map_or(f64::NAN, |(_, m)| median(m, |m| m.iops));
    for (target, results) in rows {
        let iops = median(results, |m| m.iops);
        let low = results.iter().map(|m| m.iops).fold(f64::INFINITY, f64::min);
        let high = results.iter().map(|m| m.iops).fold(0.0, f64::max);
        println!(
            "{:<20} {iops:>9.0} {:>19} {:>7.2} {:>9.1} {:>9.1} {:>11.2}",
            target.name(),
            format!("{low:.0} .. {high:.0}"),
            iops / base,
            median(results, |m| m.p50_us),
            median(results, |m| m.p99_us),
            median(results, |m| m.cpu_us),
        );
    }
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
