//! The data of Secrets and the binary data of ConfigMaps, from their text. Called by `sources`.

/// The bytes of this text; nothing when it is none. Padding may be missing, lines may be broken.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end().trim_end_matches('=');
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let (mut bits, mut count) = (0_u32, 0);
    for byte in text.bytes().filter(|byte| !byte.is_ascii_whitespace()) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    // Six bits alone are no byte.
    (count < 6).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::decode;

    #[test]
    fn text_is_decoded_or_refused() {
        let text = |text: &str| decode(text).map(|bytes| String::from_utf8(bytes).unwrap());
        assert_eq!(text("").as_deref(), Some(""));
        assert_eq!(text("Zg==").as_deref(), Some("f"));
        assert_eq!(text("Zm8=").as_deref(), Some("fo"));
        assert_eq!(text("Zm9v\nYmFy\n").as_deref(), Some("foobar"));
        assert_eq!(decode("//8"), Some(vec![0xff, 0xff]));
        assert_eq!(decode("Zm9vY"), None);
        assert_eq!(decode("Z*=="), None);
    }
}
