//! Special and added tokens, and the other settings of a tokenizer's folder, read as transformers 5 reads them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::super::ModelError;
use super::super::weights::read_json;
use super::vocabulary::Vocabulary;
use super::{END, START};

const CONFIG: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
/// Ids of added tokens, as older versions of transformers write them.
const ADDED: &str = "added_tokens.json";
const EXTRA: &str = "extra_special_tokens";
const DECODER: &str = "added_tokens_decoder";
/// Tokens with a role, in transformers' order.
const ROLES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];
/// The tokens of `CLIPTokenizer` by default.
const DEFAULTS: [(&str, &str); 4] = [
    ("bos_token", START),
    ("eos_token", END),
    ("unk_token", END),
    ("pad_token", END),
];
/// Ids of a caption without a `model_max_length`.
const LENGTH: usize = 77;
/// transformers writes 1e30 for no limit.
const NO_LIMIT: f64 = 1e6;

/// An added token with its id, and the file that lists it.
#[derive(Clone)]
pub(super) struct ListedToken {
    pub(super) file: &'static str,
    pub(super) id: u32,
    pub(super) token: AddedToken,
}

/// The settings of a tokenizer besides its vocabulary.
pub(super) struct TokenizerConfig {
    /// The tokens that are found in a text before it is split into words, in the order in which they are added: of two with the same
    /// content the later counts.
    pub(super) added: Vec<AddedToken>,
    /// Those that a file lists with an id.
    pub(super) listed: Vec<ListedToken>,
    pub(super) start: String,
    pub(super) end: String,
    pub(super) pad: String,
    pub(super) unknown: String,
    /// Ids of a caption, at least 2.
    pub(super) length: usize,
    /// Whether special tokens in a text are split like other text.
    pub(super) splits_special: bool,
}

/// A token by name, or with the rules by which it is found in a text.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Token {
    Plain(String),
    Full {
        content: String,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        normalized: Option<bool>,
        special: Option<bool>,
    },
}

impl Token {
    fn content(&self) -> &str {
        match self {
            Self::Plain(content) | Self::Full { content, .. } => content,
        }
    }

    /// The token, special if it does not say otherwise.
    fn special(&self) -> AddedToken {
        self.added(match self {
            Self::Plain(_) => true,
            Self::Full { special, .. } => special.unwrap_or(true),
        })
    }

    fn added(&self, special: bool) -> AddedToken {
        let token = AddedToken::from(self.content(), special);
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
                .normalized(normalized.unwrap_or(!special)),
        }
    }
}

/// A JSON object of the folder; absent files have no keys.
struct Keys {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Keys {
    fn read(folder: &Path, name: &str) -> Result<Self, ModelError> {
        let path = folder.join(name);
        let map = if path.exists() {
            read_json(&path)?
        } else {
            Map::new()
        };
        Ok(Self { path, map })
    }

    /// The value of a key; JSON null counts as absent.
    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, ModelError> {
        let value = self.map.get(key).filter(|value| !value.is_null());
        value
            .map(|value| {
                serde_json::from_value(value.clone())
                    .map_err(|e| self.invalid(format!("\"{key}\": {e}, but it is {value}")))
            })
            .transpose()
    }

    fn invalid(&self, message: String) -> ModelError {
        ModelError::Config {
            path: self.path.clone(),
            message,
        }
    }
}

/// The special tokens that a file names.
struct SpecialTokens {
    /// By role; also roles of the model's own, such as `image_token`.
    roles: Vec<(String, Token)>,
    /// Tokens without a role.
    extra: Vec<Token>,
    /// The same under its name before transformers 5; counts without `extra`.
    additional: Vec<Token>,
}

impl SpecialTokens {
    fn of(keys: &Keys) -> Result<Self, ModelError> {
        let mut roles = Vec::new();
        for role in ROLES {
            roles.extend(keys.get(role)?.map(|token| (role.to_owned(), token)));
        }
        for (key, value) in &keys.map {
            if let Value::String(token) = value
                && key.ends_with("_token")
                && !ROLES.contains(&key.as_str())
            {
                roles.push((key.clone(), Token::Plain(token.clone())));
            }
        }
        if let Some(Value::Object(named)) = keys.map.get(EXTRA) {
            let named = Keys {
                path: keys.path.clone(),
                map: named.clone(),
            };
            for role in named.map.keys() {
                roles.extend(named.get(role)?.map(|token| (role.clone(), token)));
            }
        }
        let list = |key: &str| match keys.map.get(key) {
            Some(Value::Object(_)) => Ok::<_, ModelError>(Vec::new()),
            _ => Ok(keys.get::<Vec<Token>>(key)?.unwrap_or_default()),
        };
        Ok(Self {
            roles,
            extra: list(EXTRA)?,
            additional: list("additional_special_tokens")?,
        })
    }

    /// Takes the tokens of `special_tokens_map.json` over those of `tokenizer_config.json`.
    fn replace_by(&mut self, map: Self) {
        for (role, token) in map.roles {
            match self.roles.iter_mut().find(|(known, _)| *known == role) {
                Some((_, known)) => *known = token,
                None => self.roles.push((role, token)),
            }
        }
        if self.extra.is_empty() {
            // `special_tokens_map.json` is read after the old name was replaced by the new one.
            self.extra = std::mem::take(&mut self.additional);
        }
        if !map.additional.is_empty() {
            self.additional = map.additional;
        }
        for token in map.extra {
            if !self.extra.iter().any(|t| t.content() == token.content()) {
                self.extra.push(token);
            }
        }
    }

