//! The writer behind the real stream and the real encoders, on the quickstart's images.

mod processes;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, Tensor};
use coffey_pipeline::flow::{FlowMetrics, StageHandle};
use coffey_pipeline::order::Order;
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{
    ImageOptions, S3Options, ShardSummary, ShardUrl, Sources, Stream, StreamConfig, StreamError,
};
use npyz::half::f16;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::parts::shards_of;
use super::*;
use crate::config::{Config, FloatType, TextKind};
use crate::encode::{EncodeError, EncodePool, EncodedBatch, EncoderOptions, Encoders};
use crate::ranks::Rank;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn teacher() -> PathBuf {
    root("assets/quickstart/teacher")
}

/// The members of a tar: name and content.
fn members(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut archive = tar::Archive::new(fs::File::open(path).unwrap());
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        (entry.path().unwrap().display().to_string(), content)
    });
    entries.collect()
}

fn write_tar(path: &Path, members: &[(String, Vec<u8>)]) {
    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content.as_slice())
            .unwrap();
    }
    tar.finish().unwrap();
}

/// Three inputs: five good samples; two broken samples; nine samples, one without a caption.
fn inputs(folder: &Path) -> Vec<ShardUrl> {
    let all = members(&root("assets/quickstart/emoji/00000.tar"));
    let samples = |range: std::ops::Range<usize>| all[3 * range.start..3 * range.end].to_vec();
    let mut broken = samples(5..7);
    for (name, content) in &mut broken {
        if name.ends_with(".png") {
            content.truncate(40);
        }
    }
    let mut last = samples(7..16);
    last.remove(4);
    [("a.tar", samples(0..5)), ("b.tar", broken), ("c.tar", last)]
        .into_iter()
        .map(|(name, members)| {
            write_tar(&folder.join(name), &members);
            ShardUrl::file(folder.join(name))
        })
        .collect()
}

fn pool(
    shards: &[ShardUrl],
    max_samples: Option<u64>,
    batch_size: usize,
    workers: usize,
) -> EncodePool {
    let runtime = Box::leak(Box::new(tokio::runtime::Runtime::new().unwrap()));
    let metrics = FlowMetrics::new();
    let sources = runtime
        .block_on(Sources::new(S3Options::default()))
        .unwrap();
    let config = StreamConfig {
        shards: shards.to_vec(),
        order: Order::Sequential,
        batch_size,
        max_samples,
        max_bad_fraction: 1.0,
        image: ImageOptions {
            resolution: 64,
            ..ImageOptions::default()
        },
        ..StreamConfig::default()
    };
    let stream = Stream::open(config, &sources, &metrics, runtime.handle()).unwrap();
    let encoders = Arc::new(
        Encoders::load(&teacher(), None, &Device::Cpu, EncoderOptions::exact(32)).unwrap(),
    );
    let encoders = vec![encoders; workers];
    EncodePool::start(stream, encoders, &metrics, runtime.handle()).unwrap()
}

fn next(pool: &mut EncodePool, stage: &StageHandle) -> Result<Option<EncodedBatch>, EncodeError> {
    pool.next(stage, &CancellationToken::new(), Duration::MAX)
}

fn batches(
    shards: &[ShardUrl],
    max_samples: Option<u64>,
    batch_size: usize,
    workers: usize,
) -> Vec<EncodedBatch> {
    let mut pool = pool(shards, max_samples, batch_size, workers);
    let stage = FlowMetrics::new().stage(Stage::Write);
    std::iter::from_fn(|| next(&mut pool, &stage).unwrap()).collect()
}

/// Writes what is left of a part to its shards; their names.
fn work(writer: &mut LatentWriter, batch_size: usize, workers: usize) -> Vec<String> {
    let (remaining, max) = (writer.remaining().to_vec(), writer.remaining_samples());
    if remaining.is_empty() || max == Some(0) {
        return Vec::new();
    }
    let mut pool = pool(&remaining, max, batch_size, workers);
    let stage = FlowMetrics::new().stage(Stage::Write);
    let mut names = Vec::new();
    while let Some(batch) = next(&mut pool, &stage).transpose() {
        let finished = match batch {
            Ok(batch) => writer.write(&batch),
            Err(EncodeError::Stream(error)) => match *error {
                StreamError::NothingUsable { .. } => {
                    let rest = pool.stream().take_undelivered();
                    writer.finish_shards(&rest.skipped, &rest.finished_shards)
                }
                other => panic!("{other}"),
            },
            Err(other) => panic!("{other}"),
        };
        names.extend(finished.unwrap());
    }
    names
}

