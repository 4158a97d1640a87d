use std::io::Write;
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::*;

fn parse(text: &str) -> Result<String, String> {
    let document = Document::parse(text.as_bytes()).map_err(|error| error.to_string())?;
    Ok(document.text().to_owned())
}

fn utf16(text: &str, bytes_of: fn(u16) -> [u8; 2]) -> Vec<u8> {
    text.encode_utf16().flat_map(bytes_of).collect()
}

fn utf32(text: &str, bytes_of: fn(u32) -> [u8; 4]) -> Vec<u8> {
    text.chars().flat_map(|c| bytes_of(u32::from(c))).collect()
}

/// Documents of every kind that readers disagree on.
fn odd_documents() -> Vec<Vec<u8>> {
    let texts = [
        r#"{"a": NaN, "b": Infinity, "c": -Infinity, "d": 1e400, "e": -1e400}"#,
        r#"{"a": 12345678901234567890, "b": 0.1, "c": 1E+5, "d": -0, "e": -0.0, "f": 1e-400}"#,
        r#"{"a": 1, "a": 2, "b": {"c": 1, "c": [2]}, "\u0061": 3}"#,
        r#"{"a": "\ud800", "b": "\udc00\ud800", "c": "\ud83d\ude00", "\udfff": 1}"#,
        r#"["\ud800\u0041", "\ud800\\udc00", "\ud800x\udc00", "\uD83D\uDe0a"]"#,
        "\u{feff}{\"a\": 1}",
        "\u{feff}\u{feff}{}",
        " \t\r\n[ ]\n",
        "[\u{a0}]",
        "[1]\0",
        "\0",
        "",
        " ",
        "null",
        "NaN",
        "-Infinity",
        "-Inf",
        "nan",
        "-NaN",
        "+1",
        "01",
        "-01",
        "1.",
        ".5",
        "1e",
        "1e+",
        "1.5e3",
        "-",
        "0x10",
        "1_000",
        "\u{661}",
        "[1,]",
        "[,1]",
        "[1 2]",
        "{\"a\":1,}",
        "{,}",
        "{\"a\"}",
        "{\"a\" 1}",
        "{a: 1}",
        "{1: 1}",
        "{'a': 1}",
        "{\"a\": 1} x",
        "{\"a\": 1}{}",
        "[1] // note",
        "\"tab\there\"",
        "\"line\nhere\"",
        "\"\u{7f}\u{2028}\"",
        r#""\x41""#,
        r#""\'""#,
        r#""\u00e""#,
        r#""\u00e_""#,
        r#""\ud800\u00e""#,
        r#""\/\b\f\n\r\t\"\\""#,
        "\"open",
        "\"open\\",
        "\"open\\u00",
        "[[[[",
        "{\"a\":",
        "{\"a\":{",
        "tru",
        "truex",
        "true",
        "[true,false,null]",
        "{}",
        "[]",
        "[{},[],{\"a\":[]}]",
    ];
    let mut documents: Vec<Vec<u8>> = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    for text in [
        "{\"a\": \"é😀\"}",
        "1",
        "12",
        "[]",
        "\u{feff}{\"a\": 1}",
        "\u{feff}",
    ] {
        documents.extend([
            utf16(text, u16::to_le_bytes),
            utf16(text, u16::to_be_bytes),
            utf32(text, u32::to_le_bytes),
            utf32(text, u32::to_be_bytes),
        ]);
    }
    documents.extend([
        vec![b'"', 0xED, 0xA0, 0x80, b'"'],
        vec![b'"', b'\\', 0xED, 0xA0, 0x80, b'"'],
        vec![0xED, 0xA0, 0x80],
        vec![b'"', 0xFF, b'"'],
        vec![b'"', 0xC3, b'"'],
        vec![b'"', 0xED, 0xA0],
        vec![b'"', 0, 0, 0xD8, b'"', 0],
        vec![b'"', 0, 0, 0xD8, b'"', 0, 0],
        vec![0xFF, 0xFE, 0, 0, 0, 0, 0x11, 0],
        [b"{\"a\": \"".as_slice(), "é\"}".as_bytes()].concat(),
        b"9".repeat(4300),
        b"9".repeat(4301),
        [b"-".as_slice(), &b"9".repeat(4301)].concat(),
        [b"9".repeat(4301).as_slice(), b".0"].concat(),
        [b"[".repeat(900), b"]".repeat(900)].concat(),
        b"[".repeat(100_000),
        b"{\"a\":".repeat(100_000),
        [b"[".repeat(100_000), b"]".repeat(100_000)].concat(),
    ]);
    documents
}

