//! The body of a plain list: the objects' own bytes, joined on the way out.

use std::{
    io::{self, Write},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{BufMut, Bytes, BytesMut};
use flate2::{Compression, write::GzEncoder};
use http::{HeaderValue, Response, header};
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use serde_json::Value;

use crate::{cache::Object, endpoints::Body, server::respond::with_type};

/// Bytes gathered per frame.
const CHUNK: usize = 64 * 1024;
/// Lists up to this size are sent in one piece.
const SMALL: usize = 128 * 1024;

/// A list response over stored objects.
pub(super) fn list(head: &Value, objects: Vec<Arc<Object>>, gzip: bool) -> Response<Body> {
    let mut prefix = serde_json::to_vec(head).unwrap_or_default();
    prefix.pop();
    prefix.extend_from_slice(b",\"items\":[");
    let items: usize = objects.iter().map(|o| o.bytes.len() - o.body_offset as usize + 2).sum();
    let length = prefix.len() + items.saturating_sub(usize::from(!objects.is_empty())) + 3;
    let mut list = List { prefix: Some(prefix), objects, at: 0, left: length };
    if length <= SMALL {
        let mut out = BytesMut::with_capacity(length);
        while list.fill(&mut out) {}
        return with_type(200, "application/json", out.freeze());
    }
    let body = if gzip {
        Zipped { list, encoder: Some(GzEncoder::new(Vec::new(), Compression::new(1))) }.boxed()
    } else {
        list.boxed()
    };
    let mut response = with_type(200, "application/json", Bytes::new());
    if gzip {
        response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        response.headers_mut().append(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    }
    *response.body_mut() = body;
    response
}

/// The joined objects, a chunk at a time.
struct List {
    prefix: Option<Vec<u8>>,
    objects: Vec<Arc<Object>>,
    at: usize,
    left: usize,
}

impl List {
    /// Appends a chunk; false at the end.
    fn fill(&mut self, out: &mut BytesMut) -> bool {
        if self.left == 0 {
            return false;
        }
        let start = out.len();
        if let Some(prefix) = self.prefix.take() {
            out.extend_from_slice(&prefix);
        }
        while out.len() - start < CHUNK && self.at < self.objects.len() {
            let object = &self.objects[self.at];
            if self.at > 0 {
                out.put_u8(b',');
            }
            out.put_u8(b'{');
            out.extend_from_slice(&object.bytes[object.body_offset as usize..]);
            self.at += 1;
        }
        if self.at == self.objects.len() {
            out.extend_from_slice(b"]}\n");
            self.left = 0;
        } else {
            self.left -= out.len() - start;
        }
        true
    }
}

impl HttpBody for List {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let mut out = BytesMut::with_capacity(CHUNK.min(self.left) + 16 * 1024);
        Poll::Ready(self.fill(&mut out).then(|| Ok(Frame::data(out.freeze()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left as u64)
    }
}

/// The same through gzip.
struct Zipped {
    list: List,
    encoder: Option<GzEncoder<Vec<u8>>>,
}

impl HttpBody for Zipped {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        loop {
            let mut out = BytesMut::new();
            let more = self.list.fill(&mut out);
            let Some(encoder) = &mut self.encoder else { return Poll::Ready(None) };
            let bytes = if more {
                encoder.write_all(&out).map(|()| std::mem::take(encoder.get_mut()))
            } else {
                self.encoder.take().map_or_else(|| Ok(Vec::new()), GzEncoder::finish)
            };
            match bytes {
                Ok(bytes) if bytes.is_empty() && more => {}
                Ok(bytes) => return Poll::Ready(Some(Ok(Frame::data(bytes.into())))),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{cache::Draft, registry::strategy::Generic};

    #[tokio::test]
    async fn lengths_are_exact() {
        for count in [0, 1, 3, 2000] {
            let objects: Vec<_> = (0..count)
                .map(|i| {
                    let value = json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": format!("n{i}")},
                        "data": {"k": "v".repeat(200)}});
                    Arc::new(Draft::new(value, &Generic).finish(i))
                })
                .collect();
            let response = list(&json!({"kind": "ConfigMapList", "metadata": {}}), objects, false);
            let hint = response.body().size_hint().exact();
            let bytes = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(hint, Some(bytes.len() as u64), "{count}");
            let parsed: Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(parsed["items"].as_array().unwrap().len(), count as usize);
        }
    }
}
