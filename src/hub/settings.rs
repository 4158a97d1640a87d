//! The Hub's address and the user's token, from the environment variables that `huggingface_hub` reads.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::process;

/// Default of `HF_HUB_DOWNLOAD_TIMEOUT`.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// An environment variable has an invalid value.
#[derive(Debug, thiserror::Error)]
#[error("the environment variable {name} = {value:?}: {needs}")]
pub struct SettingsError {
    /// The variable.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// The requirement.
    pub needs: &'static str,
}

/// Access token of a user. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct HubToken(String);

impl HubToken {
    /// The token itself, for the header of a request.
    pub(crate) fn secret(&self) -> &str {
        &self.0
    }

    /// `text` with the token replaced by `REDACTED`.
    pub(crate) fn redact(&self, text: &str) -> String {
        text.replace(&self.0, "REDACTED")
    }
}

impl fmt::Debug for HubToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HubToken(REDACTED)")
    }
}

/// Settings of the Hub from the environment.
#[derive(Clone, Debug)]
pub struct Settings {
    /// URL, without a slash at the end.
    pub endpoint: String,
    /// The user's token.
    pub token: Option<HubToken>,
    /// `HF_HUB_OFFLINE`: no request may be sent.
    pub offline: bool,
    /// Time without a received or sent byte after which a request fails.
    pub idle_timeout: Duration,
    /// `HF_HOME`; `None` where neither it nor a home folder is set.
    pub home: Option<PathBuf>,
}

impl Settings {
    /// URL of the public Hub.
    pub const PUBLIC: &str = "https://huggingface.co";

    /// Reads `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE` and `HF_HUB_DOWNLOAD_TIMEOUT`.
    ///
    /// # Errors
    /// When one of them has an invalid value.
    pub fn from_env() -> Result<Self, SettingsError> {
        Self::new(process::env_var)
    }

    pub(crate) fn new(env_var: impl Fn(&str) -> Option<String>) -> Result<Self, SettingsError> {
        let endpoint = env_var("HF_ENDPOINT").unwrap_or_else(|| Self::PUBLIC.to_owned());
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(SettingsError {
                name: "HF_ENDPOINT",
                value: endpoint,
                needs: "must start with http:// or https://",
            });
        }
        let idle_timeout = match env_var("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => IDLE_TIMEOUT,
            Some(value) => match value.parse() {
                Ok(seconds @ 1..=31_536_000) => Duration::from_secs(seconds),
                _ => {
                    return Err(SettingsError {
                        name: "HF_HUB_DOWNLOAD_TIMEOUT",
                        value,
                        needs: "must be a whole number of seconds, 1 to 31536000",
                    });
                }
            },
        };
        let home = env_var("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(process::cache_dir(&env_var)?.join("huggingface")));
        let token = env_var("HF_TOKEN").or_else(|| {
            let path = match env_var("HF_TOKEN_PATH") {
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
                .map(HubToken),
            offline: env_var("HF_HUB_OFFLINE")
                .is_some_and(|value| yes.contains(&value.to_uppercase().as_str())),
            idle_timeout,
            home,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::env_of;
    use std::path::Path;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        Settings::new(env_of(variables))
    }

    #[test]
    fn settings_come_from_the_environment() {
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
        assert_eq!(full.token, Some(HubToken("hf_file".to_owned())));
        assert!(full.offline && full.idle_timeout == Duration::from_secs(7));
        let named = settings(&[("HF_HOME", path), ("HF_TOKEN", "hf_env")]).unwrap();
        assert_eq!(named.token, Some(HubToken("hf_env".to_owned())));
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
    fn token_is_redacted() {
        let shown = settings(&[("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{shown:?}").contains("hf_secret"));
        let token = shown.token.unwrap();
        assert_eq!(token.redact("no hf_secret here"), "no REDACTED here");
    }
}
