//! Push of a finished run to its Hub repository, in one commit.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{Call, Client, RequestBody};
use super::files::{HubFile, store};
use super::{AttemptError, Card, HubError, Settings};
use crate::config::{self, Config};
use tokio_util::sync::CancellationToken;

const JSON: &str = "application/json";
/// Commit message, as in the reference.
const MESSAGE: &str = "End of training";

/// A configured push, checked as far as possible without a request.
#[derive(Debug)]
pub struct Push {
    id: String,
    settings: Settings,
}

/// Result of a push.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// URL of the commit.
    Commit(String),
    /// The repository already had the same files.
    Unchanged,
}

/// A push that failed; the run's folder is complete.
#[derive(Debug, thiserror::Error)]
#[error(
    "{id}: not pushed: {source}\nthe run is complete in {}; start it again to push again (no step is repeated), or push by \
     hand:\n  {command}",
    folder.display()
)]
pub struct PushError {
    /// The repository.
    pub id: String,
    /// The run's folder.
    pub folder: PathBuf,
    /// The `hf upload` command for the same push.
    pub command: String,
    /// The cause.
    pub source: HubError,
}

#[derive(Deserialize)]
struct PreuploadResponse {
    files: Vec<PreuploadFile>,
}

/// The Hub's answer on one file.
#[derive(Deserialize)]
struct PreuploadFile {
    path: String,
    /// `lfs` or `regular`.
    #[serde(rename = "uploadMode")]
    mode: String,
    #[serde(rename = "shouldIgnore", default)]
    ignored: bool,
    /// Id of the repository's file at this path.
    oid: Option<String>,
}

impl Push {
    /// The configured push, if any.
    ///
    /// # Errors
    /// [`HubError::NoToken`], [`HubError::Offline`] and [`HubError::Settings`].
    pub fn prepare(config: &config::Hub) -> Result<Option<Self>, HubError> {
        match &config.push_to {
            None => Ok(None),
            Some(id) => Self::new(id, Settings::from_env()?).map(Some),
        }
    }

    fn new(id: &str, settings: Settings) -> Result<Self, HubError> {
        let id = id.to_owned();
        if settings.offline {
            return Err(HubError::Offline { id });
        }
        match settings.token {
            None => Err(HubError::NoToken { id }),
            Some(_) => Ok(Self { id, settings }),
        }
    }

    /// Asks the Hub for the token's user and returns a message with the user's name.
    ///
    /// # Errors
    /// [`HubError::WrongToken`] for an unknown token; others when the request fails.
    pub fn check(&self, stop: &CancellationToken) -> Result<String, HubError> {
        #[derive(Deserialize)]
        struct WhoAmI {
            name: String,
        }
        let client = Client::new(&self.settings, &self.id, stop);
        let response = client.call(&Call {
            what: format!("ask {} whose token it is", self.settings.endpoint),
            method: "GET",
            url: &client.url("api/whoami-v2"),
            headers: Vec::new(),
            body: RequestBody::Empty,
            expects: &[],
        })?;
        let WhoAmI { name } = response.json()?;
        let (id, endpoint) = (&self.id, &self.settings.endpoint);
        Ok(format!("pushes to {id} at {endpoint} as {name}"))
    }

    /// Writes the model card of the finished run in `folder` and pushes run and card. Blocks.
    ///
    /// # Errors
    /// [`PushError`], with a command that repeats the push.
    pub fn run(
        &self,
        config: &Config,
        folder: &Path,
        stop: &CancellationToken,
    ) -> Result<Pushed, PushError> {
        let card = Card {
            config,
            id: &self.id,
            folder,
        };
        let names = card.files();
        let pushed = card.write().and_then(|()| self.push(folder, &names, stop));
        pushed.map_err(|source| PushError {
            id: self.id.clone(),
            folder: folder.to_owned(),
            command: self.command(folder, &names),
            source,
        })
    }

