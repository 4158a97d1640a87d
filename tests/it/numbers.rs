//! Numbers out of range, and the greatest that are in range: a clean error or a run, never a panic or an abort.

use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device};
use coffey::conditioning::TextEncoder;
use coffey::diffusion::NoiseSchedule;
use coffey::models::{AutoencoderKl, UNet};
use coffey::ops::Attention;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    PRECOMPUTE, QUICKSTART, args, command, copy, refuse, refused, run, says, succeed, teacher,
    text, texts,
};

/// Values as JSON has them in Python's form.
const VALUES: [&str; 13] = [
    "0",
    "1",
    "2",
    "-1",
    "7",
    "65536",
    "2147483648",
    "4611686018427387904",
    "1e30",
    "-1e300",
    "NaN",
    "Infinity",
    "-Infinity",
];

/// Every number below `value`, with the keys that lead to it.
fn numbers(value: &Value, place: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(place.to_owned()),
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                numbers(item, &format!("{place}/{i}"), found);
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                numbers(value, &format!("{place}/{key}"), found);
            }
        }
        _ => {}
    }
}

/// Loads the part of a pipeline that a file configures.
fn load(pipeline: &Path, part: &str) -> Result<(), String> {
    let (folder, cpu) = (pipeline.join(part), &Device::Cpu);
    let loaded = match part {
        "unet" => UNet::load(&folder, DType::F32, cpu, Attention::MemoryEfficient).map(drop),
        "vae" => AutoencoderKl::load(&folder, DType::F32, cpu).map(drop),
        "scheduler" => {
            return NoiseSchedule::read(&folder)
                .map(drop)
                .map_err(|e| e.to_string());
        }
        _ => TextEncoder::load(pipeline, DType::F32, cpu).map(drop),
    };
    loaded.map_err(|error| error.to_string())
}

#[test]
fn model_configurations_with_any_number_load_or_name_the_key() {
    let folder = TempDir::new().unwrap();
    let pipeline = folder.path().join("teacher");
    copy(&teacher(), &pipeline);
    let (mut tried, mut refused) = (0, 0);
    for (part, name, more) in [
        (
            "unet",
            "config.json",
            &["time_embedding_dim", "time_cond_proj_dim"][..],
        ),
        ("vae", "config.json", &[]),
        ("text_encoder", "config.json", &[]),
        ("tokenizer", "tokenizer_config.json", &[]),
        ("scheduler", "scheduler_config.json", &[]),
    ] {
        let path = pipeline.join(part).join(name);
        let whole = std::fs::read_to_string(&path).unwrap();
        let mut file: Value = serde_json::from_str(&whole).unwrap();
        for key in more {
            file[*key] = 1.into();
        }
        let mut places = Vec::new();
        numbers(&file, "", &mut places);
        for place in places {
            let mut file = file.clone();
            for key in more.iter().filter(|key| place != format!("/{key}")) {
                file[*key] = Value::Null;
            }
            *file.pointer_mut(&place).unwrap() = "@".into();
            for value in VALUES {
                std::fs::write(&path, file.to_string().replace("\"@\"", value)).unwrap();
                tried += 1;
                let Err(message) = load(&pipeline, part) else {
                    continue;
                };
                refused += 1;
                let key = place.split('/').nth(1).unwrap();
                let what = format!("{path:?} with {key} = {value}: {message}");
                assert!(message.contains(text(&pipeline)), "{what}");
                // A number in range that is not the weights' is a fault of a tensor, or of the keys that must divide it.
                let named = [key, "tensor", "betas", "divisor of"];
                assert!(named.iter().any(|word| message.contains(word)), "{what}");
                assert!(message.len() < 1200, "{what}");
            }
        }
        std::fs::write(&path, whole).unwrap();
    }
    assert!(tried > 500 && refused > 250, "{refused} of {tried}");
}

