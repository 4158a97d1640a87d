//! CLIP's tokenizer: captions to 77 token ids.

use std::path::Path;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::ModelError;

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
    #[serde(default)]
    pad_token: Option<TokenName>,
    #[serde(default)]
    model_max_length: Option<f64>,
}

/// A token by name or as an object with its name.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum TokenName {
    Plain(String),
    Full { content: String },
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
            match path.is_file() {
                true => Ok(path.to_string_lossy().into_owned()),
                false => Err(error(format!(
                    "{name} is missing; a CLIP tokenizer has vocab.json and merges.txt"
                ))),
            }
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
        let config_path = folder.join("tokenizer_config.json");
        let config: TokenizerConfig = match config_path.is_file() {
            true => super::weights::read_json(&config_path)?,
            false => TokenizerConfig::default(),
        };
        if config.model_max_length.is_some_and(|length| length < 2.0) {
            return Err(error(
                "tokenizer_config.json: \"model_max_length\" must be 2 or more".to_owned(),
            ));
        }
        let pad = match config.pad_token {
            Some(TokenName::Plain(name) | TokenName::Full { content: name }) => name,
            None => END.to_owned(),
        };
        let specials: Vec<AddedToken> = [START, END].map(|t| AddedToken::from(t, true)).to_vec();
        tokenizer
            .add_special_tokens(specials)
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

    /// Ids of a caption: start, tokens, end, padding; longer captions are cut. As `CLIPTokenizer(…, padding="max_length",
    /// truncation=True)`.
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
