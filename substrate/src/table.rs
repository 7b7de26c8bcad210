// SPDX-License-Identifier: Apache-2.0
//! Plain tables: a header, columns as wide as their widest cell, three spaces between them, no frames, so that both
//! people and `awk` can read them.
use std::fmt::Write as _;

/// Rows of text under a header.
#[derive(Debug, Default)]
pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; an empty cell is shown as `-`.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.header.len(), "a row has as many cells as the header");
        self.rows.push(cells);
    }

    /// How wide each column has to be, in characters.
    pub fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self.header.iter().map(|text| text.len()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count().max(1));
            }
        }
        widths
    }

    /// The whole table.
    pub fn render(&self) -> String {
        let widths = self.widths();
        let mut text = line(self.header.iter().copied(), &widths);
        for row in &self.rows {
            text.push_str(&line(row.iter().map(String::as_str), &widths));
        }
        text
    }

    /// The rows alone, at least as wide as given: for a watch that goes on below an earlier table.
    pub fn render_rows(&self, at_least: &[usize]) -> String {
        let widths: Vec<usize> =
            self.widths().iter().zip(at_least).map(|(own, least)| *own.max(least)).collect();
        self.rows.iter().map(|row| line(row.iter().map(String::as_str), &widths)).collect()
    }
}

fn line<'a>(cells: impl Iterator<Item = &'a str>, widths: &[usize]) -> String {
    let mut text = String::new();
    for (cell, width) in cells.zip(widths) {
        let cell = if cell.is_empty() { "-" } else { cell };
        // What servers and workloads say must not break the table or move the cursor.
        let cell: String = cell.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let _ = write!(text, "{cell:<width$}   ");
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

/// `key:   value` lines for `describe`, values of one group under each other.
#[derive(Debug, Default)]
pub struct Facts {
    lines: Vec<(usize, String, String)>,
}

impl Facts {
    /// Adds a fact unless its value is empty.
    pub fn add(&mut self, key: &str, value: impl Into<String>) {
        let value = value.into();
        if !value.is_empty() {
            self.lines.push((0, key.to_owned(), value));
        }
    }

    /// Adds a heading whose facts follow with [`Facts::sub`].
    pub fn heading(&mut self, key: &str) {
        self.lines.push((0, key.to_owned(), String::new()));
    }

    /// Adds a fact below a heading unless its value is empty.
    pub fn sub(&mut self, key: &str, value: impl Into<String>) {
        let value = value.into();
        if !value.is_empty() {
            self.lines.push((2, key.to_owned(), value));
        }
    }

    /// The text.
    pub fn render(&self) -> String {
        let width =
            self.lines.iter().map(|(indent, key, _)| indent + key.chars().count() + 1).max().unwrap_or(0);
        let mut text = String::new();
        for (indent, key, value) in &self.lines {
            let label = format!("{:indent$}{key}:", "");
            let value = value.trim_end().replace('\n', &format!("\n{:width$}  ", ""));
            text.push_str(format!("{label:<width$}  {value}").trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["alice".into(), "RUNNING".into()]);
        table.row(vec!["b".into(), String::new()]);
        assert_eq!(table.render(), "NAME    STATE\nalice   RUNNING\nb       -\n");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let mut table = Table::new(&["MESSAGE"]);
        table.row(vec!["a\u{1b}[2Jb\nc".into()]);
        assert_eq!(table.render(), "MESSAGE\na [2Jb c\n");
    }

    #[test]
    fn facts_line_up_and_skip_what_is_empty() {
        let mut facts = Facts::default();
        facts.add("Name", "alice");
        facts.add("Reason", "");
        facts.heading("Snapshot");
        facts.sub("Durability", "durable");
        facts.add("Message", "two\nlines");
        assert_eq!(
            facts.render(),
            "Name:          alice\nSnapshot:\n  Durability:  durable\nMessage:       two\n               lines\n"
        );
    }
}
