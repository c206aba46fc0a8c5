// SPDX-License-Identifier: GPL-2.0
//! Aligned columns.

/// Lines of a table: the header in capitals, columns two spaces apart, numbers to the right, nothing behind the last
/// word of a line.
pub fn render(header: &[&str], rows: &[Vec<String>]) -> String {
    let columns = header.len();
    let cell = |row: &[String], c: usize| row.get(c).cloned().unwrap_or_default();
    let width = |c: usize| {
        rows.iter()
            .map(|r| cell(r, c).chars().count())
            .chain([header[c].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let right: Vec<_> = (0..columns)
        .map(|c| !rows.is_empty() && rows.iter().all(|r| is_number(&cell(r, c))) && c + 1 < columns)
        .collect();

    let mut out = String::new();
    let titles: Vec<_> = header.iter().map(|h| h.to_uppercase()).collect();
    for row in std::iter::once(&titles).chain(rows) {
        let cells: Vec<_> = (0..columns)
            .map(|c| match right[c] {
                true => format!("{:>1$}", cell(row, c), widths[c]),
                false => format!("{:<1$}", cell(row, c), widths[c]),
            })
            .collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Vec<String> {
        cells.iter().map(|c| c.to_string()).collect()
    }

    #[test]
    fn columns_are_aligned_and_numbers_stand_right() {
        let t = render(
            &["cpu", "state", "why"],
            &[row(&["0", "in", "ü"]), row(&["10", "outside", ""])],
        );
        assert_eq!(t, "CPU  STATE    WHY\n  0  in       ü\n 10  outside\n");
    }

    #[test]
    fn an_empty_table_is_its_header_and_short_rows_are_filled() {
        assert_eq!(render(&["a", "b"], &[]), "A  B\n");
        assert_eq!(render(&["a", "b"], &[row(&["x"])]), "A  B\nx\n");
    }
}
