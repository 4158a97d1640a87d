//! Pushing a finished run to the Hub, over a stand-in: what arrives, what is said when it can't, and that the token is shown to
//! nobody.

use std::path::PathBuf;

use crate::support::receiver::{Receiver, TOKEN};
use crate::support::{command, python, teacher, text, texts};
use tempfile::TempDir;

const ID: &str = "someone/emoji-student";
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

/// A user with a run.
struct Place {
    folder: TempDir,
    endpoint: String,
}

impl Place {
    fn new(endpoint: &str) -> Self {
        Self {
            folder: TempDir::new().unwrap(),
            endpoint: endpoint.to_owned(),
        }
    }

    fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// A command over a run of one step; everything it said, with the token looked for in it.
    #[track_caller]
    fn ends(
        &self,
        code: i32,
        command_name: &str,
        settings: &[&str],
        env: &[(&str, &str)],
    ) -> String {
        let output = format!("train.output={}", text(&self.run()));
        let push_to = format!("hub.push_to={ID}");
        let fixed = [
            output.as_str(),
            push_to.as_str(),
            "train.batch_size=2",
            "train.max_steps=1",
            "report.endpoint_captions=0",
            "report.grid=false",
            "validation.every=1",
            "validation.steps=1",
            "validation.prompts=['red apple']",
            "validation.images_per_prompt=1",
        ];
        let mut args = vec![command_name, "-c", "configs/quickstart.toml"];
        for setting in fixed.iter().chain(settings) {
            args.extend(["-s", setting]);
        }
        let mut command = command(&args);
        for name in ["HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT"] {
            command.env_remove(name);
        }
        command
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_HOME", self.folder.path().join("hf"))
            .env("HF_TOKEN", TOKEN)
            .envs(env.iter().copied());
        let output = command.output().unwrap();
        let (out, err) = texts(&output);
        let said = format!("{out}{err}");
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        for secret in [TOKEN, "not-to-be-seen-either"] {
            assert!(!said.contains(secret), "{said}");
        }
        said
    }

    fn train(&self, code: i32) -> String {
        self.ends(code, "train", &[], &[])
    }

    fn steps(&self) -> usize {
        let lines = std::fs::read_to_string(self.run().join("metrics.jsonl")).unwrap();
        lines.lines().count()
    }
}

#[track_caller]
fn says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "should say {word:?}: {said}");
    }
}

/// The requests, as method and path; each with the token if it went to the Hub's own interface, none if elsewhere.
#[track_caller]
fn asked(hub: &Receiver) -> Vec<String> {
    let requests = hub.asked();
    for request in &requests {
        let completes = request.line.contains("/complete/");
        let wanted = (!request.to_storage).then(|| format!("Bearer {TOKEN}"));
        assert!(completes || request.authorization == wanted, "{request:?}");
    }
    requests.into_iter().map(|request| request.line).collect()
}

fn count(asked: &[String], of: &str) -> usize {
    asked.iter().filter(|line| line.contains(of)).count()
}

#[test]
fn a_finished_run_arrives_whole_in_one_commit_and_works_as_the_card_says() {
    let hub = Receiver::start(ID, 1_000_000);
    // What passes: a part, a part's end without an answer, and a commit whose answer is lost.
    hub.fail("/2?", 500, 1);
    hub.fail("/3?", 0, 1);
    hub.fail("/preupload/", 429, 1);
    hub.fail("/commit/", 0, 1);
    let place = Place::new(&hub.endpoint);
    let said = place.train(0);
    says(
        &said,
        &[
            &format!("pushes to {ID}"),
            "as someone",
            "created",
            "pushed",
        ],
    );
    let requests = asked(&hub);
    assert!(count(&requests, "PUT /put/") > 6, "{requests:#?}");
    assert_eq!(count(&requests, "POST /complete/"), 2);
    assert_eq!(count(&requests, "POST /api/repos/create"), 1);
    assert_eq!((count(&requests, "/commit/"), hub.commits()), (1, 1));
    let files = hub.files().unwrap();
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    let expected = [
        "README.md",
        "loss.png",
        "samples/step-1-online.png",
        "samples/step-1-target.png",
        "unet/config.json",
        WEIGHTS,
        "unet_target/config.json",
        "unet_target/diffusion_pytorch_model.safetensors",
    ];
    assert_eq!(names, expected);
    for (name, content) in &files {
        assert_eq!(
            *content,
            std::fs::read(place.run().join(name)).unwrap(),
            "{name}"
        );
    }
    let card = String::from_utf8(files["README.md"].clone()).unwrap();
    assert!(!card.contains(text(place.folder.path())), "{card}");

    // Once more: nothing is trained and nothing pushed; and a card that was edited there stays.
    let before = std::fs::read(place.run().join("metrics.jsonl")).unwrap();
    says(&place.train(0), &["holds the same already"]);
    hub.edit("README.md", b"by hand");
    says(&place.train(0), &["holds the same already"]);
    assert_eq!(hub.files().unwrap()["README.md"], b"by hand");
    let requests = asked(&hub);
    assert_eq!(count(&requests, "PUT") + count(&requests, "/commit/"), 0);
    assert_eq!(
        std::fs::read(place.run().join("metrics.jsonl")).unwrap(),
        before
    );

    hub.edit("README.md", card.as_bytes());
    let endpoint = PathBuf::from(&hub.endpoint);
    python(
        "use_pushed.py",
        &[&endpoint, ID.as_ref(), &teacher(), place.folder.path()],
    );
}

