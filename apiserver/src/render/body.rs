//! The body of a list whose items are there as bytes: they are joined on the way out.

use std::{
    io::{self, Write},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    vec::IntoIter,
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::Response;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use isopod_api::protobuf;
use parking_lot::Mutex;
use serde_json::Value;

use crate::{
    cache::Object,
    endpoints::Body,
    server::respond::{self, GZIP_MINIMUM, Style},
};

/// Bytes gathered per frame.
const CHUNK: usize = 64 * 1024;

/// A list response.
pub(super) fn list(style: Style, items: Items) -> Response<Body> {
    let list = List::new(items);
    if list.left <= GZIP_MINIMUM {
        let mut list = list;
        let mut out = Vec::with_capacity(list.left);
        while list.fill(&mut out) {}
        return respond::with_type(200, style.accepted.media.content_type(), out);
    }
    let mut response = respond::with_type(200, style.accepted.media.content_type(), Bytes::new());
    *response.body_mut() = if style.gzip {
        respond::mark_zipped(response.headers_mut());
        Zipped { list, encoder: Some(GzEncoder::new(Vec::new(), Compression::new(1))) }.boxed()
    } else {
        list.boxed()
    };
    response
}

/// The items of a list that are still to go, and what is around them.
pub(super) enum Items {
    /// Stored objects, which begin with kind and version: as items they have none.
    Json { start: Vec<u8>, objects: IntoIter<Arc<Object>> },
    /// Encoded messages.
    Protobuf { list: protobuf::List, messages: IntoIter<Bytes> },
}

impl Items {
    /// Stored objects after the list's own members.
    pub(super) fn json(head: &Value, objects: Vec<Arc<Object>>) -> Self {
        let mut start = serde_json::to_vec(head).unwrap_or_default();
        start.pop();
        start.extend_from_slice(b",\"items\":[");
        Self::Json { start, objects: objects.into_iter() }
    }

    /// Messages in their list.
    pub(super) fn protobuf(list: protobuf::List, messages: Vec<Bytes>) -> Self {
        Self::Protobuf { list, messages: messages.into_iter() }
    }

    /// What comes before the first item, and how many bytes the whole list has.
    fn start(&mut self) -> (Vec<u8>, usize) {
        match self {
            Self::Json { start, objects } => {
                let start = std::mem::take(start);
                let items: usize = objects.as_slice().iter().map(|o| o.bytes.len() - o.body_offset as usize + 2).sum();
                let length = start.len() + items.saturating_sub(usize::from(objects.len() > 0));
                (start, length + JSON_END.len())
            }
            Self::Protobuf { list, messages } => {
                let mut head = Vec::new();
                let framed = messages.as_slice().iter().map(|message| {
                    head.clear();
                    list.item_head(message.len(), &mut head);
                    head.len() + message.len()
                });
                let items = framed.sum();
                let start = list.start(items);
                let length = start.len() + items + protobuf::List::END.len();
                (start, length)
            }
        }
    }

    /// Appends the next item; false when there is none.
    fn put(&mut self, first: bool, out: &mut Vec<u8>) -> bool {
        match self {
            Self::Json { objects, .. } => {
                let Some(object) = objects.next() else { return false };
                out.extend_from_slice(if first { "{" } else { ",{" }.as_bytes());
                out.extend_from_slice(&object.bytes[object.body_offset as usize..]);
            }
            Self::Protobuf { list, messages } => {
                let Some(message) = messages.next() else { return false };
                list.item_head(message.len(), out);
                out.extend_from_slice(&message);
            }
        }
        true
    }

    /// What comes after the last item.
    fn end(&self) -> &'static [u8] {
        match self {
            Self::Json { .. } => JSON_END,
            Self::Protobuf { .. } => protobuf::List::END,
        }
    }
}

const JSON_END: &[u8] = b"]}\n";

/// The joined items, a chunk at a time.
struct List {
    start: Option<Vec<u8>>,
    items: Items,
    left: usize,
    buffers: Buffers,
}

/// Buffers of chunks that were sent: a new one each time is new pages from the kernel each time.
#[derive(Default, Clone)]
struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