    fn push(
        &self,
        folder: &Path,
        names: &[String],
        stop: &CancellationToken,
    ) -> Result<Pushed, HubError> {
        let (id, endpoint) = (&self.id, &self.settings.endpoint);
        errln!("pushing to {id} at {endpoint}");
        let files = names
            .iter()
            .map(|name| HubFile::new(folder, name))
            .collect::<Result<Vec<_>, _>>()?;
        let client = Client::new(&self.settings, id, stop);
        client.retry(&format!("commit to {id}"), || {
            // Every attempt starts here: the commit may have succeeded and its response been lost.
            let changed = self
                .changed(&client, &files)
                .map_err(AttemptError::Permanent)?;
            if changed.is_empty() {
                return Ok(Pushed::Unchanged);
            }
            let large: Vec<&HubFile> = changed
                .iter()
                .filter(|change| change.large)
                .map(|change| change.file)
                .collect();
            store(&client, &large).map_err(AttemptError::Permanent)?;
            self.commit(&client, &changed).map(Pushed::Commit)
        })
    }

    /// The files to commit. Creates the repository if there is none.
    fn changed<'f>(
        &self,
        client: &Client<'_>,
        files: &'f [HubFile],
    ) -> Result<Vec<Change<'f>>, HubError> {
        changed(&self.preupload(client, files)?, files)
    }

    /// Asks the Hub how it stores the files. Creates the repository if there is none.
    fn preupload(
        &self,
        client: &Client<'_>,
        files: &[HubFile],
    ) -> Result<Vec<PreuploadFile>, HubError> {
        let entries = files
            .iter()
            .map(HubFile::preupload_entry)
            .collect::<Result<Vec<Value>, _>>()?;
        let request = json!({"files": entries}).to_string();
        let ask = |expects| {
            client.call(&Call {
                what: format!("ask how {} stores the files", self.id),
                method: "POST",
                url: &client.url(&format!("api/models/{}/preupload/main", self.id)),
                headers: Vec::new(),
                body: RequestBody::Text {
                    text: &request,
                    content_type: JSON,
                },
                expects,
            })
        };
        let mut response = ask(&[404])?;
        if response.status == 404 {
            self.create(client)?;
            response = ask(&[])?;
        }
        Ok(response.json::<PreuploadResponse>()?.files)
    }

    fn create(&self, client: &Client<'_>) -> Result<(), HubError> {
        let (organization, name) = self.id.split_once('/').unwrap_or(("", &self.id));
        let request = json!({"name": name, "organization": organization, "type": "model"});
        let response = client.call(&Call {
            what: format!("create {}", self.id),
            method: "POST",
            url: &client.url("api/repos/create"),
            headers: Vec::new(),
            body: RequestBody::Text {
                text: &request.to_string(),
                content_type: JSON,
            },
            // It exists: created meanwhile, or by an attempt whose response was lost.
            expects: &[409],
        })?;
        if response.status != 409 {
            errln!("  created {}", self.id);
        }
        Ok(())
    }

    /// Commits once, without retries; returns the URL of the commit.
    fn commit(
        &self,
        client: &Client<'_>,
        changed: &[Change<'_>],
    ) -> Result<String, AttemptError<HubError>> {
        #[derive(Deserialize)]
        struct Committed {
            #[serde(rename = "commitUrl")]
            url: String,
        }
        let header = json!({"key": "header", "value": {"summary": MESSAGE, "description": ""}});
        let mut lines = format!("{header}\n");
        for change in changed {
            let line = change.file.commit_line(change.large);
            lines += &format!("{}\n", line.map_err(AttemptError::Permanent)?);
        }
        let response = client.once(&Call {
            what: format!("commit to {}", self.id),
            method: "POST",
            url: &client.url(&format!("api/models/{}/commit/main", self.id)),
            headers: Vec::new(),
            body: RequestBody::Text {
                text: &lines,
                content_type: "application/x-ndjson",
            },
            expects: &[],
        })?;
        let Committed { url } = response.json().map_err(AttemptError::Permanent)?;
        Ok(url)
    }

    /// The `hf upload` command that pushes the same files.
    fn command(&self, folder: &Path, names: &[String]) -> String {
        let mut command = String::new();
        if self.settings.endpoint != Settings::PUBLIC {
            command += &format!("HF_ENDPOINT={} ", quoted(&self.settings.endpoint));
        }
        let folder = folder.display().to_string();
        command += &format!("hf upload {} {} .", self.id, quoted(&folder));
        for name in names {
            command += &format!(" --include {}", quoted(name));
        }
        command
    }
}

/// A file to commit.
struct Change<'a> {
    file: &'a HubFile,
    /// Whether the content goes to the storage of large files.
    large: bool,
}

