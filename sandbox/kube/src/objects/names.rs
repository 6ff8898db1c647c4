//! How objects, labels and variables may be called.

/// The longest name of an object.
const SUBDOMAIN: usize = 253;
/// The longest label of a domain, which containers and namespaces are.
const LABEL: usize = 63;

/// What is wrong with a name of words and dashes, if anything.
pub(crate) fn label(name: &str) -> Result<(), String> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let edge = |b: Option<&u8>| b.is_some_and(|b| *b != b'-');
    let bytes = name.as_bytes();
    if name.len() > LABEL {
        return Err(format!("is longer than {LABEL} characters"));
    }
    if !bytes.iter().all(|b| inner(*b)) || !edge(bytes.first()) || !edge(bytes.last()) {
        return Err(format!(
            "\"{}\" is not made of lower case letters, digits and '-' with none of these at an end",
            printable(name)
        ));
    }
    Ok(())
}

/// The same of labels with dots between them.
pub(crate) fn subdomain(name: &str) -> Result<(), String> {
    if name.len() > SUBDOMAIN {
        return Err(format!("is longer than {SUBDOMAIN} characters"));
    }
    let bad = |_| {
        format!(
            "\"{}\" is not made of lower case letters, digits, '-' and '.', beginning and ending \
             with a letter or digit",
            printable(name)
        )
    };
    // A label of an object's name may be longer than one of the DNS.
    name.split('.')
        .try_for_each(|part| match part.len() > LABEL {
            true => part.as_bytes().chunks(LABEL).try_for_each(|chunk| {
                let text = str::from_utf8(chunk).unwrap_or("_");
                label(text.trim_matches('-'))
            }),
            false => label(part),
        })
        .map_err(bad)
}

/// The key of a label or an annotation: a name, perhaps with a domain before it.
pub(crate) fn qualified(key: &str) -> Result<(), String> {
    let (domain, name) = match key.split_once('/') {
        Some((domain, name)) => (Some(domain), name),
        None => (None, key),
    };
    domain.map_or(Ok(()), subdomain)?;
    match name.is_empty() || !is_word(name) {
        true => Err(format!("\"{}\" is not the name of a label", printable(key))),
        false => Ok(()),
    }
}

/// The value of a label: empty or a word.
pub(crate) fn label_value(value: &str) -> Result<(), String> {
    match value.is_empty() || is_word(value) {
        true => Ok(()),
        false => Err(format!(
            "\"{}\" is not a word of up to 63 letters, digits, '-', '_' and '.'",
            printable(value)
        )),
    }
}

fn is_word(text: &str) -> bool {
    let bytes = text.as_bytes();
    let inner = |b: &u8| b.is_ascii_alphanumeric() || b"-_.".contains(b);
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    text.len() <= LABEL && bytes.iter().all(inner) && edge(bytes.first()) && edge(bytes.last())
}

/// The key of a ConfigMap or a Secret, which becomes the name of a file.
pub(crate) fn key(name: &str) -> Result<(), String> {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let good = !name.is_empty() && name.len() <= SUBDOMAIN && name.bytes().all(inner);
    match good && name != "." && !name.starts_with("..") {
        true => Ok(()),
        false => Err(format!(
            "\"{}\" is not made of letters, digits, '-', '_' and '.'",
            printable(name)
        )),
    }
}

/// The name of an environment variable.
pub(crate) fn variable(name: &str) -> Result<(), String> {
    let good = |b: u8| (b' '..=b'~').contains(&b) && b != b'=';
    match !name.is_empty() && name.bytes().all(good) {
        true => Ok(()),
        false => Err(format!(
            "\"{}\" is not the name of a variable",
            printable(name)
        )),
    }
}

/// Bytes of a stranger's for a message.
pub(crate) fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(80).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_other_text() {
        for good in ["a", "a-b", "0", &"a".repeat(63)] {
            assert!(label(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "A",
            "a_b",
            "a.b",
            "a/b",
            "..",
            &"a".repeat(64),
        ] {
            assert!(label(bad).is_err(), "{bad}");
        }
        for good in ["a.b", "kube-root-ca.crt", &"a".repeat(200)] {
            assert!(subdomain(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "a..b", "../a", "a/b", &"a".repeat(254)] {
            assert!(subdomain(bad).is_err(), "{bad}");
        }
        assert!(qualified("app.kubernetes.io/name").is_ok());
        assert!(qualified("a/b/c").is_err() && qualified("/a").is_err());
        assert!(label_value("").is_ok() && label_value("a b").is_err());
        assert!(key("a.b").is_ok() && key("../a").is_err() && key(".").is_err());
        assert!(variable("A B").is_ok() && variable("A=B").is_err());
    }
}
