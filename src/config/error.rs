//! Mistakes in a configuration. Each message says where the key was written, what is wrong, and what would be right.

use std::fmt;

/// Why a configuration can't be used. The user can fix every variant, so the command line exits with code 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file can't be read at all.
    #[error("cannot read the configuration file {file}: {source}")]
    Read {
        /// The file asked for.
        file: String,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{file}:{line}:{column}: not valid TOML: {message}")]
    Syntax {
        /// The file.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// The parser's message.
        message: String,
    },
    /// A `-s` argument is not `key=value`, or its value is not TOML.
    #[error("-s {argument}: {message}")]
    Override {
        /// The argument as given.
        argument: String,
        /// What is wrong with it and what would be right.
        message: String,
    },
    /// A key that does not exist.
    #[error("{place}: unknown key {key}; {hint}")]
    UnknownKey {
        /// Where it was written.
        place: WrittenAt,
        /// The key in full, as `train.max_step`.
        key: String,
        /// The nearest known key, or the list of the table's keys.
        hint: String,
    },
    /// A value of the wrong type.
    #[error("{entry}: wrong type: found {found}, needs {needs}")]
    WrongType {
        /// The key and its value.
        entry: Box<KeyValue>,
        /// The type found.
        found: &'static str,
        /// The type needed.
        needs: String,
    },
    /// A word that is not one of the key's choices.
    #[error("{entry}: unknown value; choose one of {choices}")]
    UnknownChoice {
        /// The key and its value.
        entry: Box<KeyValue>,
        /// Every choice, quoted and separated by commas.
        choices: String,
    },
    /// A value of the right type that can't be used.
    #[error("{entry}: {needs}")]
    Invalid {
        /// The key and its value.
        entry: Box<KeyValue>,
        /// What the value has to be.
        needs: String,
    },
    /// A required key is absent.
    #[error("{place}: missing required key {key}: {meaning}")]
    Missing {
        /// The configuration file.
        place: WrittenAt,
        /// The key in full.
        key: String,
        /// What to write for the key.
        meaning: &'static str,
    },
    /// A value that needs a cargo feature this binary was compiled without.
    #[error(
        "{entry}: this binary was built without {what}; {instead} or build with `--features {feature}`"
    )]
    WithoutFeature {
        /// The key and its value.
        entry: Box<KeyValue>,
        /// The feature in words.
        what: &'static str,
        /// What to write instead.
        instead: &'static str,
        /// The cargo feature.
        feature: &'static str,
    },
    /// A folder the configuration names does not exist.
    #[error("{entry}: no such folder")]
    NoFolder {
        /// The key and its value.
        entry: Box<KeyValue>,
    },
}

/// One key with its value, and where it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// Where it was written.
    pub place: WrittenAt,
    /// The key in full, as `train.max_steps`.
    pub key: String,
    /// The value as TOML.
    pub value: String,
}

impl fmt::Display for KeyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: key {} = {}", self.place, self.key, self.value)
    }
}

/// Where a value was written: a line of the file, or a `-s` argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WrittenAt {
    /// The configuration file; without a line where the value is a default or absent.
    File {
        /// The file's name as given.
        file: String,
        /// Line, from 1.
        line: Option<usize>,
    },
    /// A `-s` argument.
    Argument(String),
}

impl fmt::Display for WrittenAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, line: None } => f.write_str(file),
            Self::File {
                file,
                line: Some(line),
            } => write!(f, "{file}:{line}"),
            Self::Argument(argument) => write!(f, "-s {argument}"),
        }
    }
}
