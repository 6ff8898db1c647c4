//! Text tables: the first column to the left, the others to the right or left
//! as asked, two spaces between columns.
//!
//! Called by the two halves of the demo.

/// How the columns after the first are set.
#[derive(Clone, Copy)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Sets `rows` as lines of text; the first row is the heading.
pub(crate) fn set(rows: &[Vec<String>], align: Align) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, &width))| match align {
                Align::Right if column > 0 => format!("{cell:>width$}"),
                _ => format!("{cell:<width$}"),
            })
            .collect();
        text += &format!("  {}", cells.join("  "));
        text.truncate(text.trim_end().len());
        text.push('\n');
        if index == 0 {
            let rule: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
            text += &format!("  {}\n", rule.join("  "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Vec<String>> {
        [["", "IOPS"], ["runc", "71000"], ["a longer name", "5"]]
            .map(|row| row.map(str::to_owned).to_vec())
            .to_vec()
    }

    #[test]
    fn numbers_stand_to_the_right() {
        assert_eq!(
            set(&rows(), Align::Right),
            "                  IOPS\n\
             \x20 -------------  -----\n\
             \x20 runc           71000\n\
             \x20 a longer name      5\n"
        );
    }

    #[test]
    fn words_stand_to_the_left() {
        assert_eq!(
            set(&rows(), Align::Left),
            "                 IOPS\n\
             \x20 -------------  -----\n\
             \x20 runc           71000\n\
             \x20 a longer name  5\n"
        );
    }
}