#[test]
fn safetensors_headers_that_lie_are_refused() {
    let folder = TempDir::new().unwrap();
    let pipeline = folder.path().join("teacher");
    copy(&teacher(), &pipeline);
    let path = pipeline.join("unet/diffusion_pytorch_model.safetensors");
    let file = |length: u64, header: &str, data: usize| {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let tensor = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    let whole = |header: String, data| file(header.len() as u64, &header, data);
    for bytes in [
        file(u64::MAX, "{}", 0),
        file(1 << 40, "{}", 0),
        file(99_999_999, "{}", 0),
        file(0, "", 0),
        whole("{".to_owned(), 0),
        whole(tensor("[4]", 0, 1 << 40), 16),
        whole(tensor("[4611686018427387904, 4]", 0, 16), 16),
        whole(tensor("[4294967296, 4294967296]", 0, 0), 0),
        whole(tensor("[4]", 16, 0), 16),
        whole(tensor("[4]", 4, 20), 16),
        whole(tensor("[5]", 0, 16), 16),
        whole(tensor("[-4]", 0, 16), 16),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let message = load(&pipeline, "unet").unwrap_err();
        says(&message, &[text(&path), "not a readable safetensors file"]);
    }
}

/// The numeric keys of the documentation, each with its least and its greatest value; they are compared with the source elsewhere.
fn documented_numbers() -> Vec<(String, [String; 2])> {
    let page = include_str!("../../docs/configuration.md");
    let rows = page.lines().filter_map(|line| {
        let mut cells = line.split(" | ");
        let key = cells.next()?.strip_prefix("| `")?.strip_suffix('`')?;
        cells
            .next()
            .filter(|kind| ["integer", "number"].contains(kind))?;
        let meaning: Vec<&str> = cells.nth(1)?.split([' ', ',', ';', ':']).collect();
        let number = |word: &str| word.trim_end_matches('.').parse::<f64>().is_ok();
        let bounds = meaning
            .windows(3)
            .find(|words| words[1] == "to" && number(words[0]) && number(words[2]))?;
        let bound = |word: &str| word.trim_end_matches('.').to_owned();
        Some((key.to_owned(), [bound(bounds[0]), bound(bounds[2])]))
    });
    rows.collect()
}

/// The command in a shell that limits its address space. Kilobytes.
fn limited(kilobytes: u64, args: &[String]) -> Command {
    let binary = command(&[""; 0]);
    let mut shell = Command::new("sh");
    shell
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .envs(
            binary
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .args([
            "-c",
            &format!("ulimit -v {kilobytes} && exec \"$0\" \"$@\""),
        ])
        .arg(binary.get_program())
        .args(args);
    shell
}

#[test]
fn greatest_numbers_are_checked_in_little_memory() {
    let folder = TempDir::new().unwrap();
    let numbers = documented_numbers();
    assert!(numbers.len() > 40, "{numbers:?}");
    let output = format!("train.output={:?}", text(&folder.path().join("run")));
    let audit = format!("audit.dir={:?}", text(&folder.path().join("audit")));
    for (key, [_, most]) in numbers {
        let setting = format!("{key}={most}");
        let settings = [output.as_str(), &audit, &setting];
        // The other numbers decide no sizes.
        let sizes = !most.contains(['.', 'e']) && most.len() < 10;
        let checked = args("check", QUICKSTART, settings);
        let args = match sizes {
            true => checked,
            false => [checked, vec!["--print-config".to_owned()]].concat(),
        };
        let done = limited(4_000_000, &args).output().unwrap();
        let (out, err) = texts(&done);
        assert!(
            matches!(done.status.code(), Some(0..=2)),
            "{setting}: {:?} {out}{err}",
            done.status
        );
        assert!(!err.contains("panicked"), "{setting}: {err}");
    }
}

#[test]
fn runs_beyond_the_memory_are_refused_with_what_fits() {
    let folder = TempDir::new().unwrap();
    let output = format!("train.output={:?}", text(&folder.path().join("run")));
    let latents = format!("latents.output={:?}", text(&folder.path().join("latents")));
    for (name, config, settings, fits) in [
        (
            "train",
            QUICKSTART,
            &[output.as_str(), "train.batch_size=65536"][..],
            "train.batch_size = ",
        ),
        (
            "train",
            QUICKSTART,
            &[&output, "image.resolution=8192"],
            "image.resolution = ",
        ),
        (
            "train",
            QUICKSTART,
            &[
                &output,
                "report.endpoint_captions=10000",
                "image.resolution=2048",
                "train.batch_size=1",
            ],
            "image.resolution = ",
        ),
        (
            "check",
            QUICKSTART,
            &[&output, "image.resolution=8192"],
            "image.resolution = ",
        ),
        (
            "precompute",
            PRECOMPUTE,
            &[&latents, "encode.batch_size=65536", "image.resolution=512"],
            "encode.batch_size = ",
        ),
        (
            "bench",
            QUICKSTART,
            &["data.prefetch_batches=1024", "image.resolution=1024"],
            "data.prefetch_batches = ",
        ),
    ] {
        let err = refused(
            limited(4_000_000, &args(name, config, settings)),
            2,
            &["of main memory needed", "ulimit -v", fits],
        );
        // The value that is said to fit is not refused.
        if let Some(fit) = err.split(fits).nth(1)
            && name == "bench"
        {
            let value: String = fit.chars().take_while(char::is_ascii_digit).collect();
            let setting = format!("data.prefetch_batches={value}");
            let fitting = args(name, config, [settings[1], setting.as_str()]);
            let fitting = [fitting, ["--samples", "20"].map(str::to_owned).to_vec()].concat();
            run(limited(4_000_000, &fitting), 0);
        }
    }
    let (image, teacher) = (folder.path().join("image.png"), teacher());
    let sample = [
        "sample",
        "--model",
        text(&teacher),
        "--prompt",
        "a",
        "--steps",
        "1",
        "--out",
        text(&image),
        "--height",
        "8192",
        "--width",
        "8192",
    ];
    let sample: Vec<String> = sample.map(str::to_owned).to_vec();
    refused(
        limited(4_000_000, &sample),
        2,
        &["8192x8192 pixels", "it fits with --height "],
    );
}

#[test]
fn command_line_numbers_name_their_bound() {
    let sample = |option: &str, value: &str, words: &str| {
        let base = ["sample", "--model", "m", "--prompt", "a", "--out", "a.png"];
        refuse_line(&[&base[..], &[option, value]].concat(), option, words);
    };
    for option in ["--steps", "--height", "--width"] {
        sample(option, "0", "must be at least 1");
        sample(option, "-1", "must be at least 1");
        sample(option, "99999999999999999999999", "must be at most ");
        sample(option, "nan", "must be a whole number");
    }
    sample("--height", "8193", "must be at most 8192");
    sample("--seed", "-1", "must be at least 0");
    sample(
        "--seed",
        "18446744073709551616",
        "must be at most 18446744073709551615",
    );
    sample("--guidance", "nan", "must be a finite number");
    sample("--guidance", "inf", "must be a finite number");
    sample("--guidance", "-1", "must be at least 0");
    sample("--guidance", "1e300", "must be at most 1000");
    sample("--device", "cuda:99999999999999999999", "not a device");
    let bench = |more: &[&str], option: &str, words: &str| {
        refuse_line(
            &[&["bench", "-c", QUICKSTART][..], more].concat(),
            option,
            words,
        );
    };
    bench(&["--samples", "-5"], "--samples", "must be at least 1");
    bench(
        &["--samples", "1000000000001"],
        "--samples",
        "must be at most 1000000000000",
    );
    bench(
        &["--rank", "-1", "--world", "2"],
        "--rank",
        "must be at least 0",
    );
    bench(
        &["--rank", "0", "--world", "0"],
        "--world",
        "must be at least 1",
    );
    bench(
        &["--rank", "0", "--world", "4611686018427387904"],
        "--world",
        "must be at most 1048576",
    );
    refuse(
        2,
        &["bench", "-c", QUICKSTART, "--rank", "2", "--world", "2"],
        &["rank 2 of 2"],
    );
    succeed(&[
        "bench",
        "-c",
        QUICKSTART,
        "--rank",
        "1",
        "--world",
        "2",
        "--samples",
        "1",
    ]);
}

/// A command line that must end with code 2 and a message with the option and `words`.
#[track_caller]
fn refuse_line(args: &[&str], option: &str, words: &str) {
    refuse(2, args, &[&format!("for '{option} <"), words]);
}