/// A chunk that is being sent.
struct Chunk {
    bytes: Vec<u8>,
    home: Buffers,
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.bytes.clear();
        self.home.0.lock().push(std::mem::take(&mut self.bytes));
    }
}

impl List {
    fn new(mut items: Items) -> Self {
        let (start, left) = items.start();
        Self { start: Some(start), items, left, buffers: Buffers::default() }
    }

    /// The next chunk, in a buffer that comes back.
    fn chunk(&mut self) -> Option<Chunk> {
        let spare = self.buffers.0.lock().pop();
        let mut bytes = spare.unwrap_or_else(|| Vec::with_capacity(CHUNK + 16 * 1024));
        self.fill(&mut bytes).then(|| Chunk { bytes, home: self.buffers.clone() })
    }

    /// Appends a chunk; false at the end.
    fn fill(&mut self, out: &mut Vec<u8>) -> bool {
        if self.left == 0 {
            return false;
        }
        let from = out.len();
        let mut first = false;
        if let Some(start) = self.start.take() {
            out.extend_from_slice(&start);
            first = true;
        }
        while out.len() - from < CHUNK {
            if !self.items.put(first, out) {
                out.extend_from_slice(self.items.end());
                self.left = 0;
                return true;
            }
            first = false;
        }
        self.left -= out.len() - from;
        true
    }
}

impl HttpBody for List {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        Poll::Ready(self.chunk().map(|chunk| Ok(Frame::data(Bytes::from_owner(chunk)))))
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
            let chunk = self.list.chunk();
            let Some(encoder) = &mut self.encoder else { return Poll::Ready(None) };
            let bytes = match &chunk {
                Some(chunk) => encoder.write_all(chunk.as_ref()).map(|()| std::mem::take(encoder.get_mut())),
                None => self.encoder.take().map_or_else(|| Ok(Vec::new()), GzEncoder::finish),
            };
            match bytes {
                Ok(bytes) if bytes.is_empty() && chunk.is_some() => {}
                Ok(bytes) => return Poll::Ready(Some(Ok(Frame::data(bytes.into())))),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;
    use serde_json::json;

    use super::*;
    use crate::{cache::Draft, registry::strategy::Generic, server::negotiate::Accepted};

    fn objects(count: u64) -> Vec<Arc<Object>> {
        let object = |i| {
            let value = json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": format!("n{i}")},
                "data": {"k": "v".repeat(200)}});
            Arc::new(Draft::new(value, &Generic).finish(i))
        };
        (0..count).map(object).collect()
    }

    async fn read(items: Items) -> Bytes {
        let response = list(Style { accepted: Accepted::JSON, pretty: false, gzip: false }, items);
        let hint = response.body().size_hint().exact();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(hint, Some(bytes.len() as u64));
        bytes
    }

    #[tokio::test]
    async fn compressed_it_is_the_same() {
        let items = || Items::json(&json!({"kind": "ConfigMapList", "metadata": {}}), objects(2000));
        let response = list(Style { accepted: Accepted::JSON, pretty: false, gzip: true }, items());
        assert_eq!(response.headers()["content-encoding"], "gzip");
        let zipped = response.into_body().collect().await.unwrap().to_bytes();
        let mut bytes = Vec::new();
        GzDecoder::new(&*zipped).read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, read(items()).await);
    }

    #[tokio::test]
    async fn lengths_are_exact() {
        for count in [0, 1, 3, 2000] {
            let bytes = read(Items::json(&json!({"kind": "ConfigMapList", "metadata": {}}), objects(count))).await;
            let parsed: Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(parsed["items"].as_array().unwrap().len(), count as usize);

            let head = json!({"kind": "ConfigMapList", "apiVersion": "v1", "metadata": {"resourceVersion": "5"}});
            let messages = objects(count).iter().map(|o| protobuf::encode_json(&o.bytes).unwrap().into()).collect();
            let bytes = read(Items::protobuf(protobuf::List::new(&head).unwrap(), messages)).await;
            assert_eq!(protobuf::decode(&bytes).unwrap()["items"].as_array().map_or(0, Vec::len), count as usize);
        }
    }
}
