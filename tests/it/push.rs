//! Pushing a finished run to a fake Hub: the files that arrive, the messages of a push that fails, and that no message shows the
//! token.

use crate::support::hub::User;
use crate::support::receiver::{Receiver, TOKEN};
use crate::support::{NO_PICTURES, QUICKSTART, args, python, run, says, steps_made, teacher, text};

const ID: &str = "someone/emoji-student";
const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

/// Runs `command` on a run of one step in `user`'s folder; returns everything printed, after a check that it has no secret.
#[track_caller]
fn ends(user: &User, code: i32, command: &str, settings: &[&str], env: &[(&str, &str)]) -> String {
    let output = format!("train.output={}", text(&user.path("run")));
    let push_to = format!("hub.push_to={ID}");
    let own = [
        output.as_str(),
        push_to.as_str(),
        "train.batch_size=2",
        "train.max_steps=1",
        "validation.every=1",
        "validation.steps=1",
        "validation.prompts=['red apple']",
        "validation.images_per_prompt=1",
    ];
    let all = [&NO_PICTURES[..], &own, settings].concat();
    let mut command = user.command(&args(command, QUICKSTART, all));
    command.env("HF_TOKEN", TOKEN).envs(env.iter().copied());
    let (out, err) = run(command, code);
    let printed = format!("{out}{err}");
    for secret in [TOKEN, "not-to-be-seen-either"] {
        assert!(!printed.contains(secret), "{printed}");
    }
    printed
}

#[track_caller]
fn train(user: &User, code: i32) -> String {
    ends(user, code, "train", &[], &[])
}

/// Takes the requests as method and path, after a check that the Hub got the token and the store did not.
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
fn push_uploads_run_in_one_commit() {
    let hub = Receiver::start(ID, 1_000_000);
    // Temporary faults: of a part, of the end of a part without an answer, and of a commit whose answer is lost.
    hub.fail("/2?", 500, 1);
    hub.fail("/3?", 0, 1);
    hub.fail("/preupload/", 429, 1);
    hub.fail("/commit/", 0, 1);
    let user = User::new(&hub.endpoint);
    let printed = train(&user, 0);
    says(
        &printed,
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
            std::fs::read(user.path("run").join(name)).unwrap(),
            "{name}"
        );
    }
    let card = String::from_utf8(files["README.md"].clone()).unwrap();
    assert!(!card.contains(text(user.folder.path())), "{card}");

    // A second start trains nothing and pushes nothing, and keeps a card that was edited on the Hub.
    let before = std::fs::read(user.path("run/metrics.jsonl")).unwrap();
    says(&train(&user, 0), &["holds the same already"]);
    hub.edit("README.md", b"by hand");
    says(&train(&user, 0), &["holds the same already"]);
    assert_eq!(hub.files().unwrap()["README.md"], b"by hand");
    let requests = asked(&hub);
    assert_eq!(count(&requests, "PUT") + count(&requests, "/commit/"), 0);
    assert_eq!(
        std::fs::read(user.path("run/metrics.jsonl")).unwrap(),
        before
    );
}

mod needs_python {
    use super::*;

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with huggingface_hub and diffusers"]
    fn pushed_student_draws_as_model_card_says() {
        let hub = Receiver::start(ID, 1_000_000);
        let user = User::new(&hub.endpoint);
        train(&user, 0);
        let (teacher, work) = (teacher(), user.folder.path());
        let args = [hub.endpoint.as_str(), ID, text(&teacher), text(work)];
        python("use_pushed.py", &args);
    }
}

#[test]
fn failed_push_keeps_run_and_names_command() {
    let hub = Receiver::start(ID, usize::MAX);
    let user = User::new(&hub.endpoint);
    let by_hand = format!(
        "HF_ENDPOINT={} hf upload {ID} {} . --include README.md",
        hub.endpoint,
        text(&user.path("run"))
    );
    hub.fail("/commit/", 413, 1);
    let printed = train(&user, 1);
    says(
        &printed,
        &[
            "HTTP 413: not now, you with Bearer REDACTED",
            &by_hand,
            "the run is complete in",
        ],
    );
    assert!(user.path("run").join(WEIGHTS).is_file());
    assert_eq!((steps_made(&user.path("run")), hub.commits()), (1, 0));
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
        let printed = train(&user, 1);
        says(&printed, words);
        says(&printed, &[&by_hand]);
        hub.behave();
        assert_eq!(hub.commits(), 0);
    }
    asked(&hub);
    // The weights were stored by the first push.
    says(&train(&user, 0), &["pushed: http"]);
    let requests = asked(&hub);
    assert_eq!((count(&requests, "PUT"), hub.commits()), (0, 1));
    assert_eq!(hub.files().unwrap().len(), 8);
    assert_eq!(steps_made(&user.path("run")), 1);
}

#[test]
fn push_obstacles_are_reported_before_training() {
    let hub = Receiver::start(ID, usize::MAX);
    let user = User::new(&hub.endpoint);
    for command in ["train", "check"] {
        let refused = |code, settings: &[&str], env: &[(&str, &str)], words: &[&str]| {
            let printed = ends(&user, code, command, settings, env);
            says(&printed, words);
            assert!(!user.path("run").exists());
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
        &ends(&user, 0, "check", &[], &[]),
        &["hub", &format!("pushes to {ID} at")],
    );
    // The token that `hf auth login` stores is accepted as well.
    let home = user.path("hf");
    std::fs::create_dir_all(&home).unwrap();
    std::fs::write(home.join("token"), format!("{TOKEN}\n")).unwrap();
    says(
        &ends(&user, 0, "check", &[], &[("HF_TOKEN", "")]),
        &["as someone"],
    );

    // A run starts although the Hub cannot be reached.
    let offline = User::new("http://127.0.0.1:9");
    let printed = train(&offline, 1);
    says(
        &printed,
        &[
            "warning: can't ask",
            "not pushed: can't ask how",
            "hf upload",
        ],
    );
    assert_eq!(steps_made(&offline.path("run")), 1);
    assert!(offline.path("run").join(WEIGHTS).is_file());
}
