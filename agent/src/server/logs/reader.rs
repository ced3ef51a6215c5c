//! Reads a log file and follows it.
//!
//! Following waits on inotify events of the file's directory (writes, and the renames of a rotation) and on the word that
//! the container has ended; nothing is polled. After a rotation the old file is read to its end before the new one begins.

use std::{
    io::{self, SeekFrom},
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

use bytes::Bytes;
use futures::StreamExt;
use inotify::{Inotify, WatchMask};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt},
    sync::mpsc,
};

use super::{Options, cri::Line};
use crate::server::LogSource;

const CHUNK: usize = 64 << 10;
/// A line longer than this is not the supervisor's work; it is passed over in pieces.
const MAX_LINE: usize = 1 << 20;

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The file.
    #[error("read {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    /// Its directory.
    #[error("watch {}: {source}", path.display())]
    Watch { path: PathBuf, source: io::Error },
}

/// The client has gone, or has all it asked for.
struct Done;

/// Copies the chosen part of the log to `out`; returns when that is done, the container has ended, or the client has gone.
pub(crate) async fn copy(
    mut source: LogSource,
    options: Options,
    out: mpsc::Sender<Result<Bytes, io::Error>>,
) -> Result<(), Error> {
    // The watch comes first, so that nothing written while reading goes unnoticed.
    let mut events = if options.follow { Some(watch(&source)?) } else { None };
    let mut file = Open::open(&source.path).await?;
    if let Some(tail) = options.tail {
        file.seek_tail(tail).await?;
    }
    let mut formatter = Formatter::new(options, out.clone());
    loop {
        let ended = !formatter.options.follow || has_ended(&source);
        if file.drain(&mut formatter).await?.is_err() {
            return Ok(());
        }
        if let Some(next) = file.successor().await {
            // What was written between the last read and the rotation.
            if file.drain(&mut formatter).await?.is_err() {
                return Ok(());
            }
            file = next;
            continue;
        }
        if ended {
            return Ok(());
        }
        let Some(events) = events.as_mut() else { return Ok(()) };
        // Every arm is cancel-safe; the loop looks at everything again whichever wins.
        tokio::select! {
            event = events.next() => if event.is_none() { return Ok(()) },
            _ = source.ended.changed() => {}
            () = out.closed() => return Ok(()),
        }
    }
}

fn has_ended(source: &LogSource) -> bool {
    // A dropped sender: whoever could say it has gone, so nothing more will come.
    *source.ended.borrow() || source.ended.has_changed().is_err()
}

fn watch(source: &LogSource) -> Result<inotify::EventStream<[u8; 4096]>, Error> {
    let directory = source.path.parent().unwrap_or(&source.path).to_path_buf();
    let open = || {
        let inotify = Inotify::init()?;
        inotify.watches().add(&directory, WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO)?;
        inotify.into_event_stream([0; 4096])
    };
    open().map_err(|source| Error::Watch { path: directory.clone(), source })
}

/// The file being read, with the bytes of a line whose end has not come yet.
struct Open {
    path: PathBuf,
    file: File,
    pending: Vec<u8>,
}

impl Open {
    async fn open(path: &std::path::Path) -> Result<Self, Error> {
        let file = File::open(path).await.map_err(|source| Error::File { path: path.to_path_buf(), source })?;
        Ok(Self { path: path.to_path_buf(), file, pending: Vec::new() })
    }

    fn error(&self) -> impl Fn(io::Error) -> Error + use<> {
        let path = self.path.clone();
        move |source| Error::File { path: path.clone(), source }
    }

    /// Moves to where the last `lines` lines begin, reading backwards.
    async fn seek_tail(&mut self, lines: u64) -> Result<(), Error> {
        let error = self.error();
        let end = self.file.seek(SeekFrom::End(0)).await.map_err(&error)?;
        if lines == 0 {
            return Ok(());
        }
        let (mut at, mut seen, mut buf) = (end, 0, vec![0; CHUNK]);
        while at > 0 {
            let from = at.saturating_sub(CHUNK as u64);
            let size = (at - from) as usize;
            self.file.seek(SeekFrom::Start(from)).await.map_err(&error)?;
            self.file.read_exact(&mut buf[..size]).await.map_err(&error)?;
            for (i, byte) in buf[..size].iter().enumerate().rev() {
                let position = from + i as u64;
                // The newline that ends the last line is not the beginning of another one.
                if *byte == b'\n' && position + 1 != end {
                    seen += 1;
                    if seen == lines {
                        self.file.seek(SeekFrom::Start(position + 1)).await.map_err(&error)?;
                        return Ok(());
                    }
                }
            }
            at = from;
        }
        self.file.seek(SeekFrom::Start(0)).await.map_err(&error)?;
        Ok(())
    }