/// The files whose content differs from the repository's. A card that differs (someone may have edited it) is replaced only
/// together with other files.
fn changed<'a>(
    answers: &[PreuploadFile],
    files: &'a [HubFile],
) -> Result<Vec<Change<'a>>, HubError> {
    let mut changed = Vec::new();
    let mut card = None;
    for file in files {
        let answer = answers.iter().find(|answer| answer.path == file.name);
        let answer = answer.ok_or_else(|| HubError::InvalidResponse {
            what: "ask how the files are stored".to_owned(),
            cause: format!("it does not list {}", file.name),
        })?;
        if answer.ignored {
            errln!(
                "warning: {}: not pushed: the repository's .gitignore excludes it",
                file.name
            );
            continue;
        }
        if answer.oid.as_deref().is_some_and(|oid| file.has_oid(oid)) {
            continue;
        }
        let change = Change {
            file,
            large: file.is_large(answer.mode == "lfs"),
        };
        if file.name == Card::NAME && answer.oid.is_some() {
            card = Some(change);
        } else {
            changed.push(change);
        }
    }
    if !changed.is_empty() {
        changed.extend(card);
    }
    Ok(changed)
}

/// A word, quoted for a shell where necessary.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::env_of;

    fn push(variables: &[(&str, &str)]) -> Result<Push, HubError> {
        Push::new("user/model", Settings::new(env_of(variables))?)
    }

    #[test]
    fn push_needs_a_token_and_the_network() {
        let error = push(&[]).unwrap_err();
        assert!(error.is_config() && error.to_string().contains("HF_TOKEN"));
        let error = push(&[("HF_TOKEN", "hf_x"), ("HF_HUB_OFFLINE", "1")]).unwrap_err();
        assert!(error.is_config() && error.to_string().contains("HF_HUB_OFFLINE"));
        push(&[("HF_TOKEN", "hf_x")]).unwrap();
    }

    #[test]
    fn push_command_is_quoted_for_a_shell() {
        let names = ["README.md".to_owned(), "unet/a.json".to_owned()];
        assert_eq!(
            push(&[("HF_TOKEN", "hf_x")])
                .unwrap()
                .command(Path::new("runs/it's one"), &names),
            r"hf upload user/model 'runs/it'\''s one' . --include README.md --include unet/a.json"
        );
        let mirror = push(&[("HF_TOKEN", "hf_x"), ("HF_ENDPOINT", "http://mirror:80/")]);
        let command = mirror.unwrap().command(Path::new("a"), &[]);
        assert_eq!(
            command,
            "HF_ENDPOINT=http://mirror:80 hf upload user/model a ."
        );
    }

    #[test]
    fn push_commits_changed_files_and_the_card_with_them() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("README.md"), "card").unwrap();
        std::fs::write(folder.path().join("weights"), "abc").unwrap();
        let files = ["README.md", "weights"].map(|n| HubFile::new(folder.path(), n).unwrap());
        let mode = |path: &str, mode: &str, oid: Option<&str>, ignored: bool| PreuploadFile {
            path: path.to_owned(),
            mode: mode.to_owned(),
            ignored,
            oid: oid.map(str::to_owned),
        };
        let names = |answers: &[PreuploadFile]| {
            let changed = changed(answers, &files).unwrap();
            let names = changed.iter().map(|c| (c.file.name.clone(), c.large));
            names.collect::<Vec<_>>()
        };
        let (card, weights) = ("README.md".to_owned(), "weights".to_owned());
        let new = [
            mode("README.md", "regular", None, false),
            mode("weights", "lfs", None, false),
        ];
        assert_eq!(
            names(&new),
            [(card.clone(), false), (weights.clone(), true)]
        );
        let same = &files[1].sha256;
        let edited = [
            mode("README.md", "regular", Some("edited"), false),
            mode("weights", "lfs", Some(same), false),
        ];
        assert_eq!(names(&edited), []);
        let retrained = [
            mode("README.md", "regular", Some("old"), false),
            mode("weights", "lfs", Some("old"), false),
        ];
        assert_eq!(names(&retrained), [(weights, true), (card.clone(), false)]);
        let ignored = [
            mode("README.md", "regular", None, false),
            mode("weights", "lfs", None, true),
        ];
        assert_eq!(names(&ignored), [(card, false)]);
        assert!(changed(&ignored[..1], &files).is_err());
    }
}
