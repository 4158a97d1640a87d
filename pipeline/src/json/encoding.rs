//! The encodings that Python's `json.loads` detects: UTF-8, UTF-16 and UTF-32, with and without a byte order mark.

use super::JsonError;

const UTF8_MARK: &[u8] = &[0xEF, 0xBB, 0xBF];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Little,
    Big,
}

/// Code points of a document, without its byte order mark. Surrogates that form no pair are kept.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<u32>, JsonError> {
    use Order::{Big, Little};
    match bytes {
        [0, 0, 0xFE, 0xFF, rest @ ..] => utf32(rest, Big),
        [0xFF, 0xFE, 0, 0, rest @ ..] => utf32(rest, Little),
        [0xFE, 0xFF, rest @ ..] => utf16(rest, Big),
        [0xFF, 0xFE, rest @ ..] => utf16(rest, Little),
        _ if bytes.starts_with(UTF8_MARK) => utf8(&bytes[UTF8_MARK.len()..]),
        // A document begins with an ASCII character, whose zero bytes tell the encoding.
        [0, 0, _, _, ..] => utf32(bytes, Big),
        [0, _, _, _, ..] | [0, _] => utf16(bytes, Big),
        [_, 0, 0, 0, ..] => utf32(bytes, Little),
        [_, 0, _, _, ..] | [_, 0] => utf16(bytes, Little),
        _ => utf8(bytes),
    }
}

fn utf8(bytes: &[u8]) -> Result<Vec<u32>, JsonError> {
    let mut points = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(text) => {
                points.extend(text.chars().map(u32::from));
                return Ok(points);
            }
            Err(error) => {
                let (valid, invalid) = rest.split_at(error.valid_up_to());
                points.extend(String::from_utf8_lossy(valid).chars().map(u32::from));
                // A surrogate, which Python's "surrogatepass" accepts.
                let [0xED, second @ 0xA0..=0xBF, third @ 0x80..=0xBF, after @ ..] = invalid else {
                    let at = bytes.len() - invalid.len();
                    return Err(JsonError::named(format!("is not UTF-8 at byte {at}")));
                };
                points.push(0xD000 | u32::from(second & 0x3F) << 6 | u32::from(third & 0x3F));
                rest = after;
            }
        }
    }
}

fn utf16(bytes: &[u8], order: Order) -> Result<Vec<u32>, JsonError> {
    let (pairs, []) = bytes.as_chunks() else {
        return Err(JsonError::named("ends inside a character of UTF-16"));
    };
    let units = pairs.iter().map(|&pair| match order {
        Order::Little => u16::from_le_bytes(pair),
        Order::Big => u16::from_be_bytes(pair),
    });
    let point = |decoded: Result<char, std::char::DecodeUtf16Error>| match decoded {
        Ok(character) => u32::from(character),
        Err(lone) => u32::from(lone.unpaired_surrogate()),
    };
    Ok(char::decode_utf16(units).map(point).collect())
}

fn utf32(bytes: &[u8], order: Order) -> Result<Vec<u32>, JsonError> {
    let (quads, []) = bytes.as_chunks() else {
        return Err(JsonError::named("ends inside a character of UTF-32"));
    };
    let points = quads.iter().map(|&quad| match order {
        Order::Little => u32::from_le_bytes(quad),
        Order::Big => u32::from_be_bytes(quad),
    });
    let points: Vec<u32> = points.collect();
    match points
        .iter()
        .position(|&point| point > u32::from(char::MAX))
    {
        None => Ok(points),
        Some(at) => Err(JsonError::named(format!("is not UTF-32 at character {at}"))),
    }
}