fn recipe(text: TextKind) -> Recipe {
    let toml = "[data]\nshards = \"x.tar\"\n[image]\nresolution = 64\n";
    let layout = LatentLayout {
        shape: [8, 16, 16],
        scaling_factor: 0.5,
    };
    let fingerprint = Fingerprint {
        vae: "sha256:1".to_owned(),
        text_encoder: "sha256:2".to_owned(),
        second: None,
    };
    let shapes = TextShapes {
        prompt_embeds: [77, 64],
        pooled: None,
    };
    let config = Config::parse(toml, "test.toml", &[]).unwrap();
    Recipe::new(&config, text, 1, fingerprint, layout, shapes, 1)
}

fn open(
    output: &Path,
    recipe: Recipe,
    rank: Rank,
    shards: &[ShardUrl],
) -> Result<LatentWriter, LatentError> {
    let place = coffey_pipeline::Destination::folder(output);
    LatentWriter::open(place, recipe, rank, shards.to_vec())
}

fn precompute(
    output: &Path,
    recipe: &Recipe,
    shards: &[ShardUrl],
    batch_size: usize,
    workers: usize,
) -> Vec<String> {
    let mut writer = open(output, recipe.clone(), Rank::SOLO, shards).unwrap();
    let names = work(&mut writer, batch_size, workers);
    assert!(writer.finish().unwrap().missing.is_empty());
    names
}

/// Every file of a folder and of the folders in it, with its content.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            let inner = files(&path).into_iter();
            found.extend(inner.map(|(file, content)| (format!("{name}/{file}"), content)));
        } else {
            found.insert(name, fs::read(path).unwrap());
        }
    }
    found
}

fn manifest(folder: &Path) -> Manifest {
    let text = fs::read(folder.join("manifest.json")).unwrap();
    Manifest::parse(&text).unwrap()
}

fn array(npy: &[u8]) -> (Vec<u64>, Vec<f16>) {
    let npy = npyz::NpyFile::new(npy).unwrap();
    assert_eq!(npy.order(), npyz::Order::C);
    (npy.shape().to_vec(), npy.into_vec().unwrap())
}

#[test]
fn latent_shards_hold_the_encoded_batches() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let shards = inputs(input.path());
    let finished = precompute(output.path(), &recipe(TextKind::Both), &shards, 4, 1);
    assert_eq!(finished, ["a.tar", "b.tar", "c.tar"]);

    let encoded = batches(&shards, None, 13, 1).remove(0);
    assert_eq!(encoded.samples.len(), 13);
    let written = [
        members(&output.path().join("a.tar")),
        members(&output.path().join("c.tar")),
    ]
    .concat();
    assert_eq!(written.len(), 4 * 13);
    let halves = |tensor: &Tensor, row: usize| -> Vec<f16> {
        let values = tensor
            .get(row)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        values.into_iter().map(f16::from_f32).collect()
    };
    for (row, (sample, members)) in encoded.samples.iter().zip(written.chunks(4)).enumerate() {
        let names: Vec<&str> = members.iter().map(|(name, _)| name.as_str()).collect();
        let expected = ["latent.npy", "prompt_embeds.npy", "txt", "json"]
            .map(|end| format!("{}.{end}", sample.key));
        assert_eq!(names, expected);
        assert_eq!(
            array(&members[0].1),
            (vec![8, 16, 16], halves(&encoded.moments, row))
        );
        assert_eq!(
            array(&members[1].1),
            (vec![77, 64], halves(&encoded.conditioning.hidden, row))
        );
        assert_eq!(members[2].1, sample.caption.as_bytes());
        let json: Value = serde_json::from_slice(&members[3].1).unwrap();
        assert_eq!(json["caption"], sample.caption);
        assert_eq!(
            json["coffey"]["crop_top"],
            json!(sample.geometry.crops[0].top)
        );
        assert_eq!(json["coffey"]["target_width"], json!(64));
    }
    assert_eq!(members(&output.path().join("b.tar")), []);

    let manifest = manifest(output.path());
    assert_eq!(manifest.recipe, recipe(TextKind::Both));
    for (name, entry) in &manifest.shards {
        let content = fs::read(output.path().join(name)).unwrap();
        assert_eq!(entry.bytes, content.len() as u64);
        assert_eq!(entry.sha256, format!("{:x}", Sha256::digest(&content)));
    }
    let counts = |name: &str| {
        (
            manifest.shards[name].samples,
            &manifest.shards[name].skipped,
        )
    };
    assert_eq!(counts("a.tar"), (5, &BTreeMap::new()));
    assert_eq!(
        counts("b.tar"),
        (0, &BTreeMap::from([("decode_error".to_owned(), 2)]))
    );
    assert_eq!(
        counts("c.tar"),
        (8, &BTreeMap::from([("no_caption".to_owned(), 1)]))
    );
}

