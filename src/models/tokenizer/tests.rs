use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::weights::read_json;
use super::*;

fn quickstart() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart/teacher/tokenizer")
}

/// The vocabulary of the quickstart with other files besides.
fn folder(files: &[(&str, Value)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["vocab.json", "merges.txt"] {
        std::fs::copy(quickstart().join(name), folder.path().join(name)).unwrap();
    }
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    folder
}

/// `tokenizer.json` of the quickstart, as `tokenizers` writes it.
fn whole() -> Value {
    let tokenizer = ClipTokenizer::load(&quickstart()).unwrap().tokenizer;
    serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap()
}

fn load(folder: &TempDir) -> ClipTokenizer {
    ClipTokenizer::load(folder.path()).unwrap()
}

#[track_caller]
fn refused(files: &[(&str, Value)], names: &[&str]) {
    let error = ClipTokenizer::load(folder(files).path()).unwrap_err();
    let error = error.to_string();
    for name in names {
        assert!(error.contains(name), "{name}: {error}");
    }
}

fn ids(tokenizer: &ClipTokenizer, caption: &str) -> Vec<u32> {
    tokenizer.encode(caption).unwrap().ids
}

#[test]
fn tokenizer_file_gives_the_ids_of_vocabulary_and_merges() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer.json");
    let golden: Vec<(String, Vec<u32>)> = read_json(&golden).unwrap();
    let saved = folder(&[("tokenizer.json", whole())]);
    // `tokenizer.json` counts, and suffices.
    std::fs::write(saved.path().join("merges.txt"), "").unwrap();
    let both = load(&saved);
    std::fs::remove_file(saved.path().join("vocab.json")).unwrap();
    let alone = load(&saved);
    for (caption, expected) in &golden {
        assert_eq!(&ids(&both, caption), expected, "{caption:?}");
        assert_eq!(&ids(&alone, caption), expected, "{caption:?}");
    }
    assert_eq!(alone.tokens(), 1770);
}

#[test]
fn added_tokens_are_found_in_captions() {
    let plain = load(&folder(&[]));
    let added = ("added_tokens.json", json!({"<cat-toy>": 1770}));
    let inversion = load(&folder(std::slice::from_ref(&added)));
    let mut with_token = whole();
    let mut token = with_token["added_tokens"][0].clone();
    (token["content"], token["id"]) = ("<cat-toy>".into(), 1770.into());
    let tokens = with_token["added_tokens"].as_array_mut().unwrap();
    tokens.push(token);
    let saved = load(&folder(&[("tokenizer.json", with_token)]));
    let caption = "a <cat-toy> apple";
    for tokenizer in [&inversion, &saved] {
        assert_eq!(tokenizer.tokens(), 1771);
        assert!(ids(tokenizer, caption).contains(&1770));
        assert_eq!(ids(tokenizer, "a red apple"), ids(&plain, "a red apple"));
    }
    // transformers 5 reads neither beside `added_tokens_decoder`.
    let decoder = ("tokenizer_config.json", json!({"added_tokens_decoder": {}}));
    let ignored = load(&folder(&[added, decoder]));
    assert_eq!(ids(&ignored, caption), ids(&plain, caption));
}

#[test]
fn rows_other_than_tokens_are_refused() {
    let tokenizer = load(&folder(&[]));
    tokenizer.check_embeddings(1770).unwrap();
    let error = tokenizer.check_embeddings(1771).unwrap_err().to_string();
    for part in ["1770", "1771", "added_tokens.json", "added_tokens_decoder"] {
        assert!(error.contains(part), "{error}");
    }
    let error = tokenizer.check_embeddings(1000).unwrap_err().to_string();
    assert!(error.contains("1770") && error.contains("1000"), "{error}");
}

#[test]
fn ids_that_added_tokens_can_not_have_are_refused() {
    for id in [1771, 0] {
        refused(
            &[("added_tokens.json", json!({"<cat-toy>": id}))],
            &["added_tokens.json", "<cat-toy>", &id.to_string(), "1770"],
        );
    }
    refused(
        &[("added_tokens.json", json!({"<a>": 1770, "<b>": 1770}))],
        &["added_tokens.json", "<a>", "<b>", "1770"],
    );
    refused(
        &[("added_tokens.json", json!({"<a>": "1770"}))],
        &["added_tokens.json", "<a>"],
    );
}

