//! Container output in the CRI log format, rotated without losing or tearing a line.
//!
//! A line is `TIME stdout|stderr F|P TEXT`. Lines longer than 16 KiB are cut into P entries, the last one F, as
//! containerd does. The file only ever grows by whole entries: what a full disk cut short is taken back, and output
//! that finds no room is dropped, for the workload must not wait for the disk.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use crate::{
    sys::find_byte,
    time::{civil, now_nanos},
};

/// Longest text of one entry.
const MAX_LINE: usize = 16 << 10;
/// Entries are gathered up to this many bytes before they are written.
const BATCH: usize = 64 << 10;

/// An output stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output, and all of a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// When to rotate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rotation {
    /// Bytes per file, 0 for never.
    pub(crate) max_size: u64,
    /// Files kept, the current one included.
    pub(crate) max_files: u32,
}

/// The log of one container.
#[derive(Debug)]
pub(crate) struct LogWriter {
    path: PathBuf,
    file: Option<File>,
    size: u64,
    rotation: Rotation,
    /// What has come of an unfinished line, per stream.
    partial: [Vec<u8>; 2],
    clock: Clock,
    /// Bytes of output that found no room.
    lost: u64,
}

impl LogWriter {
    /// Opens or continues the log at `path`.
    pub(crate) fn open(path: &Path, rotation: Rotation) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let (file, size) = open(path)?;
        Ok(Self {
            path: path.to_owned(),
            file: Some(file),
            size,
            rotation,
            partial: [vec![], vec![]],
            clock: Clock::default(),
            lost: 0,
        })
    }

    /// Reopens after someone else moved the file.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        let (file, size) = open(&self.path)?;
        (self.file, self.size) = (Some(file), size);
        Ok(())
    }

    /// Bytes dropped so far.
    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }

    /// Takes what a stream said. `batch` is scratch space shared by all logs.
    pub(crate) fn append(&mut self, stream: Stream, mut data: &[u8], batch: &mut Vec<u8>) {
        batch.clear();
        // One time for what came at once.
        self.clock.set(now_nanos());
        let mut partial = std::mem::take(&mut self.partial[stream as usize]);
        while !data.is_empty() {
            let newline = find_byte(data, b'\n');
            let piece = &data[..newline.unwrap_or(data.len())];
            let room = MAX_LINE - partial.len();
            if piece.len() > room {
                let (now, later) = piece.split_at(room);
                self.entry(stream, b'P', &partial, now, batch);
                partial.clear();
                data = &data[piece.len() - later.len()..];
                continue;
            }
            if newline.is_none() {
                partial.extend_from_slice(piece);
                break;
            }
            self.entry(stream, b'F', &partial, piece, batch);
            partial.clear();
            data = &data[piece.len() + 1..];
        }
        self.write(batch);
        if partial.is_empty() {
            // Idle containers hold no buffers.
            partial = vec![];
        }
        self.partial[stream as usize] = partial;
    }

    /// Writes unfinished lines as partial ones, so that readers do not end what the container did not end.
    pub(crate) fn finish(&mut self, batch: &mut Vec<u8>) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let partial = std::mem::take(&mut self.partial[stream as usize]);
            if !partial.is_empty() {
                batch.clear();
                self.clock.set(now_nanos());
                self.entry(stream, b'P', &partial, &[], batch);
                self.write(batch);
            }
        }
    }

    fn entry(&mut self, stream: Stream, tag: u8, head: &[u8], tail: &[u8], batch: &mut Vec<u8>) {
        let stamp = self.clock.text;
        let length = stamp.len() + 11 + head.len() + tail.len() + 1;
        let pending = self.size + batch.len() as u64;
        let full = self.rotation.max_size > 0 && pending > 0 && pending + length as u64 > self.rotation.max_size;
        if full || batch.len() + length > BATCH {
            self.write(batch);
            batch.clear();
            if full {
                self.rotate();
            }
        }
        batch.extend_from_slice(&stamp);
        batch.extend_from_slice(match stream {
            Stream::Stdout => b" stdout ",
            Stream::Stderr => b" stderr ",
        });
        batch.push(tag);
        batch.push(b' ');
        batch.extend_from_slice(head);
        batch.extend_from_slice(tail);
        batch.push(b'\n');
    }

    /// Writes whole entries or nothing.
    fn write(&mut self, batch: &[u8]) {
        if batch.is_empty() {
            return;
        }
        if self.file.is_none() {
            drop(self.reopen());
        }
        let Some(file) = &mut self.file else {
            self.lost += batch.len() as u64;
            return;
        };
        let mut rest = batch;
        let failed = loop {
            if rest.is_empty() {
                break false;
            }
            match file.write(rest) {
                Ok(0) => break true,
                Ok(n) => rest = &rest[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break true,
            }
        };
        let written = batch.len() - rest.len();
        // Up to the last whole entry it is good; the beginning of another is taken back.
        let kept =
            if failed { batch[..written].iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1) } else { written };
        if failed && kept < written {
            drop(file.set_len(self.size + kept as u64));
        }
        self.size += kept as u64;
        self.lost += (batch.len() - kept) as u64;
    }

    fn rotate(&mut self) {
        let c = civil(now_nanos() / 1_000_000_000);
        let stamp = format!("{:04}{:02}{:02}-{:02}{:02}{:02}", c.year, c.month, c.day, c.hour, c.minute, c.second);
        let name = |suffix: &str| {
            let mut path = self.path.clone().into_os_string();
            path.push(format!(".{stamp}{suffix}"));
            PathBuf::from(path)
        };
        let mut target = name("");
        for n in 1..1000 {
            if !target.exists() {
                break;
            }
            target = name(&format!("-{n:03}"));
        }
        if std::fs::rename(&self.path, &target).is_err() {
            return;
        }
        self.file = None;
        drop(self.reopen());
        self.prune();
    }

    /// Removes the oldest rotated files beyond the limit. Their names sort by age.
    fn prune(&self) {
        let (Some(dir), Some(name)) = (self.path.parent(), self.path.file_name()) else { return };
        let prefix = format!("{}.", name.to_string_lossy());
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut rotated: Vec<_> =
            entries.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix)).map(|e| e.path()).collect();
        rotated.sort();
        let keep = self.rotation.max_files.saturating_sub(1).max(1) as usize;
        for old in rotated.iter().take(rotated.len().saturating_sub(keep)) {
            drop(std::fs::remove_file(old));
        }
    }
}

