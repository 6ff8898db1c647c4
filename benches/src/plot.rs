//! The picture of a run: a bar for each target of each case, or a line for each
//! target over its cases, as SVG text.
//!
//! Bars are ratios to one target, because cases differ by orders of magnitude;
//! the numbers themselves stand beside them. The background is white whatever
//! the viewer's is.

mod lines;

pub use lines::{Axis, lines};

use crate::turns::Row;

/// One case's rows, in their order.
pub type Case = (String, Vec<Row>);

const WIDTH: f64 = 960.0;
/// Where bars start and end.
const LEFT: f64 = 190.0;
const RIGHT: f64 = 660.0;
const TOP: f64 = 74.0;
const BAR: f64 = 16.0;
const STEP: f64 = 21.0;
/// Between two cases: the name of the next.
const GAP: f64 = 34.0;
/// One for each target; told apart in grey as well.
const COLOURS: [&str; 6] = [
    "#7f7f7f", "#4477aa", "#228833", "#cc8844", "#aa3377", "#66ccee",
];

/// Draws `cases`. Ratios are to the target `base`, or to the first one of a case
/// that lacks it.
pub fn svg(title: &str, base: &str, cases: &[Case]) -> String {
    let most = cases
        .iter()
        .flat_map(|(_, rows)| rows.iter().map(|row| row.span().1 / unit(rows, base)))
        .filter(|ratio| ratio.is_finite())
        .fold(1.0, f64::max);
    let scale = (RIGHT - LEFT) / most;
    let names = names(cases);
    let mut body = String::new();
    let mut y = TOP;
    for (name, rows) in cases {
        y += GAP - STEP;
        body += &text(12.0, y, "start", "bold", name);
        y += STEP - BAR;
        let top = y;
        for row in rows {
            let colour = names.iter().position(|name| *name == row.target);
            let colour = COLOURS[colour.unwrap_or(0) % COLOURS.len()];
            body += &bar(row, unit(rows, base), scale, y, colour);
            y += STEP;
        }
        body += &line(LEFT + scale, top - 3.0, LEFT + scale, y - 2.0, "#cc3311");
    }
    let height = y + 20.0;
    let subtitle = format!(
        "operations per second, median of the rounds, as a ratio to {base} (red line); \
         whiskers: slowest and fastest round"
    );
    frame(height, title, &subtitle, &body)
}

/// The whole picture around `body`.
fn frame(height: f64, title: &str, subtitle: &str, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}{}{body}</svg>\n",
        text(12.0, 26.0, "start", "bold", title),
        text(12.0, 46.0, "start", "normal", subtitle),
    )
}

/// All targets, in the order they first come in.
fn names(cases: &[Case]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in cases.iter().flat_map(|(_, rows)| rows) {
        if !names.contains(&row.target.as_str()) {
            names.push(&row.target);
        }
    }
    names
}

/// What is 1 in a case.
fn unit(rows: &[Row], base: &str) -> f64 {
    let row = rows.iter().find(|row| row.target == base);
    row.or(rows.first())
        .map_or(f64::NAN, |row| row.median(|m| m.iops))
}

fn bar(row: &Row, unit: f64, scale: f64, y: f64, colour: &str) -> String {
    let iops = row.median(|m| m.iops);
    let length = |value: f64| {
        let ratio = value / unit;
        if ratio.is_finite() {
            ratio * scale
        } else {
            0.0
        }
    };
    let (low, high) = row.span();
    let (low, high) = (LEFT + length(low), LEFT + length(high));
    let middle = y + BAR / 2.0;
    let foot = y + BAR - 4.0;
    let label = format!("{:.2}   {iops:.0}/s", iops / unit);
    [
        text(LEFT - 8.0, foot, "end", "normal", &row.target),
        format!(
            "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n",
            length(iops)
        ),
        line(low, middle, high, middle, "#000000"),
        line(low, middle - 4.0, low, middle + 4.0, "#000000"),
        line(high, middle - 4.0, high, middle + 4.0, "#000000"),
        text(RIGHT + 12.0, foot, "start", "normal", &label),
        text(RIGHT + 130.0, foot, "start", "normal", row.rig()),
    ]
    .concat()
}

fn line(x1: f64, y1: f64, x2: f64, y2: f64, colour: &str) -> String {
    format!(
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>\n"
    )
}

fn text(x: f64, y: f64, anchor: &str, weight: &str, words: &str) -> String {
    let words = words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    format!(
        "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\" \
         fill=\"#000000\">{words}</text>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::turns::Measured;

    fn row(target: &str, iops: &[f64]) -> Row {
        let measured = |iops: &f64| Measured {
            iops: *iops,
            rig: "native",
            ..Measured::default()
        };
        Row {
            target: target.to_owned(),
            results: iops.iter().map(measured).collect(),
        }
    }

    /// The widths of the bars.
    fn widths(svg: &str) -> Vec<f64> {
        svg.lines()
            .filter(|line| line.starts_with("<rect x="))
            .map(|line| {
                let (_, rest) = line.split_once("width=\"").unwrap();
                rest.split_once('"').unwrap().0.parse().unwrap()
            })
            .collect()
    }

    #[test]
    fn bars_are_ratios_and_the_longest_turn_fits() {
        let cases = [(
            "case".to_owned(),
            vec![row("host", &[80.0]), row("runc", &[30.0, 40.0, 50.0])],
        )];
        let svg = svg("title", "runc", &cases);
        let widths = widths(&svg);
        assert!((widths[0] - (RIGHT - LEFT)).abs() < 0.1, "{widths:?}");
        assert!((widths[1] - (RIGHT - LEFT) / 2.0).abs() < 0.1, "{widths:?}");
        assert!(svg.contains(">2.00   80/s<"), "{svg}");
        assert!(svg.contains(">1.00   40/s<"), "{svg}");
    }

    #[test]
    fn it_is_well_formed_and_white_whatever_is_in_it() {
        let cases = [
            ("a < b & c".to_owned(), vec![row("host", &[1.0])]),
            ("nothing".to_owned(), Vec::new()),
            ("idle".to_owned(), vec![row("host", &[])]),
        ];
        let svg = svg("title", "runc", &cases);
        assert!(svg.contains("a &lt; b &amp; c"));
        assert!(svg.contains("fill=\"#ffffff\""));
        assert!(!svg.contains("=\"NaN") && !svg.contains("=\"inf"), "{svg}");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }
}
