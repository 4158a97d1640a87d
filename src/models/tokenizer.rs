//! CLIP's tokenizer: captions to token ids, 77 by default.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::weights::read_json;
use super::{ModelError, fingerprint_text};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// transformers' `CLIPTokenizer`, from `vocab.json` and `merges.txt`.
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
    length: usize,
}

/// The keys of `tokenizer_config.json` that decide ids.
#[derive(Default, serde::Deserialize)]
struct TokenizerConfig {
    #[serde(flatten)]
    special: SpecialTokens,
    #[serde(default)]
    model_max_length: Option<f64>,
    /// Tokens by id, as transformers writes them since 4.34.
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, SpecialToken>,
}

/// The special tokens of `tokenizer_config.json` and, in older folders, of `special_tokens_map.json`.
#[derive(Default, serde::Deserialize)]
struct SpecialTokens {
    #[serde(default)]
    bos_token: Option<SpecialToken>,
    #[serde(default)]
    eos_token: Option<SpecialToken>,
    #[serde(default)]
    unk_token: Option<SpecialToken>,
    #[serde(default)]
    pad_token: Option<SpecialToken>,
}

/// A token by name, or with the rules by which it is found in a text.
#[derive(Clone, serde::Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Plain(String),
    Full {
        content: String,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        #[serde(default)]
        normalized: bool,
    },
}

impl SpecialToken {
    fn content(&self) -> &str {
        match self {
            Self::Plain(content) | Self::Full { content, .. } => content,
        }
    }

    fn added(&self) -> AddedToken {
        let token = AddedToken::from(self.content(), true);
        match *self {
            Self::Plain(_) => token,
            Self::Full {
                single_word,
                lstrip,
                rstrip,
                normalized,
                ..
            } => token
                .single_word(single_word)
                .lstrip(lstrip)
                .rstrip(rstrip)
                .normalized(normalized),
        }
    }
}

impl TokenizerConfig {
    /// Reads `tokenizer_config.json`, if there is one, and the tokens that it leaves to `special_tokens_map.json`.
    fn read(folder: &Path) -> Result<Self, ModelError> {
        let read = |name: &str| {
            let path = folder.join(name);
            path.is_file().then_some(path)
        };
        let mut config: Self = match read("tokenizer_config.json") {
            Some(path) => read_json(&path)?,
            None => Self::default(),
        };
        if let (Some(path), true) = (
            read("special_tokens_map.json"),
            config.added_tokens_decoder.is_empty(),
        ) {
            let map: SpecialTokens = read_json(&path)?;
            let special = &mut config.special;
            for (token, mapped) in [
                (&mut special.bos_token, map.bos_token),
                (&mut special.eos_token, map.eos_token),
                (&mut special.unk_token, map.unk_token),
                (&mut special.pad_token, map.pad_token),
            ] {
                *token = mapped.or(token.take());
            }
        }
        Ok(config)
    }

    /// The tokens that are found in a text before it is split into words, in the order in which they are added: of two with the
    /// same content the later counts. As in transformers, which drops repetitions first.
    fn added_tokens(&self) -> Vec<AddedToken> {
        let plain = |token: &Option<SpecialToken>, default: &str| {
            token
                .clone()
                .unwrap_or_else(|| SpecialToken::Plain(default.to_owned()))
        };
        let special = &self.special;
        let mut tokens: Vec<SpecialToken> = self.added_tokens_decoder.values().cloned().collect();
        for token in [
            plain(&special.bos_token, START),
            plain(&special.eos_token, END),
            plain(&special.unk_token, END),
            plain(&special.pad_token, END),
        ] {
            let listed = self.added_tokens_decoder.values();
            if !listed.into_iter().any(|t| t.content() == token.content()) {
                tokens.push(token);
            }
        }
        let mut added: Vec<AddedToken> = Vec::new();
        for token in tokens.iter().map(SpecialToken::added) {
            if !added.contains(&token) {
                added.push(token);
            }
        }
        added
    }
}