/// Opens for appending; a torn last entry, left by a crash, is cut off.
fn open(path: &Path) -> io::Result<(File, u64)> {
    let mut file = File::options().create(true).append(true).read(true).mode(0o640).open(path)?;
    let size = file.metadata()?.len();
    let tail = size.min(BATCH as u64);
    if tail == 0 {
        return Ok((file, 0));
    }
    let mut bytes = vec![0; tail as usize];
    file.seek(SeekFrom::Start(size - tail))?;
    file.read_exact(&mut bytes)?;
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |i| i as u64 + 1);
    if whole == tail || whole == 0 {
        return Ok((file, size));
    }
    let good = size - tail + whole;
    file.set_len(good)?;
    Ok((file, good))
}

/// Time stamps, whose date part is made once a second.
#[derive(Debug)]
struct Clock {
    second: i64,
    text: [u8; 30],
}

impl Default for Clock {
    fn default() -> Self {
        Self { second: -1, text: [0; 30] }
    }
}

impl Clock {
    fn set(&mut self, now: i64) {
        let (second, mut nanos) = (now / 1_000_000_000, now % 1_000_000_000);
        if second != self.second {
            self.second = second;
            let text = crate::time::rfc3339_nanos(now);
            self.text.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        }
        // "2026-01-02T03:04:05." is 20 bytes.
        for digit in self.text[20..29].iter_mut().rev() {
            *digit = b'0' + (nanos % 10) as u8;
            nanos /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(path: &Path) -> Vec<(String, String, String)> {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines()
            .map(|l| {
                let mut f = l.splitn(4, ' ');
                assert_eq!(f.next().unwrap().len(), 30);
                let mut next = || f.next().unwrap().to_owned();
                (next(), next(), next())
            })
            .collect()
    }

    fn writer(max_size: u64, max_files: u32) -> (tempfile::TempDir, LogWriter) {
        let dir = tempfile::tempdir().unwrap();
        let log = LogWriter::open(&dir.path().join("0.log"), Rotation { max_size, max_files }).unwrap();
        (dir, log)
    }

    #[test]
    fn lines_partials_and_streams() {
        let (dir, mut log) = writer(0, 1);
        let mut batch = vec![];
        log.append(Stream::Stdout, b"one\ntw", &mut batch);
        log.append(Stream::Stderr, b"err\n", &mut batch);
        log.append(Stream::Stdout, b"o\n\nend", &mut batch);
        log.finish(&mut batch);
        let own = |s: &str, t: &str, x: &str| (s.to_owned(), t.to_owned(), x.to_owned());
        let expected = [
            own("stdout", "F", "one"),
            own("stderr", "F", "err"),
            own("stdout", "F", "two"),
            own("stdout", "F", ""),
            own("stdout", "P", "end"),
        ];
        assert_eq!(texts(&dir.path().join("0.log")), expected);
    }

    #[test]
    fn long_lines_are_split_at_16_kib() {
        for (length, parts) in [(MAX_LINE, vec![("F", MAX_LINE)]), (MAX_LINE + 1, vec![("P", MAX_LINE), ("F", 1)])] {
            let (dir, mut log) = writer(0, 1);
            let mut line = vec![b'x'; length];
            line.push(b'\n');
            for chunk in line.chunks(1000) {
                log.append(Stream::Stdout, chunk, &mut vec![]);
            }
            let got: Vec<_> = texts(&dir.path().join("0.log")).iter().map(|t| (t.1.clone(), t.2.len())).collect();
            let parts: Vec<_> = parts.into_iter().map(|(t, l)| (t.to_owned(), l)).collect();
            assert_eq!(got, parts);
        }
    }

    #[test]
    fn rotation_keeps_lines_whole_and_files_few() {
        let (dir, mut log) = writer(2000, 100_000);
        let mut batch = vec![];
        for i in 0..500 {
            log.append(Stream::Stdout, format!("line {i}\n").as_bytes(), &mut batch);
        }
        let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        let current = files.remove(0);
        files.push(current);
        assert!(files.len() > 5);
        let all: Vec<_> = files.iter().flat_map(|f| texts(f)).map(|t| t.2).collect();
        let expected: Vec<_> = (0..500).map(|i| format!("line {i}")).collect();
        assert_eq!(all, expected);
        assert!(files.iter().all(|f| std::fs::metadata(f).unwrap().len() <= 2000));

        let (dir, mut log) = writer(2000, 3);
        for i in 0..500 {
            log.append(Stream::Stdout, format!("line {i}\n").as_bytes(), &mut batch);
        }
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 3);
    }

    #[test]
    fn a_torn_tail_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, "2026-01-01T00:00:00.000000000Z stdout F whole\n2026-01-01T00:00").unwrap();
        let mut log = LogWriter::open(&path, Rotation { max_size: 0, max_files: 1 }).unwrap();
        log.append(Stream::Stdout, b"next\n", &mut vec![]);
        assert_eq!(texts(&path).iter().map(|t| t.2.as_str()).collect::<Vec<_>>(), ["whole", "next"]);
    }

    #[test]
    fn a_full_disk_drops_output_but_tears_nothing() {
        let mut log = LogWriter {
            path: "/dev/full".into(),
            file: Some(File::options().write(true).open("/dev/full").unwrap()),
            size: 0,
            rotation: Rotation { max_size: 0, max_files: 1 },
            partial: [vec![], vec![]],
            clock: Clock::default(),
            lost: 0,
        };
        log.append(Stream::Stdout, b"no room\n", &mut vec![]);
        assert!(log.lost() > 0);
        assert_eq!(log.size, 0);
    }
}
