//! Columns of text, as wide as what is in them.

/// Prints rows under a header; the last column is as wide as it likes.
pub(crate) fn print<const N: usize>(header: [&str; N], rows: &[[String; N]]) {
    print!("{}", render(header, rows));
}

/// The same as text.
pub(crate) fn render<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let longest = rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
        longest.max(header[column].chars().count())
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut out = String::new();
    let mut line = |cells: [&str; N]| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(&widths) {
            text += &format!("{cell:width$}   ");
        }
        out += text.trim_end();
        out.push('\n');
    };
    line(header);
    for row in rows {
        line(row.each_ref().map(String::as_str));
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_line_up() {
        let rows = [["web".to_owned(), "1/1".to_owned()], ["a-long-one".to_owned(), String::new()]];
        assert_eq!(super::render(["NAME", "READY"], &rows), "NAME         READY\nweb          1/1\na-long-one\n");
    }
}
