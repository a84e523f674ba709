//! The data: one JSON document, replaced or merged by the host, read in parts by the guest.
//!
//! Writers make a new document and swap it in; readers hold the one they found. So a guest
//! sees a document before a change or after it, never in between, and nobody waits while
//! another one's answer is being written out.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::{Map, Value};

use super::MmdsError;

/// How a guest wants a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// As it is in the document.
    Json,
    /// Strings as they are, objects as a list of their keys.
    Imds,
}

/// Why a guest gets no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoValue {
    /// There is nothing of that name.
    Missing,
    /// It is neither a string nor an object, and only these can be listed.
    NotListable,
}

/// The document and its bound.
#[derive(Debug)]
pub(super) struct Store {
    /// Bytes the document may have when written without white space.
    limit: usize,
    /// Nothing until the first put.
    document: Mutex<Option<Arc<Value>>>,
}

impl Store {
    pub(super) fn new(limit: usize) -> Store {
        Store { limit, document: Mutex::new(None) }
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Replaces the document.
    pub(super) fn put(&self, document: Value) -> Result<(), MmdsError> {
        self.check(&document)?;
        *self.lock() = Some(Arc::new(document));
        Ok(())
    }

    /// Merges `patch` into the document (RFC 7396). Refused without effect when the result
    /// would be too large.
    pub(super) fn patch(&self, patch: Value) -> Result<(), MmdsError> {
        let mut place = self.lock();
        let Some(old) = &*place else { return Err(MmdsError::Uninitialized) };
        let mut document = Value::clone(old);
        merge(&mut document, patch);
        self.check(&document)?;
        *place = Some(Arc::new(document));
        Ok(())
    }

    /// The whole document.
    pub(super) fn get(&self) -> Option<Arc<Value>> {
        self.lock().clone()
    }

    /// The value at `path` (RFC 6901, one slash at the end being ignored), written out.
    pub(super) fn read(&self, path: &str, format: Format) -> Result<String, NoValue> {
        let document = self.get().unwrap_or_default();
        let value = document.pointer(path.strip_suffix('/').unwrap_or(path)).ok_or(NoValue::Missing)?;
        match (format, value) {
            (Format::Json, value) => Ok(value.to_string()),
            (Format::Imds, Value::String(text)) => Ok(text.clone()),
            (Format::Imds, Value::Object(map)) => Ok(list(map)),
            (Format::Imds, _) => Err(NoValue::NotListable),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Value>>> {
        self.document.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, document: &Value) -> Result<(), MmdsError> {
        let size = size(document);
        if size > self.limit { Err(MmdsError::TooLarge { size, limit: self.limit }) } else { Ok(()) }
    }
}

/// The keys of an object, one a line, those of further objects with a slash.
fn list(map: &Map<String, Value>) -> String {
    let lines: Vec<String> =
        map.iter().map(|(key, value)| format!("{key}{}", if value.is_object() { "/" } else { "" })).collect();
    lines.join("\n")
}

/// RFC 7396: objects are merged key by key, a null takes its key away, all else replaces.
/// Recursion is bounded by the depth that the parser of `patch` allowed.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(map) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            map.remove(&key);
        } else {
            merge(map.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// Bytes of `value` written without white space, without writing them anywhere.
fn size(value: &Value) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // Counting cannot fail, and keys of a value are strings.
    let _ = serde_json::to_writer(&mut count, value);
    count.0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn store(limit: usize, document: Value) -> Store {
        let store = Store::new(limit);
        store.put(document).unwrap();
        store
    }

    #[test]
    fn a_patch_follows_every_example_of_the_standard() {
        // RFC 7396, appendix A.
        for (original, patch, result) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (json!({"a":"b","b":"c"}), json!({"a":null}), json!({"b":"c"})),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
            (json!({"a":{"b":"c"}}), json!({"a":{"b":"d","c":null}}), json!({"a":{"b":"d"}})),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"b"}), json!(["c"]), json!(["c"])),
            (json!({"a":"foo"}), json!(null), json!(null)),
            (json!({"a":"foo"}), json!("bar"), json!("bar")),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (json!({}), json!({"a":{"bb":{"ccc":null}}}), json!({"a":{"bb":{}}})),
        ] {
            let store = store(1000, original);
            store.patch(patch.clone()).unwrap();
            assert_eq!(*store.get().unwrap(), result, "{patch}");
        }
    }

    #[test]
    fn a_patch_needs_something_to_change() {
        let store = Store::new(1000);
        assert!(matches!(store.patch(json!({"a": 1})), Err(MmdsError::Uninitialized)));
        assert!(store.get().is_none());
    }

    #[test]
    fn a_document_of_exactly_the_limit_fits_and_one_byte_more_does_not() {
        let store = Store::new(r#"{"a":"1234"}"#.len());
        store.put(json!({"a": "1234"})).unwrap();
        let error = store.put(json!({"a": "12345"})).unwrap_err();
        assert!(matches!(error, MmdsError::TooLarge { size: 13, limit: 12 }));
        assert_eq!(*store.get().unwrap(), json!({"a": "1234"}));
    }

    #[test]
    fn the_result_of_a_patch_is_bounded_and_a_refused_one_changes_nothing() {
        let store = store(30, json!({"a": "0123456789"}));
        assert!(store.patch(json!({"b": "0123456789"})).is_err());
        assert_eq!(*store.get().unwrap(), json!({"a": "0123456789"}));
        // What goes away makes room in the same change.
        store.patch(json!({"a": null, "b": "01234567890123456789"})).unwrap();
    }

    #[test]
    fn values_are_found_by_path() {
        let store = store(1000, json!({"a": {"b": ["x", {"c/d": 7}]}, "s": "text", "": {"": 1}}));
        for (path, value) in [
            ("/a/b/0", "\"x\""),
            ("/a/b/1/c~1d", "7"),
            ("/a/b/1/c~1d/", "7"),
            ("/s", "\"text\""),
            ("/a/b/1", "{\"c/d\":7}"),
        ] {
            assert_eq!(store.read(path, Format::Json).as_deref(), Ok(value), "{path}");
        }
        for path in ["/x", "/a/b/2", "/a/b/-1", "/s/x", "/a/b/00", "s", "/~", "/a//b"] {
            assert_eq!(store.read(path, Format::Json), Err(NoValue::Missing), "{path}");
        }
        assert!(store.read("/", Format::Json).unwrap().starts_with('{'));
    }

    #[test]
    fn a_listing_names_keys_in_order_and_marks_objects() {
        let store = store(1000, json!({"b": {"x": 1}, "a": "s", "c": [1], "d": null, "e": {}}));
        assert_eq!(store.read("/", Format::Imds).as_deref(), Ok("a\nb/\nc\nd\ne/"));
        assert_eq!(store.read("/a", Format::Imds).as_deref(), Ok("s"));
        assert_eq!(store.read("/e", Format::Imds).as_deref(), Ok(""));
        for path in ["/b/x", "/c", "/d"] {
            assert_eq!(store.read(path, Format::Imds), Err(NoValue::NotListable), "{path}");
        }
    }

    #[test]
    fn before_the_first_put_there_is_nothing_below_the_root() {
        let store = Store::new(10);
        assert_eq!(store.read("/latest", Format::Imds), Err(NoValue::Missing));
        assert_eq!(store.read("/", Format::Json).as_deref(), Ok("null"));
    }
}
