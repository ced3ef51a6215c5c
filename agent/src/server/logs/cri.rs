//! The CRI log format: one line per piece of output.
//!
//! ```text
//! 2026-11-21T10:00:00.123456789Z stdout F a whole line
//! 2026-11-21T10:00:00.123456789Z stderr P the beginning of a long one
//! ```
//!
//! `F` ends a line of output, `P` does not. Tags may have more parts behind a colon.

use jiff::Timestamp;

/// Which stream a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamKind {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One parsed line of a log file, without its newline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Line<'a> {
    /// The time as written.
    pub(crate) time: &'a str,
    /// Where it came from.
    pub(crate) stream: StreamKind,
    /// Whether the output's line goes on in the next one.
    pub(crate) partial: bool,
    /// The output.
    pub(crate) text: &'a [u8],
}

impl<'a> Line<'a> {
    /// Parses one line; `None` for what is not in the format.
    pub(crate) fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let time = std::str::from_utf8(parts.next()?).ok()?;
        let stream = match parts.next()? {
            b"stdout" => StreamKind::Stdout,
            b"stderr" => StreamKind::Stderr,
            _ => return None,
        };
        let tag = parts.next()?.split(|byte| *byte == b':').next()?;
        let partial = match tag {
            b"P" => true,
            b"F" => false,
            _ => return None,
        };
        Some(Line { time, stream, partial, text: parts.next().unwrap_or_default() })
    }

    /// When it was written.
    pub(crate) fn timestamp(&self) -> Option<Timestamp> {
        self.time.parse().ok()
    }

    /// The time with nine digits, as clients of `timestamps=true` expect it.
    pub(crate) fn write_time(&self, out: &mut Vec<u8>) {
        let fixed = self.time.len() == 30 && self.time.ends_with('Z');
        match (fixed, self.timestamp()) {
            (false, Some(time)) => out.extend_from_slice(format!("{time:.9}").as_bytes()),
            _ => out.extend_from_slice(self.time.as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_parse() {
        let line = Line::parse(b"2026-11-21T10:00:00.5Z stderr P half a line").unwrap();
        assert_eq!((line.stream, line.partial, line.text), (StreamKind::Stderr, true, &b"half a line"[..]));
        let mut time = Vec::new();
        line.write_time(&mut time);
        assert_eq!(time, b"2026-11-21T10:00:00.500000000Z");
        let empty = Line::parse(b"2026-11-21T10:00:00.123456789Z stdout F ").unwrap();
        assert_eq!((empty.partial, empty.text), (false, &b""[..]));
        let bare = Line::parse(b"2026-11-21T10:00:00.123456789Z stdout F:x").unwrap();
        assert_eq!((bare.partial, bare.text), (false, &b""[..]));
    }

    #[test]
    fn other_formats_do_not() {
        for line in [&b""[..], b"hello", b"2026 stdin F x", b"2026 stdout X y"] {
            assert_eq!(Line::parse(line), None);
        }
    }
}
