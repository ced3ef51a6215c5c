//! A list's bytes around the messages of its items, which the caller puts in: a list is never in memory twice.

use serde_json::Value;

use super::{Error, Field, Kind, MAGIC, message_of, type_meta, write};
use crate::gvk::Gvk;

/// What surrounds the items of an encoded list.
pub struct List {
    gvk: Gvk,
    /// The list's own fields.
    head: Vec<u8>,
    /// Number of the field `items`.
    items: u32,
}

impl List {
    /// What comes after the last item: the envelope's empty fields.
    pub const END: &[u8] = b"\x1a\0\"\0";

    /// `head` has kind, version and metadata.
    pub fn new(head: &Value) -> Result<Self, Error> {
        let gvk = Gvk::of(head);
        let message = message_of(&gvk)?;
        let field = message.fields().iter().find(|f| f.name == "items");
        let Some(Field { number, kind: Kind::Message(_), .. }) = field else {
            return Err(Error::NoMessage(gvk.to_string()));
        };
        let mut bytes = Vec::new();
        write::message(message, &head.into(), &mut bytes)?;
        Ok(Self { gvk, head: bytes, items: *number })
    }

    /// What comes before the first item, when all items with their [`Self::item_head`]s have so many bytes.
    pub fn start(&self, items: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.head.len() + 64);
        out.extend_from_slice(MAGIC);
        write::bytes(1, &type_meta(&self.gvk), &mut out);
        write::length(2, self.head.len() + items, &mut out);
        out.extend_from_slice(&self.head);
        out
    }

    /// What comes before an item's message of so many bytes.
    pub fn item_head(&self, message: usize, out: &mut Vec<u8>) {
        write::length(self.items, message, out);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::protobuf::{encode, encode_message};

    #[test]
    fn framed_items_are_the_list() {
        let item = |n: usize| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v".repeat(n)}});
        let items: Vec<_> = [0, 1, 100, 200, 70_000].map(item).to_vec();
        let mut value = json!({"apiVersion": "v1", "kind": "ConfigMapList", "metadata": {"resourceVersion": "5"}});
        let list = List::new(&value).unwrap();
        let mut framed = Vec::new();
        for item in &items {
            let message = encode_message(item).unwrap();
            list.item_head(message.len(), &mut framed);
            framed.extend(message);
        }
        value["items"] = items.into();
        assert_eq!([&list.start(framed.len())[..], &framed, List::END].concat(), encode(&value).unwrap());
        assert!(List::new(&json!({"apiVersion": "v1", "kind": "ConfigMap"})).is_err());
    }
}
