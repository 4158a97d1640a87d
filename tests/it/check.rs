//! `coffey check` on sound and faulty configurations.

use coffey::models::unet::WEIGHTS_STEM;
use tempfile::TempDir;

use crate::support::{
    NO_PICTURES, PRECOMPUTE, QUICKSTART, args, changed_teacher, command, copy, peak_memory, refuse,
    repository, run, says, succeed, succeed_json, teacher, text, without_tensor,
};

/// The arguments of `check` on the quickstart, with the run's output in `folder`.
fn check(folder: &TempDir, more: &[&str]) -> Vec<String> {
    let output = format!("train.output={:?}", text(&folder.path().join("run")));
    let mut args = args("check", QUICKSTART, [output]);
    args.extend(more.iter().map(|&arg| arg.to_owned()));
    args
}

#[test]
fn check_reports_every_step() {
    let folder = TempDir::new().unwrap();
    let report = succeed_json(&check(&folder, &["--json"]));
    let steps: Vec<(&str, &str)> = report["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| {
            (
                line["step"].as_str().unwrap(),
                line["status"].as_str().unwrap(),
            )
        })
        .collect();
    let names = [
        "configuration",
        "output",
        "models",
        "sources",
        "first sample",
        "encoders",
        "teacher",
        "memory",
        "dry run",
    ];
    assert_eq!(steps, names.map(|name| (name, "ok")));
    let parts = report["memory"]["parts"].as_array().unwrap();
    let part = |what: &str| {
        parts.iter().find(|p| p["what"] == what).unwrap()["bytes"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(part("optimizer"), 2 * part("student"));
    assert!(part("student") > part("teacher"));
    assert!(part("shuffle buffer") > 0 && part("activations") > 0);
    let printed = succeed(&check(&folder, &[]));
    assert!(
        printed.contains("ok       teacher") && printed.contains("M parameters"),
        "{printed}"
    );
    assert!(
        !folder.path().join("run").exists(),
        "check made the output folder"
    );
}

#[test]
fn memory_plan_is_within_15_percent_of_peak() {
    let folder = TempDir::new().unwrap();
    let output = format!("train.output={}", folder.path().join("run").display());
    let quickstart = ["-c", QUICKSTART, "-s", &output];
    let plan = succeed_json(&[&["check", "--json"], &quickstart[..]].concat());
    let parts = plan["memory"]["parts"].as_array().unwrap();
    let planned: u64 = parts.iter().map(|p| p["bytes"].as_u64().unwrap()).sum();
    let few = ["-s", "train.max_steps=4", "-s", "checkpoint.every=2"];
    let bare = [
        "-s",
        "report.endpoint_captions=0",
        "-s",
        "report.grid=false",
    ];
    let peak = peak_memory(&[&["train"], &quickstart[..], &few, &bare].concat());
    let ratio = planned as f64 / peak as f64;
    assert!(
        (0.85..1.15).contains(&ratio),
        "planned {planned}, held {peak}"
    );
}

#[test]
fn check_recognizes_precompute_configuration() {
    let printed = succeed(&["check", "-c", PRECOMPUTE]);
    assert!(
        printed.contains("coffey precompute") && !printed.contains("teacher "),
        "{printed}"
    );
}

#[test]
fn check_prints_full_configuration() {
    let toml = succeed(&[
        "check",
        "-c",
        QUICKSTART,
        "--print-config",
        "-s",
        "train.max_steps=7",
    ]);
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("full.toml");
    std::fs::write(&path, &toml).unwrap();
    assert!(
        toml.contains("max_steps = 7") && toml.contains("max_bad_fraction = 0.05"),
        "{toml}"
    );
    assert_eq!(
        succeed(&["check", "-c", text(&path), "--print-config"]),
        toml
    );
}

#[test]
fn check_stops_at_first_fault() {
    let folder = TempDir::new().unwrap();
    let faulty = |set: &str, code, step: &str, words: &[&str]| {
        let args = check(&folder, &["-s", set]);
        refuse(code, &args, words);
        let (printed, _) = run(command(&args), code);
        let last = printed.lines().last().unwrap();
        assert_eq!(
            last,
            format!("error    {step}"),
            "the message is on standard error"
        );
    };
    faulty(
        "train.max_step=3",
        2,
        "configuration",
        &["train.max_step", "max_steps"],
    );
    faulty(
        "image.resolution=63",
        2,
        "configuration",
        &["image.resolution", "multiple of 8"],
    );
    faulty(
        "model.teacher=nowhere",
        2,
        "configuration",
        &["model.teacher", "nowhere"],
    );
    faulty(
        "data.shards=s3://emoji/nothing/",
        1,
        "sources",
        &["s3://emoji/nothing/"],
    );
    faulty(
        "data.shards=s3://emoji/99999.tar",
        1,
        "sources",
        &["99999.tar", "not found"],
    );
    faulty(
        "data.shards=s3://emoji/{00002..00005}.tar",
        1,
        "sources",
        &[
            "2 of 4 shards",
            "00004.tar",
            "00005.tar",
            "data.check_shards",
        ],
    );
    faulty(
        "data.http_headers=[\"https://h Authorization: Bearer s3cret\"]",
        2,
        "configuration",
        &["data.http_headers", "environment variable"],
    );
    faulty(
        "data.shards=Cargo.toml",
        1,
        "first sample",
        &["is not a tar"],
    );
    faulty(
        "data.image_keys=[\"gif\"]",
        1,
        "first sample",
        &["no_image"],
    );
}

#[test]
fn check_and_bench_judge_by_more_than_the_first_shard() {
    let folder = TempDir::new().unwrap();
    let shards = folder.path().join("shards");
    std::fs::create_dir(&shards).unwrap();
    let whole = std::fs::read(repository("assets/quickstart/emoji/00000.tar")).unwrap();
    for n in 0..8 {
        let content = if n == 5 { whole.as_slice() } else { &[] };
        std::fs::write(shards.join(format!("{n}.tar")), content).unwrap();
    }
    let data = format!("data.shards={}/", text(&shards));
    for seed in ["train.seed=1", "train.seed=2", "train.seed=3"] {
        let printed = succeed(&check(&folder, &["-s", &data, "-s", seed]));
        says(&printed, &["5.tar: "]);
        let bench = args("bench", QUICKSTART, [data.as_str(), seed]);
        succeed(&[bench, ["--samples", "9"].map(str::to_owned).to_vec()].concat());
    }
    std::fs::write(shards.join("5.tar"), []).unwrap();
    refuse(
        1,
        &check(&folder, &["-s", &data]),
        &["no sample can be used", "which is empty: 0 bytes"],
    );
}

#[test]
fn check_looks_no_shard_up_if_told_so() {
    let folder = TempDir::new().unwrap();
    let gap = ["-s", "data.shards=s3://emoji/{00003..00004}.tar"];
    refuse(1, &check(&folder, &gap), &["1 of 2 shards", "00004.tar"]);
    let printed = succeed(&check(
        &folder,
        &[&gap[..], &["-s", "data.check_shards=false"]].concat(),
    ));
    assert!(printed.contains("shards: 2;"), "{printed}");
}

#[test]
fn header_values_are_in_no_output() {
    let folder = TempDir::new().unwrap();
    let shown = |set: &str| {
        let (out, err) = run(command(&check(&folder, &["-s", set])), 2);
        assert!(!format!("{out}{err}").contains("s3cret"), "{out}{err}");
    };
    shown("data.http_headers=[\"https://h Authorization: Bearer s3cret\"]");
    shown("data.http_headers=[\"Authorization: Bearer s3cret\"]");
    shown("data.http_headers=https://h Authorization: Bearer s3cret");
    shown("data.http_headers=[\"https://h Authorization: Bearer s3cret\"");
    shown("data.shards=\"pipe:curl -H 'Authorization: Bearer s3cret' https://h/0.tar\"");
    shown("data.shards=\"pipe:curl -u me:s3cret https://h/0.tar\"");
}

#[test]
fn check_names_missing_tensor_and_file() {
    let folder = TempDir::new().unwrap();
    let pipeline = without_tensor(&folder, "unet", WEIGHTS_STEM, "conv_in.weight");
    let set = format!("model.teacher={:?}", text(&pipeline));
    let args = check(&folder, &["-s", &set]);
    refuse(1, &args, &["conv_in.weight", "is missing", "[48, 4, 3, 3]"]);
    std::fs::remove_file(pipeline.join("tokenizer/vocab.json")).unwrap();
    refuse(1, &args, &["no tokenizer/tokenizer.json", "vocab.json"]);
    std::fs::remove_dir_all(pipeline.join("tokenizer")).unwrap();
    refuse(1, &args, &["no folder tokenizer"]);
}

#[test]
fn check_refuses_unwritable_output() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("run"), "a file").unwrap();
    refuse(
        2,
        &check(&folder, &[]),
        &["train.output", "is not a folder"],
    );
}

