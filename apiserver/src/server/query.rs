//! Query parameters.

/// Decoded query parameters, in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    /// Parses a raw query string.
    pub(crate) fn parse(raw: &str) -> Self {
        let pairs = raw.split('&').filter(|p| !p.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(&key.replace('+', " ")), decode(&value.replace('+', " ")))
        });
        Self(pairs.collect())
    }

    /// First value of a parameter.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// First value of a parameter, or the empty string.
    pub(crate) fn text(&self, key: &str) -> &str {
        self.get(key).unwrap_or_default()
    }

    /// All values of a parameter.
    pub(crate) fn all(&self, key: &str) -> Vec<&str> {
        self.0.iter().filter(|(k, _)| k == key).map(|(_, v)| v.as_str()).collect()
    }

    /// Whether a parameter is there at all.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// A boolean as upstream reads them: present is true, but for `false` and `0`.
    pub(crate) fn flag(&self, key: &str) -> bool {
        !matches!(self.get(key), None | Some("false" | "0"))
    }

    /// An integer; the error is the text of Go's strconv.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<i64>, String> {
        match self.get(key) {
            None | Some("") => Ok(None),
            Some(text) => isopod_api::text::parse_int(text).map(Some),
        }
    }
}

/// Decodes percent escapes; a broken escape stays as it is.
pub(crate) fn decode(text: &str) -> String {
    if !text.contains('%') {
        return text.to_owned();
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[at], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters() {
        let query = Query::parse("labelSelector=a%3Db&watch&limit=x&dryRun=All&dryRun=&n=1+2&bad=%zz");
        assert_eq!(query.text("labelSelector"), "a=b");
        assert!(query.flag("watch") && !query.flag("missing") && !Query::parse("watch=false").flag("watch"));
        assert_eq!(query.integer("limit").unwrap_err(), "strconv.ParseInt: parsing \"x\": invalid syntax");
        assert_eq!(query.all("dryRun"), ["All", ""]);
        assert_eq!((query.text("n"), query.text("bad")), ("1 2", "%zz"));
    }
}