#[test]
fn a_push_that_fails_says_how_to_go_on_and_loses_nothing() {
    let hub = Receiver::start(ID, usize::MAX);
    let place = Place::new(&hub.endpoint);
    let by_hand = format!(
        "HF_ENDPOINT={} hf upload {ID} {} . --include README.md",
        hub.endpoint,
        text(&place.run())
    );
    hub.fail("/commit/", 413, 1);
    let said = place.train(1);
    says(
        &said,
        &[
            "HTTP 413: not now, you with Bearer REDACTED",
            &by_hand,
            "finished and whole",
        ],
    );
    assert!(place.run().join(WEIGHTS).is_file());
    assert_eq!((place.steps(), hub.commits()), (1, 0));
    assert_eq!(count(&asked(&hub), "PUT /put/"), 5);

    for (on, status, words) in [
        (
            "/commit/",
            403,
            &["does not let this token commit", "write access"][..],
        ),
        ("/preupload/", 401, &["does not accept the token"]),
        ("/batch", 500, &["HTTP 500", "5 attempts"]),
        ("/commit/", 307, &["has moved", "hub.push_to"]),
    ] {
        hub.fail(on, status, usize::MAX);
        let said = place.train(1);
        says(&said, words);
        says(&said, &[&by_hand]);
        hub.behave();
        assert_eq!(hub.commits(), 0);
    }
    asked(&hub);
    // The weights are there from the first time.
    says(&place.train(0), &["pushed: http"]);
    let requests = asked(&hub);
    assert_eq!((count(&requests, "PUT"), hub.commits()), (0, 1));
    assert_eq!(hub.files().unwrap().len(), 8);
    assert_eq!(place.steps(), 1);
}

#[test]
fn what_stands_in_the_way_of_a_push_is_told_before_training() {
    let hub = Receiver::start(ID, usize::MAX);
    let place = Place::new(&hub.endpoint);
    for command in ["train", "check"] {
        let refused = |code, settings: &[&str], env: &[(&str, &str)], words: &[&str]| {
            let said = place.ends(code, command, settings, env);
            says(&said, words);
            assert!(!place.run().exists());
        };
        refused(
            2,
            &[],
            &[("HF_TOKEN", "")],
            &["hub.push_to", "there is no token", "hf auth login"],
        );
        refused(
            2,
            &[],
            &[("HF_HUB_OFFLINE", "1")],
            &["HF_HUB_OFFLINE is set"],
        );
        for wrong in [
            "student",
            "someone/",
            "a/b/c",
            "someone/stu--dent",
            "someone/student.git",
        ] {
            let setting = format!("hub.push_to={wrong}");
            refused(2, &[&setting], &[], &["must be a repository of the Hub"]);
        }
        assert!(hub.asked().is_empty());
        let wrong = [("HF_TOKEN", "hf_of_someone_else")];
        refused(1, &[], &wrong, &["does not accept the token (HTTP 401)"]);
        hub.asked();
    }
    says(
        &place.ends(0, "check", &[], &[]),
        &["hub", &format!("pushes to {ID} at")],
    );
    // The token of `hf auth login` does as well.
    let home = place.folder.path().join("hf");
    std::fs::create_dir_all(&home).unwrap();
    std::fs::write(home.join("token"), format!("{TOKEN}\n")).unwrap();
    says(
        &place.ends(0, "check", &[], &[("HF_TOKEN", "")]),
        &["as someone"],
    );

    // A Hub that can't be reached is no reason not to train.
    let nobody = Place::new("http://127.0.0.1:9");
    let said = nobody.train(1);
    says(
        &said,
        &[
            "warning: can't ask",
            "not pushed: can't ask how",
            "hf upload",
        ],
    );
    assert_eq!(nobody.steps(), 1);
    assert!(nobody.run().join(WEIGHTS).is_file());
}
