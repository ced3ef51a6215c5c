//! A container's last words: its termination message file, or the end of its log.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

/// Longest message from the file.
const FILE: u64 = 4096;
/// Longest message from the log.
const LOG: usize = 2048;
/// Most lines from the log.
const LINES: usize = 80;

/// What the container said at its end.
pub(crate) fn read(file: &Path, log: &Path, policy: Option<&str>, code: i32) -> String {
    let mut text = Vec::new();
    if let Ok(f) = File::open(file) {
        f.take(FILE).read_to_end(&mut text).ok();
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    if !text.is_empty() || code == 0 || policy != Some("FallbackToLogsOnError") {
        return text;
    }
    tail(log)
}

fn tail(log: &Path) -> String {
    let Ok(mut f) = File::open(log) else { return String::new() };
    let size = f.metadata().map_or(0, |m| m.len());
    let from = size.saturating_sub(64 * 1024);
    let mut text = Vec::new();
    if f.seek(SeekFrom::Start(from)).is_err() || f.read_to_end(&mut text).is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&text);
    let mut lines: Vec<&str> = text.lines().skip(usize::from(from > 0)).collect();
    lines.drain(..lines.len().saturating_sub(LINES));
    // TIME STREAM TAG TEXT
    let said: String = lines
        .iter()
        .filter_map(|l| {
            let mut parts = l.splitn(4, ' ');
            let tag = parts.nth(2)?;
            let text = parts.next().unwrap_or("");
            Some(if tag.starts_with('P') { text.to_string() } else { format!("{text}\n") })
        })
        .collect();
    let mut start = said.len().saturating_sub(LOG);
    while !said.is_char_boundary(start) {
        start += 1;
    }
    said[start..].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_first_then_log_on_error() {
        let dir = tempfile::tempdir().unwrap();
        let (file, log) = (dir.path().join("m"), dir.path().join("l"));
        std::fs::write(&log, "2024-01-01T00:00:00Z stdout P par\n2024-01-01T00:00:00Z stdout F tial\n2024-01-01T00:00:00Z stderr F last\n").unwrap();
        assert_eq!(read(&file, &log, Some("FallbackToLogsOnError"), 1), "partial\nlast\n");
        assert_eq!(read(&file, &log, Some("FallbackToLogsOnError"), 0), "");
        assert_eq!(read(&file, &log, None, 1), "");
        std::fs::write(&file, "bye").unwrap();
        assert_eq!(read(&file, &log, Some("FallbackToLogsOnError"), 1), "bye");
    }
}