    /// Formats all complete lines up to the end of the file.
    async fn drain(&mut self, formatter: &mut Formatter) -> Result<Result<(), Done>, Error> {
        let error = self.error();
        let mut buf = vec![0; CHUNK];
        loop {
            let n = self.file.read(&mut buf).await.map_err(&error)?;
            if n == 0 {
                return Ok(formatter.flush().await);
            }
            let mut rest = &buf[..n];
            while let Some(newline) = rest.iter().position(|byte| *byte == b'\n') {
                let (line, tail) = rest.split_at(newline);
                rest = &tail[1..];
                let full = if self.pending.is_empty() {
                    formatter.line(line)
                } else {
                    self.pending.extend_from_slice(line);
                    let full = formatter.line(&self.pending);
                    self.pending.clear();
                    full
                };
                if full.is_err() {
                    let _ = formatter.flush().await;
                    return Ok(Err(Done));
                }
            }
            if self.pending.len() < MAX_LINE {
                self.pending.extend_from_slice(rest);
            }
            if formatter.flush().await.is_err() {
                return Ok(Err(Done));
            }
        }
    }

    /// The file that has taken this one's name, if a rotation has happened.
    async fn successor(&self) -> Option<Self> {
        let ours = self.file.metadata().await.ok()?;
        let theirs = tokio::fs::metadata(&self.path).await.ok()?;
        if (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()) {
            return None;
        }
        Self::open(&self.path).await.ok()
    }
}

/// Filters lines and writes what the client sees.
struct Formatter {
    options: Options,
    out: mpsc::Sender<Result<Bytes, io::Error>>,
    buf: Vec<u8>,
    /// The previous line of each stream was partial, so the next one continues it and gets no time of its own.
    continues: [bool; 2],
    left: u64,
}

impl Formatter {
    fn new(options: Options, out: mpsc::Sender<Result<Bytes, io::Error>>) -> Self {
        let left = options.limit.unwrap_or(u64::MAX);
        Self { options, out, buf: Vec::new(), continues: [false; 2], left }
    }

