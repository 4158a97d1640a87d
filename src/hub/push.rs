//! A finished run to its repository: one commit with all of its files, or none.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{Attempts, Body, Call, Client, Fault};
use super::files::{Upload, store};
use super::{Card, HubError, Settings};
use crate::config::{self, Config};
use tokio_util::sync::CancellationToken;

const JSON: &str = "application/json";
/// The line of a commit's message, as in the reference.
const MESSAGE: &str = "End of training";

/// The wish to push, checked as far as can be done without asking anyone.
#[derive(Debug)]
pub struct Push {
    id: String,
    settings: Settings,
}

/// How a push ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// With a commit; its address.
    Commit(String),
    /// The repository held the same already.
    Unchanged,
}

/// A push that failed; the run in its folder is whole.
#[derive(Debug, thiserror::Error)]
#[error(
    "{id}: not pushed: {source}\nthe run is finished and whole in {}; start it again to push again (no step is made anew), or push \
     by hand:\n  {command}",
    folder.display()
)]
pub struct PushError {
    /// The repository.
    pub id: String,
    /// The run's folder.
    pub folder: PathBuf,
    /// What pushes it by hand.
    pub command: String,
    /// The cause.
    pub source: HubError,
}

#[derive(Deserialize)]
struct Modes {
    files: Vec<Mode>,
}

/// How the Hub stores a file.
#[derive(Deserialize)]
struct Mode {
    path: String,
    #[serde(rename = "uploadMode")]
    mode: String,
    #[serde(rename = "shouldIgnore", default)]
    ignored: bool,
    /// What the repository holds under that name.
    oid: Option<String>,
}

impl Push {
    /// Whether the configuration asks for a push, and whether there is a token for it.
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

    /// Asks the Hub whose token it is; a sentence for people.
    ///
    /// # Errors
    /// [`HubError::WrongToken`] for a token it does not know; others when it can't be asked.
    pub fn check(&self, stop: &CancellationToken) -> Result<String, HubError> {
        #[derive(Deserialize)]
        struct Who {
            name: String,
        }
        let client = Client::new(&self.settings, &self.id, stop);
        let answer = client.call(&Call {
            what: format!("ask {} whose token it is", self.settings.endpoint),
            method: "GET",
            url: &client.url("api/whoami-v2"),
            headers: Vec::new(),
            body: Body::Nothing,
            expects: &[],
        })?;
        let Who { name } = answer.json()?;
        let (id, endpoint) = (&self.id, &self.settings.endpoint);
        Ok(format!("pushes to {id} at {endpoint} as {name}"))
    }