impl ClipTokenizer {
    /// Reads a tokenizer's folder.
    ///
    /// # Errors
    /// When a file is missing or is not a CLIP vocabulary.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        let error = |message: String| ModelError::Tokenizer {
            folder: folder.to_owned(),
            message,
        };
        let file = |name: &str| -> Result<String, ModelError> {
            let path = folder.join(name);
            if !path.is_file() {
                return Err(error(format!(
                    "{name} is missing; a CLIP tokenizer has vocab.json and merges.txt"
                )));
            }
            Ok(path.to_string_lossy().into_owned())
        };
        let bpe = BPE::from_file(&file("vocab.json")?, &file("merges.txt")?)
            .unk_token(END.to_owned())
            .end_of_word_suffix("</w>".to_owned())
            .build()
            .map_err(|e| error(e.to_string()))?;
        let mut tokenizer = Tokenizer::new(bpe);
        let whitespace = Replace::new(
            tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".to_owned()),
            " ",
        )
        .map_err(|e| error(e.to_string()))?;
        let normalizers = Normalizers::new(vec![NFC.into(), whitespace.into(), Lowercase.into()]);
        tokenizer
            .with_normalizer(Some(normalizers))
            .map_err(|e| error(e.to_string()))?;
        let words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
        let words = SplitPattern::Regex(words.to_owned());
        let split = Split::new(words, SplitDelimiterBehavior::Removed, true)
            .map_err(|e| error(e.to_string()))?;
        let bytes = ByteLevel::new(false, true, true);
        tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![split.into(), bytes.into()])));
        let config = TokenizerConfig::read(folder)?;
        if config.model_max_length.is_some_and(|length| length < 2.0) {
            return Err(error(
                "tokenizer_config.json: \"model_max_length\" must be 2 or more".to_owned(),
            ));
        }
        let pad = config.special.pad_token.as_ref();
        let pad = pad.map_or(END, SpecialToken::content).to_owned();
        tokenizer
            .add_special_tokens(config.added_tokens())
            .map_err(|e| error(e.to_string()))?;
        let id = |token: &str| {
            tokenizer
                .token_to_id(token)
                .ok_or_else(|| error(format!("vocab.json has no token \"{token}\"")))
        };
        Ok(Self {
            start: id(START)?,
            end: id(END)?,
            pad: id(&pad)?,
            length: config
                .model_max_length
                .filter(|&l| l <= 1e6)
                .map_or(77, |l| l as usize),
            tokenizer,
        })
    }

    /// Fingerprint of what decides ids: vocabulary, merges, tokens found before the text is split, start, end, padding and length.
    /// `sha256:` and hexadecimal digits.
    ///
    /// # Errors
    /// When the tokenizer can't be written as JSON, which none should cause.
    pub fn fingerprint(&self) -> Result<String, ModelError> {
        let whole = serde_json::to_value(&self.tokenizer).map_err(|e| ModelError::Tokenizer {
            folder: "tokenizer".into(),
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

    /// Ids of a caption, `model_max_length` of them: start, tokens, end, padding; longer captions are cut. As transformers'
    /// `CLIPTokenizer(…, padding="max_length", truncation=True)`.
    ///
    /// # Errors
    /// When the text can't be tokenized, which no text should cause.
    pub fn encode(&self, caption: &str) -> Result<Vec<u32>, ModelError> {
        let encoding =
            self.tokenizer
                .encode(caption, false)
                .map_err(|e| ModelError::Tokenizer {
                    folder: "tokenizer".into(),
                    message: format!("caption {caption:?}: {e}"),
                })?;
        let mut ids = Vec::with_capacity(self.length);
        ids.push(self.start);
        ids.extend(
            encoding
                .get_ids()
                .iter()
                .take(self.length.saturating_sub(2)),
        );
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        Ok(ids)
    }
}
