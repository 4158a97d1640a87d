//! The vocabulary of a tokenizer's folder, in either of its two forms.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;

use super::super::ModelError;
use super::super::weights::read_json;
use super::special::ListedToken;
use super::{END_OF_WORD, TokenizerResult, WORDS, normalizer, pre_tokenizer};

const WHOLE: &str = "tokenizer.json";
const IDS: &str = "vocab.json";
const MERGES: &str = "merges.txt";
/// [`WORDS`] as transformers 4 writes it. Special tokens are found before a text is split into words, so both give the same ids.
const WORDS_OF_4: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Tokens with their ids, and the merges of byte pair encoding in the order of their rank.
pub(super) struct Vocabulary {
    /// The file of the ids.
    pub(super) file: &'static str,
    pub(super) ids: Vocab,
    pub(super) merges: Merges,
    /// `added_tokens` of `tokenizer.json`.
    pub(super) listed: Vec<ListedToken>,
    /// Sides of padding and truncation in `tokenizer.json`.
    pub(super) sides: [Option<String>; 2],
}

/// The parts of `tokenizer.json` that decide ids.
#[derive(Deserialize)]
struct TokenizerFile {
    model: Value,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    added_tokens: Vec<FileToken>,
    #[serde(default)]
    padding: Option<Side>,
    #[serde(default)]
    truncation: Option<Side>,
}

#[derive(Deserialize)]
struct FileToken {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct Side {
    #[serde(default)]
    direction: Option<String>,
}

#[derive(Deserialize)]
struct Pairs {
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
}

/// A merge as `tokenizers` writes it, and as versions before 0.20 do: with a space between its parts.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl Merge {
    fn parts(self) -> Result<(String, String), String> {
        match self {
            Self::Pair(left, right) => Ok((left, right)),
            Self::Line(line) => match line.split_once(' ') {
                Some((left, right)) if !right.contains(' ') => {
                    Ok((left.to_owned(), right.to_owned()))
                }
                _ => Err(line),
            },
        }
    }
}

impl Vocabulary {
    /// Reads `tokenizer.json`, else `vocab.json` and `merges.txt`.
    pub(super) fn read(folder: &Path) -> Result<Self, ModelError> {
        let whole = folder.join(WHOLE);
        if whole.exists() {
            let file: TokenizerFile = read_json(&whole)?;
            return Self::of_file(file).map_err(|message| ModelError::Config {
                path: whole,
                message,
            });
        }
        let invalid = |message: String| ModelError::Tokenizer {
            folder: folder.to_owned(),
            message,
        };
        for name in [IDS, MERGES] {
            if !folder.join(name).is_file() {
                return Err(invalid(format!(
                    "{name} is missing; a CLIP tokenizer has {WHOLE}, or {IDS} and {MERGES}"
                )));
            }
        }
        let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let read = BPE::read_file(&path(IDS), &path(MERGES));
        let (ids, merges) = read.map_err(|e| invalid(format!("{IDS} and {MERGES}: {e}")))?;
        Ok(Self {
            file: IDS,
            ids,
            merges,
            listed: Vec::new(),
            sides: [None, None],
        })
    }

    fn of_file(file: TokenizerFile) -> Result<Self, String> {
        file.check()?;
        let Pairs { vocab, merges } =
            serde_json::from_value(file.model).map_err(|e| format!("\"model\": {e}"))?;
        let merges = merges.into_iter().map(Merge::parts);
        let merges = merges.collect::<Result<_, _>>();
        let merges =
            merges.map_err(|line| format!("\"merges\": {line:?} is not a pair of tokens"))?;
        let listed = file.added_tokens.into_iter().map(|token| ListedToken {
            file: WHOLE,
            id: token.id,
            token: token.token,
        });
        let side = |side: Option<Side>| side.and_then(|side| side.direction);
        Ok(Self {
            file: WHOLE,
            ids: vocab.into_iter().collect(),
            merges,
            listed: listed.collect(),
            sides: [side(file.padding), side(file.truncation)],
        })
    }
}

impl TokenizerFile {
    /// Refuses a tokenizer that is not CLIP's. transformers' `CLIPTokenizer` takes only vocabulary, merges and added tokens from the
    /// file: with another normalizer its ids would not be the ones the file stands for.
    fn check(&self) -> Result<(), String> {
        let key = |key: &str| &self.model[key];
        // Files of early versions have no type.
        let model: [(&str, &[Value]); 6] = [
            ("type", &[Value::Null, "BPE".into()]),
            ("end_of_word_suffix", &[END_OF_WORD.into()]),
            ("continuing_subword_prefix", &[Value::Null, "".into()]),
            ("dropout", &[Value::Null]),
            ("byte_fallback", &[Value::Null, false.into()]),
            ("ignore_merges", &[Value::Null, false.into()]),
        ];
        for (name, known) in model {
            if !known.contains(key(name)) {
                let known: Vec<String> = known.iter().map(Value::to_string).collect();
                return Err(format!(
                    "\"model\": \"{name}\" is {}, but {} in a CLIP tokenizer",
                    key(name),
                    known.join(" or ")
                ));
            }
        }
        let clip = |e: tokenizers::Error| e.to_string();
        let normalizers = [canonical::<NormalizerWrapper>(&to_value(
            normalizer().map_err(clip)?,
        )?)];
        refuse_other::<NormalizerWrapper>("normalizer", &self.normalizer, &normalizers)?;
        let words = |words| -> TokenizerResult<Value> { Ok(to_value(pre_tokenizer(words)?)?) };
        let splits = [WORDS, WORDS_OF_4].map(|regex| {
            let value = words(regex).map_err(clip)?;
            Ok::<_, String>(canonical::<PreTokenizerWrapper>(&value))
        });
        let splits = splits.into_iter().collect::<Result<Vec<_>, _>>()?;
        refuse_other::<PreTokenizerWrapper>("pre_tokenizer", &self.pre_tokenizer, &splits)
    }
}

fn to_value(part: impl serde::Serialize) -> Result<Value, String> {
    serde_json::to_value(part).map_err(|e| e.to_string())
}

/// A part of a tokenizer as the current version writes it, without what does not change ids; `None` if no version knows it.
fn canonical<T: serde::de::DeserializeOwned + serde::Serialize>(part: &Value) -> Option<Value> {
    let part: T = serde_json::from_value(part.clone()).ok()?;
    let mut value = serde_json::to_value(part).ok()?;
    if let Some(Value::Array(parts)) = value.get_mut("pretokenizers") {
        for part in parts.iter_mut().filter_map(Value::as_object_mut) {
            part.remove("trim_offsets");
        }
    }
    Some(value)
}

/// Refuses a part of a tokenizer that is none of `known`, which are [`canonical`].
fn refuse_other<T: serde::de::DeserializeOwned + serde::Serialize>(
    key: &str,
    part: &Value,
    known: &[Option<Value>],
) -> Result<(), String> {
    let found = canonical::<T>(part);
    if found.is_some() && known.contains(&found) {
        return Ok(());
    }
    let clips = known.iter().flatten().next().map(Value::to_string);
    Err(format!(
        "\"{key}\" is not CLIP's: {part}; it should be {}",
        clips.unwrap_or_default()
    ))
}
