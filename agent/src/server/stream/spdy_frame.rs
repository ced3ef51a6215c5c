//! SPDY/3.1 frames: pure encoding and decoding, no I/O.
//!
//! A frame is eight bytes of header and a payload. The top bit of the first byte tells control frames from data:
//!
//! ```text
//! control: 1 version(15) | type(16) | flags(8) length(24) | payload      data: 0 stream(31) | flags(8) length(24) | bytes
//! ```
//!
//! Header blocks are zlib streams primed with a dictionary the protocol fixes; one compressor lives as long as its
//! direction of the connection, so frames have to be encoded and decoded in order, also those nobody wants.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// FIN: the sender will send no more on this stream.
const FLAG_FIN: u8 = 0x01;
const VERSION: u16 = 3;
/// Larger control frames are an attack, not a client.
const MAX_CONTROL: usize = 256 << 10;
/// Largest header block after decompression.
const MAX_HEADERS: usize = 256 << 10;
/// Adler-32 of the dictionary, as every SPDY/3 header stream carries it in its first bytes.
#[cfg(test)]
const DICTIONARY_ID: u32 = 0xe3c6_a7c2;

/// The words that open the dictionary, each preceded by its length in four bytes.
const WORDS: &[&str] = &[
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];

/// The rest of the dictionary, without lengths.
const TAIL: &str = concat!(
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505",
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized",
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable",
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT",
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,",
    "publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
);

fn dictionary() -> Vec<u8> {
    let mut out = Vec::with_capacity(1423);
    for word in WORDS {
        out.put_u32(word.len() as u32);
        out.put_slice(word.as_bytes());
    }
    out.put_slice(TAIL.as_bytes());
    out
}