#[test]
fn json_keeps_what_python_writes() {
    for text in [
        r#"{"a":NaN,"b":-Infinity,"c":1e400,"d":12345678901234567890,"e":0.10,"f":"\ud800 \u00e9 é"}"#,
        r#"{"a":1,"a":2}"#,
        r#""\/""#,
        "NaN",
    ] {
        assert_eq!(parse(text).as_deref(), Ok(text));
    }
    assert_eq!(
        parse(" {\n \"a\" :\t[ 1 , {} ] } ").unwrap(),
        r#"{"a":[1,{}]}"#
    );
    let raw_surrogate = Document::parse(b"\"\xED\xA0\x80\"").unwrap();
    assert_eq!(raw_surrogate.text(), r#""\ud800""#);
}

#[test]
fn json_of_every_encoding_is_read() {
    let text = "{\"a\":\"é😀\"}";
    let with_mark = format!("\u{feff}{text}");
    let encoded = [
        text.as_bytes().to_vec(),
        with_mark.as_bytes().to_vec(),
        utf16(text, u16::to_le_bytes),
        utf16(text, u16::to_be_bytes),
        utf16(&with_mark, u16::to_le_bytes),
        utf16(&with_mark, u16::to_be_bytes),
        utf32(text, u32::to_le_bytes),
        utf32(text, u32::to_be_bytes),
        utf32(&with_mark, u32::to_le_bytes),
        utf32(&with_mark, u32::to_be_bytes),
    ];
    for bytes in encoded {
        assert_eq!(Document::parse(&bytes).unwrap().text(), text, "{bytes:?}");
    }
}

#[test]
fn json_errors_name_the_place() {
    for (text, complaint) in [
        ("", "ends early: expected a value at line 1 column 1"),
        (
            "{\"a\": 1,\n  b}",
            "expected a key in double quotes at line 2 column 3",
        ),
        ("[1 2]", "expected `,` or `]` at line 1 column 4"),
        ("{\"a\"", "ends early: expected `:` at line 1 column 5"),
        ("[1.]", "expected `,` or `]` at line 1 column 3"),
        ("{} {}", "has more text after its end at line 1 column 4"),
        ("[\"a", "has a string without an end at line 1 column 2"),
        (
            r#"["\x"]"#,
            "has an invalid escape in a string at line 1 column 3",
        ),
        (
            "\"\t\"",
            "has a control character in a string at line 1 column 2",
        ),
    ] {
        assert_eq!(parse(text), Err(complaint.to_owned()), "{text}");
    }
    let error = Document::parse(b"{\"a\": \"\xFF\"}").unwrap_err();
    assert_eq!(error.to_string(), "is not UTF-8 at byte 7");
    let error = parse(&"[".repeat(1_000_000)).unwrap_err();
    assert!(
        error.starts_with("is nested more than 990 levels"),
        "{error}"
    );
    let error = parse(&"9".repeat(5000)).unwrap_err();
    assert!(error.contains("5000 digits"), "{error}");
}

#[test]
fn json_gives_the_last_value_of_a_key() {
    let document = Document::parse(br#"{"a":1,"\u0061":[NaN,"\ud800"],"b":{"a":3}}"#).unwrap();
    assert_eq!(
        document.get("a"),
        Some(serde_json::json!(["NaN", "\u{fffd}"]))
    );
    assert_eq!(document.get("b"), Some(serde_json::json!({"a": 3})));
    assert_eq!(document.get("c"), None);
    assert_eq!(Document::parse(b"[1]").unwrap().get("a"), None);
}

#[derive(Debug, PartialEq, Deserialize)]
struct Settings {
    width: usize,
    #[serde(default)]
    scale: Option<f64>,
}

#[test]
fn json_files_are_read_into_types() {
    let read = |text: &str| from_slice::<Settings>(text.as_bytes()).map_err(|e| e.to_string());
    let settings = |width, scale| Ok(Settings { width, scale });
    assert_eq!(
        read("\u{feff}{\"width\": 1, \"note\": -Infinity, \"width\": 2, \"scale\": 0.5}"),
        settings(2, Some(0.5))
    );
    assert_eq!(
        read(r#"{"width": 1, "scale": null, "n": 1e400}"#),
        settings(1, None)
    );
    let complaint = "\"scale\": invalid type: string \"-Infinity\", expected f64";
    assert_eq!(
        read(r#"{"width": 1, "scale": -Infinity}"#),
        Err(complaint.to_owned())
    );
    assert_eq!(read("{}"), Err("missing field `width`".to_owned()));
    let list = from_slice::<Settings>(b"[").unwrap_err().to_string();
    assert_eq!(list, "ends early: expected a value at line 1 column 2");
    let deep = "[".repeat(300) + &"]".repeat(300);
    let error = from_slice::<Value>(deep.as_bytes())
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("is nested more than 127 levels"),
        "{error}"
    );
}

#[test]
fn json_that_is_unreadable_is_quoted() {
    let bytes = Bytes::from_static(b"{\"a\": \xFF\n\xE9}");
    let unreadable = read_sample_json(&bytes).unwrap_err();
    assert_eq!(unreadable.quoted(), r#""{\"a\": \udcff\n\udce9}""#);
    assert_eq!(
        read_sample_json(&Bytes::new()).unwrap_err().quoted(),
        "\"\""
    );
    assert!(Document::parse(unreadable.quoted().as_bytes()).is_ok());
}

#[test]
fn json_never_panics_and_reads_what_it_writes() {
    let documents = odd_documents();
    let mut generator = fastrand::Rng::with_seed(3);
    for document in damaged(&documents, &mut generator, 4000)
        .iter()
        .chain(&documents)
    {
        if let Ok(read) = Document::parse(document) {
            let again = Document::parse(read.text().as_bytes());
            assert_eq!(again.as_ref(), Ok(&read));
            assert!(read.members().is_none_or(|members| members.count() < 1000));
        }
        drop(from_slice::<Value>(document));
    }
}

/// Documents with some bytes replaced, removed or repeated.
fn damaged(documents: &[Vec<u8>], generator: &mut fastrand::Rng, count: usize) -> Vec<Vec<u8>> {
    const PIECES: &[&str] = &[
        "\"", "\\", "{", "}", "[", "]", ",", ":", "0", "-", ".", "e", "NaN", "Infinity", "\\ud800",
        "\\udc00", "\\u", " ", "\n", "\u{feff}", "\0", "\"a\":", "true", "1e400",
    ];
    let short: Vec<_> = documents
        .iter()
        .filter(|document| document.len() < 200)
        .collect();
    let damage = |_| {
        let mut document = short[generator.usize(..short.len())].clone();
        for _ in 0..generator.usize(1..4) {
            let at = generator.usize(..=document.len());
            let end = (at + generator.usize(..3)).min(document.len());
            let piece: Vec<u8> = match generator.u8(..4) {
                0 => vec![generator.u8(..)],
                1 => Vec::new(),
                _ => PIECES[generator.usize(..PIECES.len())].into(),
            };
            document.splice(at..end, piece);
        }
        document
    };
    (0..count).map(damage).collect()
}

mod needs_python {
    use super::*;

    /// For each line, the hexadecimal digits of a document and of what coffey made of it (`-` if it was refused), prints the documents on
    /// which Python disagrees.
    const COMPARE: &str = r#"
import json, sys

def value(data):
    try:
        return repr(json.loads(data))
    except (ValueError, RecursionError):
        return None

for line in sys.stdin:
    document, read = line.rstrip("\n").split(" ")
    want = value(bytes.fromhex(document))
    got = None if read == "-" else value(bytes.fromhex(read))
    if read != "-" and got is None or want != got:
        print(bytes.fromhex(document)[:200], want, got)
    "#;

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python"]
    fn json_is_what_python_reads() {
        let python = std::env::var_os("COFFEY_PYTHON").expect("COFFEY_PYTHON is not set");
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut documents = odd_documents();
        let mut generator = fastrand::Rng::with_seed(7);
        documents.extend(damaged(&documents, &mut generator, 20_000));
        let lines = documents.iter().map(|document| {
            let read: String = match Document::parse(document) {
                Ok(read) => hex(read.text().as_bytes()),
                Err(_) => "-".to_owned(),
            };
            let document: String = hex(document);
            format!("{document} {read}\n")
        });
        let lines: String = lines.collect();
        let mut child = Command::new(python)
            .args(["-c", COMPARE])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        let different = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && different.is_empty(),
            "{different}"
        );
    }
}