    /// Writes the card of the finished run in `folder` and pushes both. Blocks.
    ///
    /// # Errors
    /// [`PushError`], which says how to go on.
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
            command: self.by_hand(folder, &names),
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
        let uploads = names
            .iter()
            .map(|name| Upload::new(folder, name))
            .collect::<Result<Vec<_>, _>>()?;
        let client = Client::new(&self.settings, id, stop);
        let mut attempts = Attempts::new();
        loop {
            // Asked anew after each failed commit: the answer to one that was made may have been lost.
            let changed = changed(&self.modes(&client, &uploads)?, &uploads)?;
            if changed.is_empty() {
                return Ok(Pushed::Unchanged);
            }
            let large: Vec<&Upload> = changed
                .iter()
                .filter(|(_, large)| *large)
                .map(|(upload, _)| *upload)
                .collect();
            store(&client, &large)?;
            match self.commit(&client, &changed) {
                Ok(url) => return Ok(Pushed::Commit(url)),
                Err(fault) => attempts.next(fault, &format!("commit to {id}"), stop)?,
            }
        }
    }

    /// How the Hub would store the files; the repository is made if there is none.
    fn modes(&self, client: &Client<'_>, uploads: &[Upload]) -> Result<Vec<Mode>, HubError> {
        let files = uploads
            .iter()
            .map(Upload::question)
            .collect::<Result<Vec<Value>, _>>()?;
        let question = json!({"files": files}).to_string();
        let ask = |expects| {
            client.call(&Call {
                what: format!("ask how {} stores the files", self.id),
                method: "POST",
                url: &client.url(&format!("api/models/{}/preupload/main", self.id)),
                headers: Vec::new(),
                body: Body::Text(&question, JSON),
                expects,
            })
        };
        let mut answer = ask(&[404])?;
        if answer.status == 404 {
            self.create(client)?;
            answer = ask(&[])?;
        }
        Ok(answer.json::<Modes>()?.files)
    }

    fn create(&self, client: &Client<'_>) -> Result<(), HubError> {
        let (organization, name) = self.id.split_once('/').unwrap_or(("", &self.id));
        let question = json!({"name": name, "organization": organization, "type": "model"});
        let answer = client.call(&Call {
            what: format!("create {}", self.id),
            method: "POST",
            url: &client.url("api/repos/create"),
            headers: Vec::new(),
            body: Body::Text(&question.to_string(), JSON),
            // It was created meanwhile, or by an attempt whose answer was lost.
            expects: &[409],
        })?;
        if answer.status != 409 {
            errln!("  created {}", self.id);
        }
        Ok(())
    }

    /// Commits; the address of the commit.
    fn commit(&self, client: &Client<'_>, changed: &[(&Upload, bool)]) -> Result<String, Fault> {
        #[derive(Deserialize)]
        struct Committed {
            #[serde(rename = "commitUrl")]
            url: String,
        }
        let header = json!({"key": "header", "value": {"summary": MESSAGE, "description": ""}});
        let mut lines = format!("{header}\n");
        for (upload, large) in changed {
            let line = upload.line(*large).map_err(Fault::Final)?;
            lines += &format!("{line}\n");
        }
        let answer = client.once(&Call {
            what: format!("commit to {}", self.id),
            method: "POST",
            url: &client.url(&format!("api/models/{}/commit/main", self.id)),
            headers: Vec::new(),
            body: Body::Text(&lines, "application/x-ndjson"),
            expects: &[],
        })?;
        let Committed { url } = answer.json().map_err(Fault::Final)?;
        Ok(url)
    }

    /// What pushes the same files with the Hub's own tool.
    fn by_hand(&self, folder: &Path, names: &[String]) -> String {
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

/// The files that the repository does not hold yet, and which of them are large. A card that someone has written on since is
/// left as it is while the rest is the same.
fn changed<'a>(modes: &[Mode], uploads: &'a [Upload]) -> Result<Vec<(&'a Upload, bool)>, HubError> {
    let mut changed = Vec::new();
    let mut card = None;
    for upload in uploads {
        let mode = modes.iter().find(|mode| mode.path == upload.name);
        let mode = mode.ok_or_else(|| HubError::Answer {
            what: "ask how the files are stored".to_owned(),
            cause: format!("nothing is said of {}", upload.name),
        })?;
        if mode.ignored {
            errln!(
                "warning: {}: left out, as the repository's .gitignore says",
                upload.name
            );
            continue;
        }
        if mode.oid.as_deref().is_some_and(|oid| upload.is(oid)) {
            continue;
        }
        let entry = (upload, upload.is_large(mode.mode == "lfs"));
        match upload.name == Card::NAME && mode.oid.is_some() {
            true => card = Some(entry),
            false => changed.push(entry),
        }
    }
    if !changed.is_empty() {
        changed.extend(card);
    }
    Ok(changed)
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let found = |name: &str| {
            let pair = pairs.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| (*value).to_owned())
        };
        Settings::new(found).unwrap()
    }

    #[test]
    fn nothing_is_pushed_without_a_token_or_offline() {
        let wish = |pairs: &[(&str, &str)]| Push::new("user/model", settings(pairs));
        let error = wish(&[]).unwrap_err();
        assert!(error.is_config() && error.to_string().contains("HF_TOKEN"));
        let error = wish(&[("HF_TOKEN", "hf_x"), ("HF_HUB_OFFLINE", "1")]).unwrap_err();
        assert!(error.is_config() && error.to_string().contains("HF_HUB_OFFLINE"));
        wish(&[("HF_TOKEN", "hf_x")]).unwrap();
    }

    #[test]
    fn a_push_by_hand_can_be_copied_into_a_shell() {
        let push = |pairs: &[(&str, &str)]| Push::new("user/model", settings(pairs)).unwrap();
        let names = ["README.md".to_owned(), "unet/a.json".to_owned()];
        assert_eq!(
            push(&[("HF_TOKEN", "hf_x")]).by_hand(Path::new("runs/it's one"), &names),
            r"hf upload user/model 'runs/it'\''s one' . --include README.md --include unet/a.json"
        );
        let mirror = push(&[("HF_TOKEN", "hf_x"), ("HF_ENDPOINT", "http://mirror:80/")]);
        let command = mirror.by_hand(Path::new("a"), &[]);
        assert_eq!(
            command,
            "HF_ENDPOINT=http://mirror:80 hf upload user/model a ."
        );
    }

    #[test]
    fn only_what_differs_is_committed_and_a_card_with_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("README.md"), "card").unwrap();
        std::fs::write(folder.path().join("weights"), "abc").unwrap();
        let uploads = ["README.md", "weights"].map(|n| Upload::new(folder.path(), n).unwrap());
        let mode = |path: &str, mode: &str, oid: Option<&str>, ignored: bool| Mode {
            path: path.to_owned(),
            mode: mode.to_owned(),
            ignored,
            oid: oid.map(str::to_owned),
        };
        let names = |modes: &[Mode]| {
            let changed = changed(modes, &uploads).unwrap();
            let names = changed.iter().map(|(u, large)| (u.name.clone(), *large));
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
        let same = &uploads[1].sha256;
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
        assert!(changed(&ignored[..1], &uploads).is_err());
    }
}