    fn role(&self, name: &str) -> Option<&Token> {
        let found = self.roles.iter().find(|(role, _)| role == name);
        found.map(|(_, token)| token)
    }

    /// Adds the default tokens, and puts the roles into transformers' order.
    fn complete(&mut self) {
        for (role, token) in DEFAULTS {
            if self.role(role).is_none() {
                self.roles
                    .push((role.to_owned(), Token::Plain(token.to_owned())));
            }
        }
        let place = |role: &str| ROLES.iter().position(|known| *known == role);
        self.roles
            .sort_by_key(|(role, _)| place(role).unwrap_or(ROLES.len()));
    }
}

impl TokenizerConfig {
    /// Reads `tokenizer_config.json`; without its `added_tokens_decoder` also `special_tokens_map.json`, `added_tokens.json` and the
    /// added tokens of `tokenizer.json`.
    pub(super) fn read(folder: &Path, vocabulary: &Vocabulary) -> Result<Self, ModelError> {
        let config = Keys::read(folder, CONFIG)?;
        let mut special = SpecialTokens::of(&config)?;
        let listed = match config.get::<BTreeMap<u32, Token>>(DECODER)? {
            Some(tokens) => of_decoder(&tokens),
            None => {
                special.replace_by(SpecialTokens::of(&Keys::read(folder, SPECIAL)?)?);
                let mut listed = of_added_file(folder, &special)?;
                for token in &vocabulary.listed {
                    listed.insert(token.id, token.clone());
                }
                listed
            }
        };
        special.complete();
        refuse_sides(&config, vocabulary)?;
        let name = |role: &str| special.role(role).map_or(END, Token::content).to_owned();
        Ok(Self {
            added: added(&special, &listed),
            listed: listed.into_values().collect(),
            start: name("bos_token"),
            end: name("eos_token"),
            pad: name("pad_token"),
            unknown: name("unk_token"),
            length: length(&config)?,
            splits_special: config.get("split_special_tokens")?.unwrap_or(false),
        })
    }
}

fn of_decoder(tokens: &BTreeMap<u32, Token>) -> BTreeMap<u32, ListedToken> {
    let listed = tokens.iter().map(|(&id, token)| {
        let special = matches!(
            token,
            Token::Full {
                special: Some(true),
                ..
            }
        );
        let listed = ListedToken {
            file: CONFIG,
            id,
            token: token.added(special),
        };
        (id, listed)
    });
    listed.collect()
}

fn of_added_file(
    folder: &Path,
    special: &SpecialTokens,
) -> Result<BTreeMap<u32, ListedToken>, ModelError> {
    let keys = Keys::read(folder, ADDED)?;
    let named = ROLES.iter().filter_map(|role| special.role(role));
    let named: Vec<&str> = named.chain(&special.extra).map(Token::content).collect();
    let mut listed = BTreeMap::new();
    for content in keys.map.keys() {
        let id: u32 = keys
            .get(content)?
            .ok_or_else(|| keys.invalid(format!("\"{content}\" has no id")))?;
        let is_special = named.contains(&content.as_str());
        let token = ListedToken {
            file: ADDED,
            id,
            token: AddedToken::from(content.as_str(), is_special),
        };
        if let Some(other) = listed.insert(id, token) {
            let other = other.token.content;
            return Err(keys.invalid(format!("\"{other}\" and \"{content}\" have the id {id}")));
        }
    }
    Ok(listed)
}

/// Listed tokens in the order of their ids, then the special tokens that are not among them.
fn added(special: &SpecialTokens, listed: &BTreeMap<u32, ListedToken>) -> Vec<AddedToken> {
    let mut added: Vec<AddedToken> = listed.values().map(|listed| listed.token.clone()).collect();
    let listed: Vec<String> = added.iter().map(|token| token.content.clone()).collect();
    let roles = special.roles.iter();
    for token in &mut added {
        let has_role = |(_, role): &(String, Token)| role.content() == token.content;
        token.special |= roles.clone().any(has_role);
    }
    let named = roles.map(|(_, token)| token.added(true));
    let extra = match &special.extra[..] {
        [] => &special.additional[..],
        extra => extra,
    };
    let extra = extra.iter().map(Token::special);
    for token in named.chain(extra) {
        if !listed.contains(&token.content) && !added.contains(&token) {
            added.push(token);
        }
    }
    added
}

fn length(config: &Keys) -> Result<usize, ModelError> {
    let length: Option<f64> = config.get("model_max_length")?;
    // An older name.
    let length = length.map_or_else(|| config.get("max_len"), |length| Ok(Some(length)))?;
    match length {
        Some(length) if length < 2.0 => {
            Err(config.invalid("\"model_max_length\" must be at least 2".to_owned()))
        }
        Some(length) if length <= NO_LIMIT => Ok(length as usize),
        _ => Ok(LENGTH),
    }
}

/// Refuses padding and truncation on the left.
fn refuse_sides(config: &Keys, vocabulary: &Vocabulary) -> Result<(), ModelError> {
    let keys = ["padding_side", "truncation_side"];
    for (key, of_file) in keys.into_iter().zip(&vocabulary.sides) {
        let side: Option<String> = config.get(key)?;
        let side = side.as_ref().or(of_file.as_ref());
        if let Some(side) = side.filter(|side| !side.eq_ignore_ascii_case("right")) {
            let message = format!("\"{key}\": \"{side}\" is not supported; supported: \"right\"");
            return Err(config.invalid(message));
        }
    }
    Ok(())
}