#[test]
fn latent_bytes_ignore_batch_size_and_workers() {
    let input = TempDir::new().unwrap();
    let shards = inputs(input.path());
    let made = |batch_size, workers| {
        let output = TempDir::new().unwrap();
        precompute(
            output.path(),
            &recipe(TextKind::Embeds),
            &shards,
            batch_size,
            workers,
        );
        files(output.path())
    };
    let one = made(3, 1);
    assert_eq!(one.len(), 6);
    for (batch_size, workers) in [(16, 1), (3, 2), (1, 2)] {
        let other = made(batch_size, workers);
        for (name, content) in &one {
            assert!(
                other[name] == *content,
                "{name} differs at batch size {batch_size} with {workers} workers"
            );
        }
    }
}

#[test]
fn latent_captions_are_stored_without_embeddings() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let shards = inputs(input.path());
    precompute(
        output.path(),
        &recipe(TextKind::Caption),
        &shards[..1],
        5,
        1,
    );
    let members = members(&output.path().join("a.tar"));
    assert_eq!(members.len(), 3 * 5);
    assert!(members[0].0.ends_with(".latent.npy") && members[1].0.ends_with(".txt"));
}

#[test]
fn latent_writer_continues_an_interrupted_run() {
    let (input, output, whole) = (
        TempDir::new().unwrap(),
        TempDir::new().unwrap(),
        TempDir::new().unwrap(),
    );
    let shards = inputs(input.path());
    for max_samples in [None, Some(8)] {
        let mut recipe = recipe(TextKind::Embeds);
        recipe.selection.max_samples = max_samples;
        let (output, whole) = (
            output.path().join(format!("{max_samples:?}")),
            whole.path().join("out"),
        );
        precompute(&whole, &recipe, &shards, 4, 1);
        let mut writer = open(&output, recipe.clone(), Rank::SOLO, &shards).unwrap();
        for batch in &batches(&shards, max_samples, 4, 1)[..2] {
            writer.write(batch).unwrap();
        }
        drop(writer);
        let names: Vec<String> = files(&output).into_keys().collect();
        assert!(
            names.contains(&"a.tar".to_owned()) && !names.iter().any(|name| name.starts_with('.')),
            "{names:?}"
        );
        // Killed between a shard and its line in the manifest, or while writing.
        fs::write(output.join("c.tar"), "half").unwrap();
        fs::create_dir_all(output.join("skipped")).unwrap();
        for file in [
            ".writing-c.tar-abcdef",
            ".writing-manifest.json-abcdef",
            "skipped/.writing-c.tar.jsonl-abcdef",
        ] {
            fs::write(output.join(file), "half").unwrap();
        }
        let untouched = fs::metadata(output.join("a.tar"))
            .unwrap()
            .modified()
            .unwrap();
        let finished = precompute(&output, &recipe, &shards, 16, 1);
        assert!(!finished.contains(&"a.tar".to_owned()), "{finished:?}");
        assert_eq!(
            fs::metadata(output.join("a.tar"))
                .unwrap()
                .modified()
                .unwrap(),
            untouched
        );
        assert!(files(&output) == files(&whole), "{max_samples:?}");
        assert_eq!(precompute(&output, &recipe, &shards, 16, 1), [""; 0]);
        fs::remove_dir_all(whole).unwrap();
    }
}

#[test]
fn latent_writer_refuses_another_recipe() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let shards = inputs(input.path());
    // A place without a finished shard takes any recipe.
    drop(open(output.path(), recipe(TextKind::Both), Rank::SOLO, &shards).unwrap());
    let mut writer = open(output.path(), recipe(TextKind::Embeds), Rank::SOLO, &shards).unwrap();
    let summary = ShardSummary {
        shard: 0,
        samples: 0,
        skipped: BTreeMap::new(),
        broken: None,
    };
    writer.finish_shards(&[], &[summary]).unwrap();
    drop(writer);
    let refused = |recipe: Recipe| {
        let error = open(output.path(), recipe, Rank::SOLO, &shards).unwrap_err();
        assert!(error.is_config());
        error.to_string()
    };
    let mut weights = recipe(TextKind::Embeds);
    weights.fingerprint.vae = "sha256:9".to_owned();
    let message = refused(weights);
    assert!(
        message.contains("fingerprint.vae = \"sha256:1\", and now it is \"sha256:9\""),
        "{message}"
    );
    let mut types = recipe(TextKind::Embeds);
    types.encoded_in.vae = FloatType::F16;
    let message = refused(types);
    assert!(
        message.contains("encoded_in") && message.contains("\"f16\""),
        "{message}"
    );
    let message = refused(recipe(TextKind::Both));
    assert!(
        message.contains("text = \"embeds\", and now it is \"both\""),
        "{message}"
    );
    let mut seed = recipe(TextKind::Embeds);
    seed.image.seed = None;
    let message = refused(seed);
    assert!(
        message.contains("image.seed = ") && message.contains("now it is unset"),
        "{message}"
    );
    assert_eq!(files(output.path()).len(), 2, "a refusal writes nothing");
}

