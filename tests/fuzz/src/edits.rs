//! Changes of a valid JSON document, two bytes each: which value, and what becomes of it.
//!
//! Letters that are changed one by one make text that is no JSON. Here every input is a document
//! that somebody who knows the format might send.

use serde_json::{Value, json};

/// Applies the edits in `bytes` to `document`.
pub fn edited(mut document: Value, bytes: &[u8]) -> Value {
    for edit in bytes.chunks_exact(2).take(32) {
        let count = size(&document);
        let donor = usize::from(edit[1] >> 1) % count;
        let copy = value_at(&mut document, &mut { donor }).cloned();
        if let Some(value) = value_at(&mut document, &mut (usize::from(edit[0]) % count)) {
            change(value, edit[1], copy.unwrap_or_default());
        }
    }
    document
}

/// Values of a document, those that hold others included.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(size).sum::<usize>(),
        Value::Object(fields) => fields.values().map(size).sum(),
        _ => 0,
    }
}

fn value_at<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(values) => values.iter_mut().find_map(|value| value_at(value, left)),
        Value::Object(fields) => fields.values_mut().find_map(|value| value_at(value, left)),
        _ => None,
    }
}

fn change(value: &mut Value, how: u8, copy: Value) {
    if how & 1 == 1 {
        // A document does not grow without end by copies of itself.
        if size(&copy) < 64 {
            *value = copy;
        }
        return;
    }
    *value = match (how >> 1) % 36 {
        0 => Value::Null,
        1 => json!(0),
        2 => json!(1),
        3 => json!(u64::MAX),
        4 => json!(i64::MIN),
        5 => json!(u32::MAX),
        6 => json!(1u64 << 32),
        7 => json!(1u64 << 63),
        8 => json!(4096),
        9 => json!(4095),
        10 => json!(65536),
        11 => json!(1u64 << 46),
        12 => json!(-1),
        13 => json!(0.5),
        14 => json!(1e300),
        15 => json!(""),
        16 => json!(".."),
        17 => json!("../../etc/passwd"),
        18 => json!("/"),
        19 => json!("memory"),
        20 => json!("\u{0}"),
        21 => json!("x".repeat(5000)),
        22 => json!([]),
        23 => json!({}),
        24 => json!(true),
        25 => json!(false),
        26 => json!("parent"),
        27 => json!("0".repeat(64)),
        28 => json!("f".repeat(32)),
        29 => json!("999999999999999999999"),
        30..=32 => moved(value, (how >> 1) % 36 - 29),
        33 => listed(value, |values| values.reverse()),
        34 => listed(value, |values| values.truncate(values.len() / 2)),
        _ => listed(value, |values| values.extend_from_within(..values.len().min(8))),
    };
}

/// A number a little off, or twice as much.
fn moved(value: &Value, how: u8) -> Value {
    let Some(number) = value.as_u64() else { return value.clone() };
    json!(match how {
        1 => number.wrapping_add(1),
        2 => number.wrapping_sub(1),
        _ => number.wrapping_mul(2),
    })
}

fn listed(value: &Value, how: fn(&mut Vec<Value>)) -> Value {
    match value {
        Value::Array(values) if values.len() < 64 => {
            let mut values = values.clone();
            how(&mut values);
            Value::Array(values)
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_can_be_reached_and_no_edit_is_the_document_itself() {
        let document = json!({ "a": [1, 2], "b": { "c": "text" } });
        assert_eq!(size(&document), 6);
        assert_eq!(edited(document.clone(), &[]), document);
        let zeroed = |at: u8| edited(document.clone(), &[at, 2]);
        assert_eq!(zeroed(0), json!(0));
        assert_eq!(zeroed(2), json!({ "a": [0, 2], "b": { "c": "text" } }));
        assert_eq!(zeroed(5), json!({ "a": [1, 2], "b": { "c": 0 } }));
    }
}