/// Why a byte stream is not SPDY/3.1.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A frame that is too short for its type.
    #[error("truncated {0} frame")]
    Truncated(&'static str),
    /// Another version of the protocol.
    #[error("unsupported SPDY version {0}")]
    Version(u16),
    /// A frame or header block beyond the limits.
    #[error("{0} of {1} bytes is too large")]
    TooLarge(&'static str, usize),
    /// Headers that do not decompress.
    #[error("header block does not decompress")]
    Decompress(#[source] flate2::DecompressError),
    /// Headers that do not compress.
    #[error("header block does not compress")]
    Compress(#[source] flate2::CompressError),
}

/// Headers of a stream; names are lower-case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Headers(pub(crate) Vec<(String, String)>);

impl Headers {
    /// The value of a header, by its lower-case name.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// One frame. Data of a large frame is handed out in pieces; only the last carries `fin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Opens a stream.
    SynStream { id: u32, fin: bool, headers: Headers },
    /// Accepts a stream.
    SynReply { id: u32, fin: bool, headers: Headers },
    /// Aborts a stream.
    Reset { id: u32, status: u32 },
    /// Echo request or reply.
    Ping { id: u32 },
    /// The peer will open no more streams.
    GoAway { last: u32, status: u32 },
    /// More headers.
    Headers { id: u32, fin: bool },
    /// Payload.
    Data { id: u32, fin: bool, data: Bytes },
    /// SETTINGS, WINDOW_UPDATE and types we do not know: skipped. Kubernetes clients use no flow control.
    Ignored { kind: u16 },
}

/// Writes frames.
pub(crate) struct Encoder {
    zlib: Compress,
}

impl Encoder {
    /// A new connection's encoder.
    pub(crate) fn new() -> Result<Self, Error> {
        let mut zlib = Compress::new(Compression::fast(), true);
        zlib.set_dictionary(&dictionary()).map_err(Error::Compress)?;
        Ok(Self { zlib })
    }

    /// Appends the frame to `out`.
    pub(crate) fn encode(&mut self, frame: &Frame, out: &mut BytesMut) -> Result<(), Error> {
        match frame {
            Frame::SynStream { id, fin, headers } => {
                let block = self.compress(headers)?;
                control(out, 1, *fin, 10 + block.len());
                out.put_u32(*id);
                out.put_u32(0);
                out.put_u16(0);
                out.put_slice(&block);
            }
            Frame::SynReply { id, fin, headers } => {
                let block = self.compress(headers)?;
                control(out, 2, *fin, 4 + block.len());
                out.put_u32(*id);
                out.put_slice(&block);
            }
            Frame::Reset { id, status } => {
                control(out, 3, false, 8);
                out.put_u32(*id);
                out.put_u32(*status);
            }
            Frame::Ping { id } => {
                control(out, 6, false, 4);
                out.put_u32(*id);
            }
            Frame::GoAway { last, status } => {
                control(out, 7, false, 8);
                out.put_u32(*last);
                out.put_u32(*status);
            }
            Frame::Data { id, fin, data } => {
                data_header(out, *id, *fin, data.len());
                out.put_slice(data);
            }
            Frame::Headers { .. } | Frame::Ignored { .. } => {}
        }
        Ok(())
    }

    fn compress(&mut self, headers: &Headers) -> Result<Vec<u8>, Error> {
        let mut plain = Vec::new();
        plain.put_u32(headers.0.len() as u32);
        for (name, value) in &headers.0 {
            plain.put_u32(name.len() as u32);
            plain.put_slice(name.as_bytes());
            plain.put_u32(value.len() as u32);
            plain.put_slice(value.as_bytes());
        }
        let mut out = Vec::with_capacity(plain.len() + 64);
        let mut done = 0;
        // A sync flush is complete when the compressor leaves room in the output.
        loop {
            out.reserve(256);
            let before = self.zlib.total_in();
            self.zlib.compress_vec(&plain[done..], &mut out, FlushCompress::Sync).map_err(Error::Compress)?;
            done += (self.zlib.total_in() - before) as usize;
            if done == plain.len() && out.len() < out.capacity() {
                return Ok(out);
            }
        }
    }
}

fn control(out: &mut BytesMut, kind: u16, fin: bool, length: usize) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u32(length as u32 | if fin { u32::from(FLAG_FIN) << 24 } else { 0 });
}

fn data_header(out: &mut BytesMut, id: u32, fin: bool, length: usize) {
    out.put_u32(id & 0x7fff_ffff);
    out.put_u32(length as u32 | if fin { u32::from(FLAG_FIN) << 24 } else { 0 });
}

/// A data frame whose rest is still to come.
#[derive(Debug)]
struct Partial {
    id: u32,
    fin: bool,
    left: usize,
}

/// Reads frames from bytes as they come.
pub(crate) struct Decoder {
    zlib: Decompress,
    dictionary: Vec<u8>,
    partial: Option<Partial>,
}

impl Decoder {
    /// A new connection's decoder.
    pub(crate) fn new() -> Self {
        Self { zlib: Decompress::new(true), dictionary: dictionary(), partial: None }
    }

    /// Takes the next frame off the front of `buf`; `None` when more bytes are needed.
    pub(crate) fn decode(&mut self, buf: &mut BytesMut) -> Result<Option<Frame>, Error> {
        if let Some(partial) = self.partial.take() {
            return Ok(self.piece(partial, buf));
        }
        if buf.len() < 8 {
            return Ok(None);
        }
        let first = u32::from_be_bytes([buf[0], buf[1], buf[2], buf[3]]);
        let flags = buf[4];
        let length = u32::from_be_bytes([0, buf[5], buf[6], buf[7]]) as usize;
        if first & 0x8000_0000 == 0 {
            buf.advance(8);
            return Ok(self.piece(Partial { id: first, fin: flags & FLAG_FIN != 0, left: length }, buf));
        }
        let version = (first >> 16) as u16 & 0x7fff;
        if version != VERSION {
            return Err(Error::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(Error::TooLarge("control frame", length));
        }
        if buf.len() < 8 + length {
            return Ok(None);
        }
        buf.advance(8);
        let payload = buf.split_to(length).freeze();
        self.control(first as u16, flags & FLAG_FIN != 0, payload).map(Some)
    }

    /// Hands out what is there of a data frame.
    fn piece(&mut self, mut partial: Partial, buf: &mut BytesMut) -> Option<Frame> {
        if buf.is_empty() && partial.left > 0 {
            self.partial = Some(partial);
            return None;
        }
        let data = buf.split_to(partial.left.min(buf.len())).freeze();
        partial.left -= data.len();
        let (id, fin) = (partial.id, partial.fin && partial.left == 0);
        if partial.left > 0 {
            self.partial = Some(partial);
        }
        Some(Frame::Data { id, fin, data })
    }

    fn control(&mut self, kind: u16, fin: bool, mut payload: Bytes) -> Result<Frame, Error> {
        let need =
            |payload: &Bytes, n: usize, what| if payload.len() < n { Err(Error::Truncated(what)) } else { Ok(()) };
        match kind {
            1 => {
                need(&payload, 10, "SYN_STREAM")?;
                let id = payload.get_u32() & 0x7fff_ffff;
                payload.advance(6);
                Ok(Frame::SynStream { id, fin, headers: self.headers(&payload)? })
            }
            2 => {
                need(&payload, 4, "SYN_REPLY")?;
                let id = payload.get_u32() & 0x7fff_ffff;
                Ok(Frame::SynReply { id, fin, headers: self.headers(&payload)? })
            }
            3 => {
                need(&payload, 8, "RST_STREAM")?;
                Ok(Frame::Reset { id: payload.get_u32() & 0x7fff_ffff, status: payload.get_u32() })
            }
            6 => {
                need(&payload, 4, "PING")?;
                Ok(Frame::Ping { id: payload.get_u32() })
            }
            7 => {
                need(&payload, 8, "GOAWAY")?;
                Ok(Frame::GoAway { last: payload.get_u32() & 0x7fff_ffff, status: payload.get_u32() })
            }
            8 => {
                need(&payload, 4, "HEADERS")?;
                let id = payload.get_u32() & 0x7fff_ffff;
                self.headers(&payload)?;
                Ok(Frame::Headers { id, fin })
            }
            kind => Ok(Frame::Ignored { kind }),
        }
    }

    fn headers(&mut self, block: &[u8]) -> Result<Headers, Error> {
        let plain = self.decompress(block)?;
        let mut rest = plain.as_slice();
        let text = |limit: &mut &[u8]| -> Result<String, Error> {
            if limit.len() < 4 {
                return Err(Error::Truncated("header block"));
            }
            let length = limit.get_u32() as usize;
            if limit.len() < length {
                return Err(Error::Truncated("header block"));
            }
            let (head, tail) = limit.split_at(length);
            *limit = tail;
            Ok(String::from_utf8_lossy(head).into_owned())
        };
        if rest.len() < 4 {
            return Err(Error::Truncated("header block"));
        }
        let count = rest.get_u32() as usize;
        let mut headers = Vec::new();
        for _ in 0..count {
            let name = text(&mut rest)?.to_ascii_lowercase();
            headers.push((name, text(&mut rest)?));
        }
        Ok(Headers(headers))
    }

    fn decompress(&mut self, block: &[u8]) -> Result<Vec<u8>, Error> {
        let mut out = Vec::with_capacity(1024);
        let mut done = 0;
        loop {
            if out.len() > MAX_HEADERS {
                return Err(Error::TooLarge("header block", out.len()));
            }
            out.reserve(1024);
            let (in_before, out_before) = (self.zlib.total_in(), out.len());
            let result = self.zlib.decompress_vec(&block[done..], &mut out, FlushDecompress::Sync);
            done += (self.zlib.total_in() - in_before) as usize;
            match result {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.zlib.set_dictionary(&self.dictionary).map_err(Error::Decompress)?;
                    continue;
                }
                Err(error) => return Err(Error::Decompress(error)),
                Ok(Status::StreamEnd) => return Ok(out),
                Ok(_) => {}
            }
            let full = out.len() == out.capacity();
            if !full && (done == block.len() || out.len() == out_before) {
                return Ok(out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        Headers(pairs.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect())
    }

    #[test]
    fn dictionary_is_the_protocols() {
        let mut zlib = Compress::new(Compression::fast(), true);
        assert_eq!(zlib.set_dictionary(&dictionary()).unwrap(), DICTIONARY_ID);
    }

    #[test]
    fn frames_survive_a_round_trip_byte_by_byte() {
        let frames = [
            Frame::SynStream { id: 1, fin: false, headers: headers(&[("streamtype", "error"), ("port", "80")]) },
            Frame::SynStream { id: 3, fin: true, headers: headers(&[("streamtype", "data"), ("requestid", "7")]) },
            Frame::SynReply { id: 1, fin: false, headers: Headers::default() },
            Frame::Ping { id: 5 },
            Frame::Reset { id: 3, status: 5 },
            Frame::GoAway { last: 3, status: 0 },
        ];
        let (mut encoder, mut decoder) = (Encoder::new().unwrap(), Decoder::new());
        let mut wire = BytesMut::new();
        for frame in &frames {
            encoder.encode(frame, &mut wire).unwrap();
        }
        let (mut buf, mut seen) = (BytesMut::new(), Vec::new());
        for byte in wire {
            buf.put_u8(byte);
            while let Some(frame) = decoder.decode(&mut buf).unwrap() {
                seen.push(frame);
            }
        }
        assert_eq!(seen, frames);
    }

    #[test]
    fn large_data_comes_in_pieces_and_ends_once() {
        let payload = Bytes::from(vec![7u8; 100_000]);
        let mut wire = BytesMut::new();
        Encoder::new().unwrap().encode(&Frame::Data { id: 9, fin: true, data: payload.clone() }, &mut wire).unwrap();
        let (mut decoder, mut buf, mut got, mut fins) = (Decoder::new(), BytesMut::new(), Vec::new(), 0);
        for chunk in wire.chunks(30_000) {
            buf.extend_from_slice(chunk);
            while let Some(Frame::Data { id, fin, data }) = decoder.decode(&mut buf).unwrap() {
                assert_eq!(id, 9);
                fins += usize::from(fin);
                got.extend_from_slice(&data);
            }
        }
        assert_eq!((got.len(), fins), (payload.len(), 1));
    }

    #[test]
    fn empty_fin_frame_is_delivered() {
        let mut wire = BytesMut::new();
        Encoder::new().unwrap().encode(&Frame::Data { id: 1, fin: true, data: Bytes::new() }, &mut wire).unwrap();
        let frame = Decoder::new().decode(&mut wire).unwrap();
        assert_eq!(frame, Some(Frame::Data { id: 1, fin: true, data: Bytes::new() }));
    }

    #[test]
    fn settings_and_window_updates_are_skipped() {
        let mut wire = BytesMut::new();
        control(&mut wire, 4, false, 4);
        wire.put_u32(0);
        control(&mut wire, 9, false, 8);
        wire.put_u64(0);
        let mut decoder = Decoder::new();
        assert_eq!(decoder.decode(&mut wire).unwrap(), Some(Frame::Ignored { kind: 4 }));
        assert_eq!(decoder.decode(&mut wire).unwrap(), Some(Frame::Ignored { kind: 9 }));
        assert_eq!(decoder.decode(&mut wire).unwrap(), None);
    }

    #[test]
    fn bad_frames_are_refused() {
        let mut decoder = Decoder::new();
        let mut http = BytesMut::from(&b"\x80\x02\x00\x01\x00\x00\x00\x00"[..]);
        assert!(matches!(decoder.decode(&mut http), Err(Error::Version(2))));
        let mut short = BytesMut::from(&b"\x80\x03\x00\x06\x00\x00\x00\x02\x00\x00"[..]);
        assert!(matches!(decoder.decode(&mut short), Err(Error::Truncated("PING"))));
        let mut huge = BytesMut::from(&b"\x80\x03\x00\x01\x00\xff\xff\xff"[..]);
        assert!(matches!(decoder.decode(&mut huge), Err(Error::TooLarge(..))));
        let mut garbage = BytesMut::from(&b"\x80\x03\x00\x02\x00\x00\x00\x08\x00\x00\x00\x01abcd"[..]);
        assert!(decoder.decode(&mut garbage).is_err());
    }
}
