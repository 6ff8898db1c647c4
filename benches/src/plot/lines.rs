//! A line for each target over the cases: how something grows. Called by `draw`.

use super::{COLOURS, Case, frame, line, names, text};
use crate::turns::{Measured, Row};

const LEFT: f64 = 80.0;
const RIGHT: f64 = 760.0;
const TOP: f64 = 74.0;
const BOTTOM: f64 = 330.0;
const HEIGHT: f64 = 380.0;
/// Lines across, that of zero not counted.
const STEPS: u32 = 4;

/// What goes up.
#[derive(Debug, Clone, Copy)]
pub enum Axis {
    /// Operations per second.
    Rate,
    /// CPU time per operation.
    Cpu,
    /// The median latency.
    Latency,
}

impl Axis {
    /// By the name it has on a command line.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "rate" => Some(Self::Rate),
            "cpu" => Some(Self::Cpu),
            "latency" => Some(Self::Latency),
            _ => None,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Rate => "operations per second",
            Self::Cpu => "CPU time per operation, microseconds",
            Self::Latency => "median latency, microseconds",
        }
    }

    fn of(self, row: &Row) -> f64 {
        row.median(|m: &Measured| match self {
            Self::Rate => m.iops,
            Self::Cpu => m.cpu_us,
            Self::Latency => m.p50_us,
        })
    }
}

/// Draws `cases` from left to right, at equal distances.
pub fn lines(title: &str, axis: Axis, cases: &[Case]) -> String {
    let values = cases.iter().flat_map(|(_, rows)| rows);
    let most = values.map(|row| axis.of(row)).filter(|v| v.is_finite());
    let most = round_up(most.fold(f64::MIN_POSITIVE, f64::max));
    let gaps = cases.len().saturating_sub(1).max(1) as f64;
    let x = |index: usize| LEFT + (RIGHT - LEFT) * index as f64 / gaps;
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * value / most;

    let mut body = String::new();
    for step in 0..=STEPS {
        let value = most * f64::from(step) / f64::from(STEPS);
        body += &line(LEFT, y(value), RIGHT, y(value), "#dddddd");
        body += &text(LEFT - 8.0, y(value) + 4.0, "end", "normal", &short(value));
    }
    for (index, (name, _)) in cases.iter().enumerate() {
        body += &text(x(index), BOTTOM + 20.0, "middle", "normal", name);
    }
    for (number, target) in names(cases).into_iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let points: Vec<(f64, f64)> = cases
            .iter()
            .enumerate()
            .filter_map(|(index, (_, rows))| {
                let row = rows.iter().find(|row| row.target == target)?;
                let value = axis.of(row);
                value.is_finite().then(|| (x(index), y(value)))
            })
            .collect();
        for pair in points.windows(2) {
            body += &line(pair[0].0, pair[0].1, pair[1].0, pair[1].1, colour);
        }
        for (x, y) in points {
            body += &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>\n");
        }
        let legend = TOP + 18.0 * number as f64;
        body += &line(RIGHT + 20.0, legend, RIGHT + 40.0, legend, colour);
        body += &text(RIGHT + 46.0, legend + 4.0, "start", "normal", target);
    }
    frame(HEIGHT, title, axis.title(), &body)
}

/// The next number that a quarter of is short.
fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 4.8, 6.0, 8.0, 10.0];
    let fits = steps.into_iter().find(|step| step * power >= value);
    fits.unwrap_or(10.0) * power
}

/// A number in few characters.
fn short(value: f64) -> String {
    if value >= 1000.0 {
        format!("{:.0}k", value / 1000.0)
    } else {
        format!("{value}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(name: &str, rows: &[(&str, f64)]) -> Case {
        let row = |(target, cpu_us): &(&str, f64)| Row {
            target: (*target).to_owned(),
            results: vec![Measured {
                cpu_us: *cpu_us,
                ..Measured::default()
            }],
        };
        (name.to_owned(), rows.iter().map(row).collect())
    }

    /// Where the points are.
    fn points(svg: &str) -> Vec<(f64, f64)> {
        svg.lines()
            .filter_map(|line| line.strip_prefix("<circle cx=\""))
            .map(|rest| {
                let numbers: Vec<&str> = rest.split('"').collect();
                (numbers[0].parse().unwrap(), numbers[2].parse().unwrap())
            })
            .collect()
    }

    #[test]
    fn points_are_where_their_values_are() {
        let cases = [
            case("1", &[("ours", 4.0), ("theirs", 8.0)]),
            case("2", &[("ours", 2.0)]),
            case("4", &[("ours", 0.0), ("theirs", f64::NAN)]),
        ];
        let svg = lines("title", Axis::Cpu, &cases);
        let half = f64::midpoint(TOP, BOTTOM);
        let quarter = f64::midpoint(half, BOTTOM);
        let middle = f64::midpoint(LEFT, RIGHT);
        let ours = [(LEFT, half), (middle, quarter), (RIGHT, BOTTOM)];
        assert_eq!(points(&svg), [&ours[..], &[(LEFT, TOP)]].concat());
        assert!(!svg.contains("NaN") && svg.contains(">theirs<"), "{svg}");
    }

    #[test]
    fn an_axis_ends_above_its_highest_value() {
        for (value, end) in [(1.0, 1.0), (1.1, 1.2), (37.0, 40.0), (81.0, 100.0)] {
            assert_eq!(round_up(value), end);
        }
        assert!(!lines("nothing", Axis::Rate, &[]).contains("NaN"));
    }
}