#[test]
fn tokenizers_of_other_kinds_are_refused() {
    let altered = |path: &str, value: Value| {
        let mut file = whole();
        *file.pointer_mut(path).unwrap() = value;
        [("tokenizer.json", file)]
    };
    for (path, value, name) in [
        ("/model/type", json!("WordPiece"), "WordPiece"),
        (
            "/model/end_of_word_suffix",
            Value::Null,
            "end_of_word_suffix",
        ),
        ("/model/dropout", json!(0.1), "dropout"),
        ("/normalizer", Value::Null, "normalizer"),
        ("/normalizer/normalizers/0", json!({"type": "NFKC"}), "NFKC"),
        ("/normalizer", json!({"type": "Odd"}), "Odd"),
        (
            "/pre_tokenizer",
            json!({"type": "Whitespace"}),
            "pre_tokenizer",
        ),
        (
            "/pre_tokenizer/pretokenizers/1/add_prefix_space",
            json!(true),
            "add_prefix_space",
        ),
        ("/model/merges/0", json!("a b c"), "a b c"),
        ("/model/merges/0", json!(["a", "nothing"]), "nothing"),
    ] {
        refused(&altered(path, value), &["tokenizer.json", name]);
    }
    let left = json!({"padding_side": "left"});
    refused(
        &[("tokenizer_config.json", left)],
        &["tokenizer_config.json", "padding_side", "left", "right"],
    );
    let error = ClipTokenizer::load(tempfile::tempdir().unwrap().path()).unwrap_err();
    let error = error.to_string();
    for name in ["tokenizer.json", "vocab.json", "merges.txt"] {
        assert!(error.contains(name), "{error}");
    }
}

/// Captions of about `length` bytes: one word or many, with what changes near a cut.
fn long_captions(length: usize) -> Vec<String> {
    let parts = [
        "a",
        "ab",
        "apple",
        "word ",
        "🍎",
        "苹果",
        "é",
        "e\u{301}",
        "\u{1112}\u{1161}\u{11ab}",
        "!",
        "!a",
        "1",
        "'s",
        "<|endoftext|>",
        "<|endof",
        "<cat-toy>",
        "Two  Words",
        "İ",
        "\u{212b}",
        "a\u{316}\u{301}",
    ];
    let mut captions: Vec<String> = parts
        .iter()
        .map(|part| part.repeat(length / part.len()))
        .collect();
    let blank = "\u{3000}\n ".repeat(length / 5);
    captions.push(format!("a{blank}b"));
    captions.push(format!("{blank}two  words{blank}<cat-toy>{blank}"));
    captions.push(blank);
    captions
}

#[test]
fn long_captions_have_the_ids_of_the_whole_text() {
    let added = json!({"<cat-toy>": 1770, "two  words": 1771});
    let mut tokenizer = load(&folder(&[("added_tokens.json", added)]));
    let captions = long_captions(300_000);
    let cut: Vec<_> = captions
        .iter()
        .map(|caption| tokenizer.encode(caption).unwrap())
        .collect();
    let kept = |tokenizer: &ClipTokenizer| -> Vec<usize> {
        captions
            .iter()
            .map(|caption| tokenizer.reach.cut(caption).len())
            .collect()
    };
    let most = kept(&tokenizer).into_iter().max().unwrap();
    assert!(most < 200_000, "{most}");
    tokenizer.reach = Reach::whole();
    assert!(kept(&tokenizer).iter().all(|&kept| kept > 250_000));
    for (caption, cut) in captions.iter().zip(cut) {
        let begin: String = caption.chars().take(20).collect();
        assert!(cut == tokenizer.encode(caption).unwrap(), "{begin:?}…");
    }
}

#[test]
fn captions_of_many_megabytes_are_tokenized() {
    let tokenizer = load(&folder(&[]));
    for (part, truncated) in [
        ("apple", true),
        ("word ", true),
        ("🍎", true),
        ("\t ", false),
    ] {
        let caption = part.repeat(30_000_000 / part.len());
        let encoded = tokenizer.encode(&caption).unwrap();
        assert_eq!((encoded.ids.len(), encoded.truncated), (77, truncated));
    }
}

#[test]
fn captions_are_truncated_beyond_75_tokens() {
    let tokenizer = load(&folder(&[]));
    for (count, truncated) in [(0, false), (75, false), (76, true), (10_000, true)] {
        let encoded = tokenizer.encode(&"! ".repeat(count)).unwrap();
        assert_eq!(encoded.truncated, truncated, "{count}");
        assert_eq!((encoded.ids.len(), encoded.ids[76]), (77, tokenizer.end));
    }
}

mod needs_python {
    use super::*;

    /// transformers gives the same ids for every form of a folder and every caption.
    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with transformers"]
    fn forms_of_tokenizers_give_transformers_ids() {
        let python = std::env::var_os("COFFEY_PYTHON")
            .expect("COFFEY_PYTHON is not set; README.md says how to run this test");
        let out = tempfile::tempdir().unwrap();
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/make_tokenizers.py");
        let made = std::process::Command::new(python)
            .args([script.as_path(), out.path()])
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let entries = out.path().read_dir().unwrap();
        let mut folders: Vec<PathBuf> = entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .collect();
        folders.sort();
        assert!(folders.len() > 15, "{folders:?}");
        for folder in folders {
            let name = folder.file_name().unwrap().to_str().unwrap();
            let tokenizer = ClipTokenizer::load(&folder).unwrap();
            let golden: Vec<(String, Vec<u32>)> =
                read_json(&out.path().join(format!("{name}.ids.json"))).unwrap();
            assert!(golden.len() > 400);
            for (caption, expected) in golden {
                assert_eq!(ids(&tokenizer, &caption), expected, "{name}: {caption:?}");
            }
        }
    }
}
