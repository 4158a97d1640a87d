//! Where the Hub is and who we are there, by the variables that `huggingface_hub` reads.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::environment;

/// Silence after which the Hub is given up, unless `HF_HUB_DOWNLOAD_TIMEOUT` says otherwise.
const SILENCE: Duration = Duration::from_secs(60);

/// An environment variable says something that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the environment variable {name} = {value:?}: {needs}")]
pub struct SettingsError {
    /// The variable.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// What it has to be.
    pub needs: &'static str,
}

/// What says who we are. It is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token itself, for the header of a request.
    pub(crate) fn secret(&self) -> &str {
        &self.0
    }

    /// A text that someone else wrote, without the token.
    pub(crate) fn redact(&self, text: &str) -> String {
        text.replace(&self.0, "REDACTED")
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(REDACTED)")
    }
}

/// The Hub, as the environment says.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its address, without a slash at the end.
    pub endpoint: String,
    /// Who we are, if anyone.
    pub token: Option<Token>,
    /// Whether nobody is to be asked.
    pub offline: bool,
    /// Silence after which a request is given up.
    pub silence: Duration,
    /// `HF_HOME`, if it is known where that is.
    pub home: Option<PathBuf>,
}

impl Settings {
    /// The Hub everyone knows.
    pub const PUBLIC: &str = "https://huggingface.co";

    /// Reads `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE` and `HF_HUB_DOWNLOAD_TIMEOUT`.
    ///
    /// # Errors
    /// When one of them says what can't be used.
    pub fn from_env() -> Result<Self, SettingsError> {
        Self::new(environment::variable)
    }

    pub(crate) fn new(variable: impl Fn(&str) -> Option<String>) -> Result<Self, SettingsError> {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| Self::PUBLIC.to_owned());
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(SettingsError {
                name: "HF_ENDPOINT",
                value: endpoint,
                needs: "must start with http:// or https://",
            });
        }
        let silence = match variable("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => SILENCE,
            Some(value) => match value.parse() {
                Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
                _ => {
                    return Err(SettingsError {
                        name: "HF_HUB_DOWNLOAD_TIMEOUT",
                        value,
                        needs: "must be a whole number of seconds, 1 or more",
                    });
                }
            },
        };
        let home = variable("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(environment::caches(&variable)?.join("huggingface")));
        let token = variable("HF_TOKEN").or_else(|| {
            let path = match variable("HF_TOKEN_PATH") {
                Some(path) => PathBuf::from(path),
                None => home.as_ref()?.join("token"),
            };
            fs::read_to_string(path).ok()
        });
        let yes = ["1", "ON", "YES", "TRUE"];
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty())
                .map(Token),
            offline: variable("HF_HUB_OFFLINE")
                .is_some_and(|value| yes.contains(&value.to_uppercase().as_str())),
            silence,
            home,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn settings(pairs: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        Settings::new(|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_environment_decides() {
        let plain = settings(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain.endpoint, Settings::PUBLIC);
        assert_eq!(
            plain.home.as_deref(),
            Some(Path::new("/h/.cache/huggingface"))
        );
        assert!(plain.token.is_none() && !plain.offline);
        let home = tempfile::tempdir().unwrap();
        let path = home.path().to_str().unwrap();
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let full = settings(&[
            ("HF_HOME", path),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "yes"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "7"),
        ])
        .unwrap();
        assert_eq!(full.endpoint, "http://mirror");
        assert_eq!(full.token, Some(Token("hf_file".to_owned())));
        assert!(full.offline && full.silence == Duration::from_secs(7));
        let named = settings(&[("HF_HOME", path), ("HF_TOKEN", "hf_env")]).unwrap();
        assert_eq!(named.token, Some(Token("hf_env".to_owned())));
        for wrong in [
            ("HF_ENDPOINT", "mirror"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
        ] {
            let error = settings(&[wrong]).unwrap_err().to_string();
            assert!(error.contains(wrong.0), "{error}");
        }
        assert!(settings(&[]).unwrap().home.is_none());
    }

    #[test]
    fn a_token_is_not_shown() {
        let shown = settings(&[("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{shown:?}").contains("hf_secret"));
        let token = shown.token.unwrap();
        assert_eq!(token.redact("no hf_secret here"), "no REDACTED here");
    }
}