/// A copy of the teacher whose weights of `part` are `factor` times as large in one tensor.
fn scaled(folder: &TempDir, part: &str, tensor: &str, factor: f64) -> String {
    let stem = match part {
        "text_encoder" => "model",
        _ => WEIGHTS_STEM,
    };
    let pipeline = changed_teacher(folder, part, stem, |tensors| {
        let scaled = (tensors.get(tensor).unwrap() * factor).unwrap();
        tensors.insert(tensor.to_owned(), scaled);
    });
    format!("model.teacher={:?}", text(&pipeline))
}

#[test]
fn dry_run_is_in_configured_types() {
    for (part, tensor, narrow, exact, words) in [
        (
            "unet",
            "conv_in.weight",
            "train.mixed_precision=fp16",
            "train.mixed_precision=bf16",
            [
                "the teacher",
                r#"set train.mixed_precision to "bf16" or "no""#,
            ],
        ),
        (
            "vae",
            "encoder.conv_in.weight",
            "encode.vae_dtype=f16",
            "encode.vae_dtype=f32",
            ["the VAE", r#"set encode.vae_dtype to "f32" or "bf16""#],
        ),
    ] {
        let folder = TempDir::new().unwrap();
        let teacher = scaled(&folder, part, tensor, 3e5);
        let set = |more: &str| check(&folder, &["-s", &teacher, "-s", more]);
        refuse(2, &set(narrow), &words);
        succeed(&set(exact));
    }
    let folder = TempDir::new().unwrap();
    let teacher = scaled(&folder, "unet", "conv_in.weight", f64::INFINITY);
    for precision in ["no", "fp16"] {
        let precision = format!("train.mixed_precision={precision}");
        let args = check(&folder, &["-s", &teacher, "-s", &precision]);
        refuse(1, &args, &["the teacher", "weights are damaged"]);
    }
}

#[test]
fn overflow_in_16_bits_advises_another_type() {
    let folder = TempDir::new().unwrap();
    let teacher = scaled(&folder, "unet", "conv_in.weight", 3e5);
    let output = format!("train.output={:?}", text(&folder.path().join("run")));
    let small = [
        &output,
        &teacher,
        "train.batch_size=1",
        "image.resolution=32",
        "train.mixed_precision=fp16",
        "checkpoint.every=1000",
    ];
    let args = args("train", QUICKSTART, [&small[..], &NO_PICTURES].concat());
    let words = [
        "the loss, whatever the loss scale, is not finite",
        "the teacher's (x_prev)",
        r#"set train.mixed_precision to "bf16" or "no""#,
        "no checkpoint has been saved",
    ];
    let said = refuse(1, &args, &words);
    assert!(!said.contains("learning_rate"), "{said}");
}

#[test]
fn schedule_that_ends_in_pure_noise_is_refused() {
    let folder = TempDir::new().unwrap();
    let pipeline = folder.path().join("teacher");
    copy(&teacher(), &pipeline);
    let path = pipeline.join("scheduler/scheduler_config.json");
    let file: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let set = format!("model.teacher={:?}", text(&pipeline));
    let betas: Vec<f64> = (0..1000)
        .map(|i| 0.0005 + 0.9995 * f64::from(i) / 999.0)
        .collect();
    for (key, value) in [
        ("trained_betas", serde_json::json!(betas)),
        ("beta_end", 1.0.into()),
        ("rescale_betas_zero_snr", true.into()),
    ] {
        let mut changed = file.clone();
        changed[key] = value;
        std::fs::write(&path, changed.to_string()).unwrap();
        let args = check(&folder, &["-s", &set]);
        refuse(
            1,
            &args,
            &["scheduler_config.json", key, "epsilon", "v_prediction"],
        );
        changed["prediction_type"] = "v_prediction".into();
        std::fs::write(&path, changed.to_string()).unwrap();
        succeed(&args);
    }
}

#[test]
fn messages_hold_no_backtrace() {
    let folder = TempDir::new().unwrap();
    let pipeline = folder.path().join("teacher");
    copy(&teacher(), &pipeline);
    let path = pipeline.join("tokenizer/tokenizer_config.json");
    let mut file: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    file["model_max_length"] = 100.into();
    std::fs::write(&path, file.to_string()).unwrap();
    let teacher = format!("model.teacher={:?}", text(&pipeline));
    let latents = format!("latents.output={:?}", text(&folder.path().join("latents")));
    let out = folder.path().join("image.png");
    let drawn = [
        "sample",
        "--prompt",
        "x",
        "--model",
        text(&pipeline),
        "--out",
        text(&out),
    ];
    let output = format!("train.output={:?}", text(&folder.path().join("run")));
    for args in [
        drawn.map(str::to_owned).to_vec(),
        check(&folder, &["-s", &teacher]),
        args("train", QUICKSTART, [&teacher, &output]),
        args("precompute", PRECOMPUTE, [&teacher, &latents]),
    ] {
        for backtraces in ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"] {
            let mut command = command(&args);
            command.env(backtraces, "full");
            let (out, err) = run(command, 1);
            let last = err.lines().last().unwrap();
            assert!(last.starts_with("error: "), "{err}");
            says(last, &["100 tokens, but the text encoder has 77 positions"]);
            assert!(
                !format!("{out}{err}").contains("candle_core::"),
                "{out}{err}"
            );
        }
    }
}
