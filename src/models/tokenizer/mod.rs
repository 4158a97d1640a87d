//! CLIP's tokenizer: captions to token ids, 77 by default.

mod reach;
mod special;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::path::{Path, PathBuf};

use serde_json::json;
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::{ModelError, fingerprint_text};
use reach::Reach;
use special::TokenizerConfig;
use vocabulary::Vocabulary;

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// Appended to the last token of a word.
const END_OF_WORD: &str = "</w>";
/// The words of a text.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// transformers' `CLIPTokenizer`, from `tokenizer.json`, or from `vocab.json` and `merges.txt`.
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    folder: PathBuf,
    start: u32,
    end: u32,
    pad: u32,
    length: usize,
    tokens: usize,
    reach: Reach,
}

/// Token ids of one caption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionIds {
    /// `model_max_length` ids: start, tokens, end, padding.
    pub ids: Vec<u32>,
    /// Number of the caption's tokens that fit.
    pub tokens: usize,
    /// Whether the caption has more tokens than fit.
    pub truncated: bool,
}

type TokenizerResult<T> = tokenizers::Result<T>;

/// CLIP's normalizer: NFC, runs of whitespace to one space, lower case.
fn normalizer() -> TokenizerResult<Normalizers> {
    let whitespace = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ")?;
    Ok(Normalizers::new(vec![
        NFC.into(),
        whitespace.into(),
        Lowercase.into(),
    ]))
}

/// CLIP's pre-tokenizer: the matches of `words`, as bytes.
fn pre_tokenizer(words: &str) -> TokenizerResult<PreTokenizers> {
    let words = SplitPattern::Regex(words.to_owned());
    let split = Split::new(words, SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::new(false, true, true);
    Ok(PreTokenizers::new(vec![split.into(), bytes.into()]))
}

impl ClipTokenizer {
    /// Reads a tokenizer's folder. With both forms of the vocabulary, `tokenizer.json` is read, as in transformers 5.
    ///
    /// # Errors
    /// When a file is missing or is not of a CLIP tokenizer.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        let vocabulary = Vocabulary::read(folder)?;
        let config = TokenizerConfig::read(folder, &vocabulary)?;
        let invalid = |message: String| ModelError::Tokenizer {
            folder: folder.to_owned(),
            message,
        };
        let reach = Reach::new(&vocabulary, &config.added, config.length - 2);
        let file = vocabulary.file;
        let tokenizer = build(vocabulary, &config).map_err(|e| invalid(format!("{file}: {e}")))?;
        let id = |token: &str| {
            tokenizer
                .token_to_id(token)
                .ok_or_else(|| invalid(format!("{file} has no token \"{token}\"")))
        };
        for listed in &config.listed {
            let found = id(&listed.token.content)?;
            if found != listed.id {
                return Err(invalid(format!(
                    "{} gives the token \"{}\" the id {}, but {file} gives it {found}: added tokens must have the ids after those \
                     of {file}, without gaps",
                    listed.file, listed.token.content, listed.id
                )));
            }
        }
        let last = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        Ok(Self {
            start: id(&config.start)?,
            end: id(&config.end)?,
            pad: id(&config.pad)?,
            length: config.length,
            tokens: last as usize + 1,
            folder: folder.to_owned(),
            reach,
            tokenizer,
        })
    }

    /// Number of tokens: one more than the highest id.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of ids of a caption, `model_max_length`.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Refuses another number of ids than `length`, which is that of the tokenizer before it in the same pipeline.
    ///
    /// # Errors
    /// With both numbers.
    pub fn check_length(&self, length: usize) -> Result<(), ModelError> {
        if self.length == length {
            return Ok(());
        }
        Err(ModelError::Tokenizer {
            folder: self.folder.clone(),
            message: format!(
                "\"model_max_length\" of tokenizer_config.json is {}, and that of the pipeline's first tokenizer is {length}: both \
                 must be the same",
                self.length
            ),
        })
    }

    /// Refuses a text encoder with another number of token embeddings (`rows`) than this tokenizer has tokens.
    ///
    /// # Errors
    /// With both numbers, and the files to look at.
    pub fn check_embeddings(&self, rows: usize) -> Result<(), ModelError> {
        let tokens = self.tokens;
        let cause = match rows.cmp(&tokens) {
            std::cmp::Ordering::Equal => return Ok(()),
            std::cmp::Ordering::Greater => {
                "the tokens of the other rows are missing; those of a textual inversion belong into added_tokens.json or, if \
                 tokenizer_config.json has it, into its \"added_tokens_decoder\""
            }
            std::cmp::Ordering::Less => {
                "the tokenizer is another model's, or tokens were added without rows for them"
            }
        };
        Err(ModelError::Tokenizer {
            folder: self.folder.clone(),
            message: format!(
                "the tokenizer has {tokens} tokens, but the text encoder has {rows} rows of token embeddings (\"vocab_size\" of its \
                 config.json): {cause}"
            ),
        })
    }

    /// Fingerprint of what decides ids: vocabulary, merges, tokens found before the text is split, start, end, padding and length.
    /// `sha256:` and hexadecimal digits.
    ///
    /// # Errors
    /// When the tokenizer can't be written as JSON, which none should cause.
    pub fn fingerprint(&self) -> Result<String, ModelError> {
        let whole = serde_json::to_value(&self.tokenizer).map_err(|e| ModelError::Tokenizer {
            folder: self.folder.clone(),
            message: e.to_string(),
        })?;
        let (model, added) = (&whole["model"], &whole["added_tokens"]);
        let ids = [self.start, self.end, self.pad];
        let mut sha = Sha256::new();
        for part in [
            &model["vocab"],
            &model["merges"],
            added,
            &json!(ids),
            &json!(self.length),
        ] {
            sha.update(part.to_string());
            sha.update("\n");
        }
        Ok(fingerprint_text(sha))
    }

    /// Ids of a caption; longer captions are cut. As transformers' `CLIPTokenizer(…, padding="max_length", truncation=True)`.
    ///
    /// # Errors
    /// When the text can't be tokenized, which no text should cause.
    pub fn encode(&self, caption: &str) -> Result<CaptionIds, ModelError> {
        let text = self.reach.cut(caption);
        let encoding = self.tokenizer.encode(text.as_ref(), false).map_err(|e| {
            let shown: String = caption.chars().take(100).collect();
            ModelError::Tokenizer {
                folder: self.folder.clone(),
                message: format!("caption {shown:?}: {e}"),
            }
        })?;
        let (found, fit) = (encoding.get_ids(), self.length - 2);
        let mut ids = Vec::with_capacity(self.length);
        ids.push(self.start);
        ids.extend(found.iter().take(fit));
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        Ok(CaptionIds {
            ids,
            tokens: found.len().min(fit),
            truncated: found.len() > fit,
        })
    }
}

fn build(vocabulary: Vocabulary, config: &TokenizerConfig) -> TokenizerResult<Tokenizer> {
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.ids, vocabulary.merges)
        .unk_token(config.unknown.clone())
        .end_of_word_suffix(END_OF_WORD.to_owned())
        .build()?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(normalizer()?))?;
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer(WORDS)?));
    tokenizer.add_special_tokens(config.added.iter().cloned())?;
    tokenizer.set_encode_special_tokens(config.splits_special);
    Ok(tokenizer)
}
