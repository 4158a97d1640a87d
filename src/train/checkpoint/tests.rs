use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const FILES: [&str; 5] = [
    "optimizer.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet_target/config.json",
    "unet_target/diffusion_pytorch_model.safetensors",
];

/// The state of step `step`, without checksums.
fn state(step: u64) -> Value {
    json!({
        "format": FORMAT,
        "step": step,
        "samples": 8 * step,
        "optimizer": {"steps": step, "loss_scale": {"factor": 65536.0, "steps": step}},
        "cursor": {
            "version": 3,
            "identity": {
                "seed": 1, "lanes": 1, "order": "shuffled", "resample": true, "open_shards": 2,
                "shuffle_buffer": 10, "shuffle_buffer_mb": 1, "max_samples": null, "shards": "2:ab",
                "selection": "4:cd"
            },
            "lanes": [{
                "lane": 0, "position": 16, "epoch": 0, "next_batch": 2, "broken": {"decode_error": 1},
                "place": {
                    "epoch": 0, "accepted": 20,
                    "open": [{"id": 0, "shard": 1, "epoch": 0, "taken": 9, "chosen": 8}],
                    "turn": 1, "next": {"epoch": 1, "index": 1}, "visits": 1, "read": 21,
                    "shuffle": {"draws": 16, "filling": false}
                },
                "buffer": [[0, 3], [0, 7]],
                "visits": {"0": {"shard": 1, "epoch": 0, "through": 16}}
            }]
        },
        "configuration": "[train]\nseed = 1\n",
        "checksums": {}
    })
}

/// A folder with the checkpoints of steps 1 and 2; their files hold any bytes.
fn run() -> TempDir {
    let folder = TempDir::new().unwrap();
    for step in [1, 2] {
        let place = folder.path().join(format!("checkpoint-{step}"));
        let mut state: CheckpointState = serde_json::from_value(state(step)).unwrap();
        for name in FILES {
            let (path, content) = (place.join(name), format!("{name} of {step}"));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &content).unwrap();
            let sha256 = format!("{:x}", Sha256::digest(&content));
            state.checksums.insert(name.to_owned(), sha256);
        }
        fs::write(place.join(STATE), state.to_text().unwrap()).unwrap();
    }
    folder
}

/// The step that a run resumes from, and why not from a later one.
fn newest(run: &TempDir) -> (u64, Vec<String>) {
    let store = CheckpointStore::in_folder(run.path(), 2);
    let (found, wrong) = store.newest_whole().unwrap();
    let wrong = wrong.iter().map(ToString::to_string).collect();
    (found.unwrap().state.step, wrong)
}

fn last(run: &TempDir) -> PathBuf {
    run.path().join("checkpoint-2")
}

/// Changes the `state.json` of checkpoint 2, with or without its own checksum.
fn edit(run: &TempDir, is_sealed: bool, change: impl FnOnce(&mut Value)) {
    let path = last(run).join(STATE);
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state.as_object_mut().unwrap().remove("sha256");
    change(&mut state);
    let mut text = serde_json::to_vec_pretty(&state).unwrap();
    if is_sealed {
        text.truncate(text.len() - 2);
        let end = end_with_sha256(&text);
        text.extend(end.into_bytes());
    }
    fs::write(path, text).unwrap();
}

/// Every value in `value` by its JSON pointer.
fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
    let mut visit = |key: &str, value: &Value| {
        let key = key.replace('~', "~0").replace('/', "~1");
        let at = format!("{at}/{key}");
        all.push(at.clone());
        pointers(value, &at, all);
    };
    match value {
        Value::Object(object) => object.iter().for_each(|(key, value)| visit(key, value)),
        Value::Array(array) => {
            for (index, value) in array.iter().enumerate() {
                visit(&index.to_string(), value);
            }
        }
        _ => {}
    }
}

#[test]
fn checkpoint_is_read_as_written_and_without_its_own_checksum() {
    let run = run();
    assert_eq!(newest(&run), (2, Vec::new()));
    // As versions before the checksum wrote it.
    edit(&run, false, |_| {});
    assert_eq!(newest(&run), (2, Vec::new()));
}

