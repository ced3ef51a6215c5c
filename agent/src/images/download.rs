//! Brings one blob to a file, which keeps what has come when the connection breaks: the next try goes on from there.

use std::path::Path;

use reqwest::{Response, StatusCode};
use sha2::{Digest as _, Sha256};
use tokio::{
    fs::{File, OpenOptions},
    io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt, BufWriter},
};

use super::{
    error::{Error, chain, store_error},
    pull::check,
    registry::Registry,
    store::Digest,
};

/// Most times that a download goes on after its connection broke, within one pull.
const CONTINUATIONS: usize = 5;

/// What is here of a blob.
struct Partly<'a> {
    path: &'a Path,
    /// What comes is in small pieces, and each write is a journey to another thread.
    file: BufWriter<File>,
    hash: Sha256,
    have: u64,
}

/// Brings a blob to `path`, going on where an earlier try ended, and verifies it.
pub(super) async fn download(there: &Registry, blob: &Digest, size: u64, path: &Path) -> Result<(), Error> {
    let name = there.name();
    let mut part = Partly::open(path).await?;
    for tries in 0.. {
        if part.have >= size && part.have > 0 {
            break;
        }
        let answer = there.blob(blob, part.have).await?;
        if answer.status() != StatusCode::PARTIAL_CONTENT {
            // It does not know ranges: from the beginning, then.
            part.begin_again().await?;
        }
        let before = part.have;
        match part.take(answer, size).await? {
            Came::All => break,
            Came::TooMuch => {
                let _ = std::fs::remove_file(path);
                let why = format!("{blob} is larger than the {size} bytes its manifest says");
                return Err(Error::Pull { name: name.to_owned(), why });
            }
            // What has come is kept: the next pull goes on from there.
            Came::Broken(why) if part.have == before || tries >= CONTINUATIONS => {
                return Err(Error::Pull { name: name.to_owned(), why: format!("download of {blob}: {why}") });
            }
            Came::Broken(why) => {
                tracing::info!(name, %blob, have = part.have, size, why, "the download broke off and goes on");
            }
        }
    }
    let actual = Digest::from_hash(part.hash.finalize().as_slice());
    check(&format!("blob of {name}"), blob, &actual).inspect_err(|_| {
        // Nothing of it is of use.
        let _ = std::fs::remove_file(path);
    })
}

/// How an answer ended.
enum Came {
    All,
    TooMuch,
    Broken(String),
}

impl<'a> Partly<'a> {
    /// What an earlier try has left, or nothing.
    async fn open(path: &'a Path) -> Result<Self, Error> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(path).await;
        let mut file = file.map_err(store_error("create", path))?;
        let (mut hash, mut have) = (Sha256::new(), 0);
        let mut buffer = vec![0; 256 << 10];
        loop {
            let n = file.read(&mut buffer).await.map_err(store_error("read", path))?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            have += n as u64;
        }
        Ok(Self { path, file: BufWriter::with_capacity(1 << 20, file), hash, have })
    }

    async fn begin_again(&mut self) -> Result<(), Error> {
        (self.have, self.hash) = (0, Sha256::new());
        self.file.get_mut().set_len(0).await.map_err(store_error("truncate", self.path))?;
        self.file.rewind().await.map_err(store_error("seek", self.path)).map(drop)
    }

    /// Takes what comes, up to the size that was announced: who sends more sends it without end.
    async fn take(&mut self, mut answer: Response, size: u64) -> Result<Came, Error> {
        let end = loop {
            let bytes = match answer.chunk().await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => break Came::All,
                Err(error) => break Came::Broken(chain(&error)),
            };
            self.hash.update(&bytes);
            self.have += bytes.len() as u64;
            if self.have > size {
                return Ok(Came::TooMuch);
            }
            let written = self.file.write_all(&bytes).await;
            // A full disk is not helped by keeping this.
            written.inspect_err(|_| drop(std::fs::remove_file(self.path))).map_err(store_error("write", self.path))?;
        };
        self.file.flush().await.map_err(store_error("write", self.path))?;
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        net::TcpListener,
    };

    use super::{
        super::{hosts::Endpoint, registry::http},
        *,
    };

    /// A registry with one blob, which sends only so many bytes on each connection; what it was asked for.
    fn registry(blob: Vec<u8>, each: usize, ranges: bool) -> (String, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let mut asked = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let head: Vec<String> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
                if head[0].contains("/stop") {
                    return asked;
                }
                let range = head.iter().find_map(|h| h.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
                let from = range.as_ref().filter(|_| ranges).map_or(0, |r| r.trim_end_matches('-').parse().unwrap());
                asked.push(range.unwrap_or_default());
                let status = if ranges { "206 Partial Content" } else { "200 OK" };
                let rest = &blob[from..];
                write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", rest.len())
                    .unwrap();
                stream.write_all(&rest[..rest.len().min(each)]).unwrap();
            }
        });
        (address, server)
    }

    async fn pulled(blob: &[u8], each: usize, ranges: bool, begun: &[u8]) -> (Result<Vec<u8>, String>, Vec<String>) {
        let (address, server) = registry(blob.to_vec(), each, ranges);
        let endpoint = Endpoint { host: address.clone(), plain: true, ..Endpoint::default() };
        let reference = "team/app:1".parse().unwrap();
        let there = Registry::new(http(&endpoint).unwrap(), &endpoint, "app:1", &reference, None);
        let digest = Digest::of(b"0123456789");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, begun).unwrap();
        let done = download(&there, &digest, 10, &path).await;
        let mut stop = std::net::TcpStream::connect(&address).unwrap();
        stop.write_all(b"GET /stop HTTP/1.1\r\n\r\n").unwrap();
        (done.map(|()| std::fs::read(&path).unwrap()).map_err(|e| e.to_string()), server.join().unwrap())
    }

    #[tokio::test]
    async fn a_download_goes_on_where_it_broke_off() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let blob = b"0123456789";
        let (done, asked) = pulled(blob, 4, true, b"").await;
        assert_eq!((done.unwrap().as_slice(), asked), (&blob[..], vec![String::new(), "4-".into(), "8-".into()]));
        // What an earlier pull, or an earlier agent, left is not fetched again.
        let (done, asked) = pulled(blob, 10, true, b"01234").await;
        assert_eq!((done.unwrap().as_slice(), asked), (&blob[..], vec!["5-".into()]));
        // A registry without ranges begins again; a beginning of something else is found out.
        let (done, _) = pulled(blob, 10, false, b"01").await;
        assert_eq!(done.unwrap(), blob);
        let (done, _) = pulled(blob, 10, true, b"xx").await;
        assert!(done.unwrap_err().contains("sha256"));
        let (done, _) = pulled(b"0123456789 and more", 30, true, b"").await;
        assert!(done.unwrap_err().contains("larger than"), "endless bodies are cut off");
    }
}