    /// Adds one line of the file; `Err` when the byte limit is reached.
    fn line(&mut self, raw: &[u8]) -> Result<(), Done> {
        // A line in another format is a line somebody else has written into the file: skipped, as clients expect the format.
        let Some(line) = Line::parse(raw) else { return Ok(()) };
        if self.options.stream.is_some_and(|wanted| wanted != line.stream) {
            return Ok(());
        }
        if let Some(since) = self.options.since
            && line.timestamp().is_some_and(|time| time < since)
        {
            return Ok(());
        }
        let start = self.buf.len();
        let continues = &mut self.continues[line.stream as usize];
        if self.options.timestamps && !*continues {
            line.write_time(&mut self.buf);
            self.buf.push(b' ');
        }
        *continues = line.partial;
        self.buf.extend_from_slice(line.text);
        if !line.partial {
            self.buf.push(b'\n');
        }
        let added = (self.buf.len() - start) as u64;
        if added >= self.left {
            self.buf.truncate(start + self.left as usize);
            self.left = 0;
            return Err(Done);
        }
        self.left -= added;
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Done> {
        if self.buf.is_empty() {
            return Ok(());
        }
        let data = Bytes::from(std::mem::take(&mut self.buf));
        self.out.send(Ok(data)).await.map_err(|_| Done)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tokio::sync::watch;

    use super::*;

    fn record(stream: &str, tag: &str, second: u32, text: &str) -> String {
        format!("2026-11-21T10:00:{second:02}.000000000Z {stream} {tag} {text}\n")
    }

    struct Log {
        _dir: tempfile::TempDir,
        path: PathBuf,
        ended: watch::Sender<bool>,
    }

    impl Log {
        fn new(content: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("0.log");
            std::fs::write(&path, content).unwrap();
            Self { _dir: dir, path, ended: watch::channel(false).0 }
        }

        fn append(&self, text: &str) {
            std::fs::OpenOptions::new().append(true).open(&self.path).unwrap().write_all(text.as_bytes()).unwrap();
        }

        fn start(&self, options: Options) -> mpsc::Receiver<Result<Bytes, io::Error>> {
            let (tx, rx) = mpsc::channel(4);
            let source = LogSource { path: self.path.clone(), ended: self.ended.subscribe() };
            tokio::spawn(async move { copy(source, options, tx).await.unwrap() });
            rx
        }

        async fn read(&self, options: Options) -> String {
            collect(&mut self.start(options)).await
        }
    }

    async fn collect(rx: &mut mpsc::Receiver<Result<Bytes, io::Error>>) -> String {
        let mut all = Vec::new();
        while let Some(chunk) = rx.recv().await {
            all.extend_from_slice(&chunk.unwrap());
        }
        String::from_utf8(all).unwrap()
    }

    fn five() -> String {
        let mut text = String::new();
        for i in 1..=5 {
            text += &record(if i == 2 { "stderr" } else { "stdout" }, "F", i, &format!("line {i}"));
        }
        text
    }

    #[tokio::test]
    async fn parts_of_a_log() {
        let log = Log::new(&five());
        let all = "line 1\nline 2\nline 3\nline 4\nline 5\n";
        assert_eq!(log.read(Options::default()).await, all);
        let tail = |tail| Options { tail: Some(tail), ..Options::default() };
        assert_eq!(log.read(tail(2)).await, "line 4\nline 5\n");
        assert_eq!(log.read(tail(0)).await, "");
        assert_eq!(log.read(tail(5)).await, all);
        assert_eq!(log.read(tail(50)).await, all);
        let since = "2026-11-21T10:00:04Z".parse().ok();
        assert_eq!(log.read(Options { since, ..Options::default() }).await, "line 4\nline 5\n");
        assert_eq!(log.read(Options { limit: Some(9), ..Options::default() }).await, "line 1\nli");
        let stream = Some(super::super::cri::StreamKind::Stderr);
        assert_eq!(log.read(Options { stream, ..Options::default() }).await, "line 2\n");
        let timed = Options { timestamps: true, tail: Some(1), ..Options::default() };
        assert_eq!(log.read(timed).await, "2026-11-21T10:00:05.000000000Z line 5\n");
    }

    #[tokio::test]
    async fn partial_lines_are_joined() {
        let text = record("stdout", "P", 1, "begin ") + &record("stdout", "F", 2, "end") + "garbage\n";
        let log = Log::new(&text);
        let timed = Options { timestamps: true, ..Options::default() };
        assert_eq!(log.read(timed).await, "2026-11-21T10:00:01.000000000Z begin end\n");
    }

    #[tokio::test]
    async fn tail_works_across_chunks() {
        let long = "x".repeat(3 * CHUNK);
        let log = Log::new(&(record("stdout", "F", 1, "first") + &record("stdout", "F", 2, &long)));
        let got = log.read(Options { tail: Some(1), ..Options::default() }).await;
        assert_eq!(got, long + "\n");
    }

    #[tokio::test]
    async fn follow_sees_writes_and_rotation_and_ends_with_the_container() {
        let log = Log::new(&record("stdout", "F", 1, "one"));
        let mut rx = log.start(Options { follow: true, ..Options::default() });
        assert_eq!(rx.recv().await.unwrap().unwrap(), "one\n");
        // A line in two writes comes out once.
        let two = record("stdout", "F", 2, "two");
        log.append(&two[..40]);
        log.append(&two[40..]);
        assert_eq!(rx.recv().await.unwrap().unwrap(), "two\n");
        std::fs::rename(&log.path, log.path.with_extension("log.old")).unwrap();
        std::fs::write(&log.path, record("stdout", "F", 3, "three")).unwrap();
        assert_eq!(rx.recv().await.unwrap().unwrap(), "three\n");
        log.append(&record("stdout", "F", 4, "last"));
        log.ended.send(true).unwrap();
        assert_eq!(collect(&mut rx).await, "last\n");
    }

    #[tokio::test]
    async fn follow_of_an_ended_container_ends() {
        let log = Log::new(&five());
        log.ended.send_replace(true);
        let tail = Options { follow: true, tail: Some(1), ..Options::default() };
        assert_eq!(log.read(tail).await, "line 5\n");
    }
}
