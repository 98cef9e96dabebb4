//! Aligned text tables.

use std::io::{self, Write};

/// A column's heading, and whether its cells are numbers, which align right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column(pub(crate) &'static str, pub(crate) bool);

/// Writes headings and rows, two spaces between columns.
///
/// # Errors
/// Those of `out`.
pub(crate) fn table(out: &mut impl Write, columns: &[Column], rows: &[Vec<String>]) -> io::Result<()> {
    let width = |i: usize| {
        let cells = rows.iter().map(|row| row[i].chars().count());
        cells.chain([columns[i].0.chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    let headings: Vec<_> = columns.iter().map(|column| column.0.to_owned()).collect();
    for row in std::iter::once(&headings).chain(rows) {
        let cells = row.iter().zip(columns).zip(&widths).map(|((cell, column), &width)| {
            if column.1 { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// A share as tables print it: `.205`, `1.000`.
pub(crate) fn fraction(x: f64, digits: usize) -> String {
    let text = format!("{x:.digits$}");
    text.strip_prefix('0').map_or(text.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_align_right() {
        let mut out = Vec::new();
        let columns = [Column("name", false), Column("ms", true)];
        let rows = [vec!["a".to_owned(), "10.0".to_owned()], vec!["longer".to_owned(), "9.5".to_owned()]];
        table(&mut out, &columns, &rows).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "name      ms\na       10.0\nlonger   9.5\n");
    }

    #[test]
    fn fractions_lose_their_leading_zero() {
        assert_eq!((fraction(0.2046, 3), fraction(1.0, 2)), (".205".to_owned(), "1.00".to_owned()));
    }
}