#[test]
fn state_with_a_changed_byte_is_passed_over() {
    let run = run();
    let path = last(&run).join(STATE);
    let whole = fs::read(&path).unwrap();
    let start = whole.len() - end_with_sha256(b"").len();
    let name = start..start + BEFORE_SHA256.len();
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        fs::write(&path, &changed).unwrap();
        // Another name of the field `sha256` leaves the content as it was; a changed format is refused, not passed over.
        match open(&last(&run)) {
            Ok(_) => assert!(name.contains(&at), "{at}"),
            Err(TrainError::Checkpoint { .. } | TrainError::CheckpointFormat { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        fs::write(&path, &whole[..at]).unwrap();
        assert!(matches!(
            open(&last(&run)),
            Err(TrainError::Checkpoint { .. })
        ));
    }
}

#[test]
fn every_changed_field_is_read_or_refused() {
    let values = [
        json!(0),
        json!(-1),
        json!(1_u64 << 62),
        json!("x"),
        json!(null),
        json!([]),
        json!({}),
    ];
    let mut all = Vec::new();
    pointers(&state(2), "", &mut all);
    assert!(all.len() > 50, "{all:?}");
    let run = run();
    let path = last(&run).join(STATE);
    let whole = fs::read(&path).unwrap();
    for pointer in &all {
        for value in values.iter().map(Some).chain([None]) {
            fs::write(&path, &whole).unwrap();
            edit(&run, true, |state| match value {
                Some(value) => *state.pointer_mut(pointer).unwrap() = value.clone(),
                None => {
                    let (parent, key) = pointer.rsplit_once('/').unwrap();
                    if let Some(object) = state.pointer_mut(parent).unwrap().as_object_mut() {
                        object.remove(key);
                    }
                }
            });
            let changed = format!("{pointer} = {value:?}");
            let store = CheckpointStore::in_folder(run.path(), 2);
            match store.newest_whole() {
                Ok((Some(found), wrong)) => match found.state.step {
                    1 => assert!(wrong[0].to_string().contains("state.json: "), "{changed}"),
                    _ => assert!(wrong.is_empty(), "{changed}"),
                },
                Ok((None, wrong)) => panic!("{changed}: {wrong:?}"),
                Err(TrainError::CheckpointFormat { .. }) => assert_eq!(pointer, "/format"),
                Err(error) => panic!("{changed}: {error}"),
            }
        }
    }
}

#[test]
fn step_must_be_that_of_the_folder() {
    let run = run();
    edit(&run, true, |state| state["step"] = json!(7));
    let (step, wrong) = newest(&run);
    assert_eq!(step, 1);
    assert!(
        wrong[0].ends_with("state.json: it is of step 7, and the checkpoint of step 2"),
        "{wrong:?}"
    );
    // A copy under another name has the step of its state.
    let copy = run.path().join("best");
    fs::rename(last(&run), &copy).unwrap();
    assert_eq!(open(&copy).unwrap().state.step, 7);
}

#[test]
fn checksums_name_the_files_of_the_checkpoint() {
    let outside = TempDir::new().unwrap();
    let other = outside.path().join("other");
    fs::write(&other, "other").unwrap();
    let sha256 = format!("{:x}", Sha256::digest("other"));
    for name in [
        "",
        "/",
        "..",
        "../checkpoint-1/state.json",
        "unet/../../x",
        other.to_str().unwrap(),
    ] {
        let run = run();
        edit(&run, true, |state| state["checksums"][name] = json!(sha256));
        let (step, wrong) = newest(&run);
        assert_eq!(step, 1, "{name}");
        assert!(
            wrong[0].contains("is no path in the checkpoint"),
            "{wrong:?}"
        );
    }
    for name in FILES {
        let run = run();
        edit(&run, true, |state| {
            state["checksums"].as_object_mut().unwrap().remove(name);
        });
        let (step, wrong) = newest(&run);
        assert_eq!(step, 1, "{name}");
        assert!(
            wrong[0].ends_with(&format!("checksums lacks {name}")),
            "{wrong:?}"
        );
    }
}

#[test]
fn every_damaged_file_is_refused() {
    let outside = TempDir::new().unwrap();
    type Damage = fn(&Path, &Path);
    let damages: [(&str, Damage); 6] = [
        ("does not have the checksum", |path, _| {
            let content = fs::read(path).unwrap();
            fs::write(path, &content[..content.len() / 2]).unwrap();
        }),
        ("does not have the checksum", |path, _| {
            fs::write(path, "").unwrap()
        }),
        ("No such file", |path, _| fs::remove_file(path).unwrap()),
        ("it is a folder, not a file", |path, _| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        ("it is a named pipe, not a file", |path, _| {
            fs::remove_file(path).unwrap();
            rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RWXU).unwrap();
        }),
        ("is a link out of the checkpoint", |path, outside| {
            let away = outside.join("away");
            fs::rename(path, &away).unwrap();
            std::os::unix::fs::symlink(away, path).unwrap();
        }),
    ];
    for name in FILES {
        for (what, damage) in damages {
            let run = run();
            damage(&last(&run).join(name), outside.path());
            let (step, wrong) = newest(&run);
            assert_eq!(step, 1, "{name}");
            assert!(
                wrong[0].contains(name) && wrong[0].contains(what),
                "{wrong:?}"
            );
        }
    }
    // `state.json` itself may be a link: its content is verified.
    for (what, damage) in &damages[1..5] {
        let run = run();
        damage(&last(&run).join(STATE), outside.path());
        let (step, wrong) = newest(&run);
        assert_eq!(step, 1, "{what}");
        assert!(wrong[0].contains(STATE), "{wrong:?}");
    }
}

#[test]
fn weights_without_a_checksum_are_not_loaded() {
    let run = run();
    let index = "unet/diffusion_pytorch_model.safetensors.index.json";
    fs::write(last(&run).join(index), "{}").unwrap();
    let (step, wrong) = newest(&run);
    assert_eq!(step, 1);
    assert!(
        wrong[0].contains(index) && wrong[0].contains("remove it"),
        "{wrong:?}"
    );
}