#[test]
fn latent_writer_refuses_other_files() {
    let folder = TempDir::new().unwrap();
    let shards = inputs(folder.path());
    let open = |folder: &Path, part, shards: &[ShardUrl]| {
        open(folder, recipe(TextKind::Embeds), part, shards).map(|_| ())
    };
    let before = files(folder.path());
    let error = open(folder.path(), Rank::SOLO, &shards)
        .unwrap_err()
        .to_string();
    assert!(error.contains("a.tar is already there"), "{error}");
    assert!(files(folder.path()) == before);
    let twice = [ShardUrl::file("x/a.tar"), ShardUrl::file("y/a.tar")];
    let error = open(folder.path(), Rank::SOLO, &twice)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("x/a.tar and y/a.tar would both become a.tar"),
        "{error}"
    );
    let output = folder.path().join("out");
    precompute(&output, &recipe(TextKind::Embeds), &shards[..1], 5, 1);
    let error = open(&output, Rank::SOLO, &twice[..1])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("a.tar was made of") && error.contains("now it would be made of x/a.tar"),
        "{error}"
    );
    for (text, words) in [
        ("{}", "format_version is missing"),
        ("{\"format_version\": 2}", "needed 1"),
        ("{", "EOF"),
    ] {
        fs::write(output.join("manifest.json"), text).unwrap();
        let error = open(&output, Rank::SOLO, &shards).unwrap_err();
        assert!(
            error.to_string().contains(words) && !error.is_config(),
            "{error}"
        );
    }
}

#[test]
fn numbers_that_f16_cannot_hold_end_the_run_before_the_shard() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let shards = inputs(input.path());
    let mut batch = batches(&shards[..1], None, 5, 1).remove(0);
    let mut values = batch
        .moments
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    let shape = batch.moments.shape().clone();
    for bad in [f32::NAN, f32::INFINITY, -1e6] {
        values[3 * 8 * 16 * 16 + 7] = bad;
        batch.moments = Tensor::from_vec(values.clone(), shape.clone(), &Device::Cpu).unwrap();
        let mut writer = open(
            output.path(),
            recipe(TextKind::Embeds),
            Rank::SOLO,
            &shards[..1],
        )
        .unwrap();
        let error = writer.write(&batch).unwrap_err().to_string();
        assert!(
            error.contains("a.tar: sample 000000003: the moments hold"),
            "{error}"
        );
        drop(writer);
        assert_eq!(
            files(output.path()).into_keys().collect::<Vec<_>>(),
            ["manifest.json"]
        );
    }
}

#[test]
fn fingerprint_depends_on_the_weights_only() {
    let whole = Fingerprint::of(&teacher(), None).unwrap();
    assert!(whole.vae.starts_with("sha256:") && whole.vae.len() == 7 + 64);
    let copy = TempDir::new().unwrap();
    let vae = copy.path().join("elsewhere");
    fs::create_dir(&vae).unwrap();
    let file = "diffusion_pytorch_model.safetensors";
    let source = [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    ]
    .map(|name| teacher().join("vae").join(name))
    .into_iter()
    .find(|path| path.is_file())
    .unwrap();
    fs::copy(&source, vae.join(file)).unwrap();
    assert_eq!(Fingerprint::of(&teacher(), Some(&vae)).unwrap(), whole);
    let mut tensors = candle_core::safetensors::load(&source, &Device::Cpu).unwrap();
    let bias = tensors["decoder.conv_out.bias"].affine(1.0, 0.5).unwrap();
    tensors.insert("decoder.conv_out.bias".to_owned(), bias);
    candle_core::safetensors::save(&tensors, vae.join(file)).unwrap();
    let other = Fingerprint::of(&teacher(), Some(&vae)).unwrap();
    assert_ne!(other.vae, whole.vae);
    assert_eq!(other.text_encoder, whole.text_encoder);
}
