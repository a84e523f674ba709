//! "Did you mean": the closest known word to one that is not known.

/// The word of `known` closest to `word`, if one is close enough to be a likely slip: at most
/// a third of its letters differ (or two, for short words).
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).max(2);
    known
        .into_iter()
        .map(|k| (distance(&word.to_lowercase(), &k.to_lowercase()), k))
        .filter(|(d, _)| *d <= limit)
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k)
}

/// Turns a JSON decoder's error into a sentence for a person: where it is, and, for an
/// unknown field or value, the nearest one that exists.
pub fn explain_json(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let mut quoted = text.split('`').skip(1).step_by(2);
    let unknown = text.starts_with("unknown field") || text.starts_with("unknown variant");
    let hint = unknown.then(|| quoted.next().and_then(|word| nearest(word, quoted))).flatten();
    hint.map_or(text.clone(), |word| format!("{text}; did you mean `{word}`?"))
}

/// Edits that turn one word into the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let next = (diagonal + usize::from(ca != *cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_finds_its_word_and_nonsense_finds_none() {
        let known = ["vcpu_count", "mem_size_mib", "smt"];
        assert_eq!(nearest("vcpus_count", known), Some("vcpu_count"));
        assert_eq!(nearest("mem_size", known), None);
        assert_eq!(nearest("Smt", known), Some("smt"));
        assert_eq!(nearest("zebra", known), None);
    }
}
