//! `coffey inspect`: the contents of shards, and their problems.

mod statistics;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use coffey_pipeline::inspect::{
    self, CrossShardCheck, InspectOptions, LatentReport, Problem, ProblemKind, ShardReport, Spread,
    Statistics,
};
use coffey_pipeline::stages::Stage;
use coffey_pipeline::text::escaped;
use coffey_pipeline::{ShardPattern, ShardUrl, SourceOptions, counted};
use serde::Serialize;

use super::Failure;
use super::output::check_picture;
use super::resources::{DataAccess, source_options};
use crate::config::Config;
use crate::latents::{Manifest, Recipe, ShardEntry, manifests};
use crate::progress::{Progress, ProgressOptions};

/// Problems of one kind in one shard that the text output lists; JSON lists all.
const LISTED_PROBLEMS: usize = 3;

/// Options of `coffey inspect`.
#[derive(Args, Debug)]
pub(super) struct InspectArgs {
    /// Shards: s3://, http(s)://, hf://, file paths or -; braces expand, @FILE is a list, a trailing / lists a folder, of shards or of images. S3 is reached as the AWS environment
    /// says, or `[s3]` of --config. Without any: the shards of --config.
    #[arg(value_name = "URL", required_unless_present = "config")]
    urls: Vec<ShardPattern>,
    /// Take [s3], the keys of images and captions in [data], and image.resolution (smaller images are named) from this file.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one of these keys, as `s3.anonymous=true`, with or without a file.
    #[arg(short = 's', long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object to standard output.
    #[arg(long)]
    json: bool,
    /// Add distributions of sizes, aspect ratios, caption lengths and LAION's scores; lengths in tokens with the model.teacher of --config.
    #[arg(long)]
    stats: bool,
    /// Draw these distributions into a PNG file.
    #[arg(long, value_name = "FILE.png")]
    stats_png: Option<PathBuf>,
}

/// The whole output. Field names are the keys of `--json`.
#[derive(Default, Serialize)]
struct InspectReport {
    shards: Vec<ShardReport>,
    unreadable: Vec<Unreadable>,
    /// Recipes of latent shards, by the URL of their manifest.
    manifests: BTreeMap<String, Recipe>,
    totals: Totals,
}

/// A shard that can't be read at all.
#[derive(Serialize)]
struct Unreadable {
    url: String,
    error: String,
}

/// Sums over the readable shards.
#[derive(Default, Serialize)]
struct Totals {
    shards: u64,
    unreadable_shards: u64,
    broken_shards: u64,
    bytes: u64,
    samples: u64,
    members: BTreeMap<String, u64>,
    formats: BTreeMap<String, u64>,
    width: Spread,
    height: Spread,
    caption_chars: Spread,
    latents: Option<LatentReport>,
    missing_images: u64,
    missing_captions: u64,
    undecodable: u64,
    duplicate_keys: u64,
    passed_over: BTreeMap<&'static str, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    statistics: Option<Statistics>,
    problems: u64,
    problems_by_kind: BTreeMap<ProblemKind, u64>,
}

impl Totals {
    fn add(&mut self, shard: &ShardReport) {
        self.shards += 1;
        self.broken_shards += u64::from(shard.broken.is_some());
        self.bytes += shard.bytes;
        self.samples += shard.samples;
        for (total, part) in [
            (&mut self.members, &shard.members),
            (&mut self.formats, &shard.formats),
        ] {
            for (name, count) in part {
                *total.entry(name.clone()).or_default() += count;
            }
        }
        merge(&mut self.width, &shard.width);
        merge(&mut self.height, &shard.height);
        merge(&mut self.caption_chars, &shard.caption_chars);
        if let Some(latents) = &shard.latents {
            self.latents.get_or_insert_default().merge(latents);
        }
        if let Some(statistics) = &shard.statistics {
            self.statistics.get_or_insert_default().merge(statistics);
        }
        self.missing_images += shard.missing_images;
        self.missing_captions += shard.missing_captions;
        self.undecodable += shard.undecodable;
        self.duplicate_keys += shard.duplicate_keys;
        self.problems += shard.problems.len() as u64;
        for problem in &shard.problems {
            *self.problems_by_kind.entry(problem.kind).or_default() += 1;
        }
        for (&name, count) in &shard.passed_over {
            *self.passed_over.entry(name).or_default() += count;
        }
    }
}

fn merge(total: &mut Spread, part: &Spread) {
    if part.count == 0 {
        return;
    }
    let count = total.count + part.count;
    total.min = if total.count == 0 {
        part.min
    } else {
        total.min.min(part.min)
    };
    total.max = total.max.max(part.max);
    total.mean = (total.mean * total.count as f64 + part.mean * part.count as f64) / count as f64;
    total.count = count;
}

/// Runs `coffey inspect`.
pub(super) fn run(args: InspectArgs) -> Result<(), Failure> {
    if let Some(path) = &args.stats_png {
        check_picture("--stats-png", path)?;
    }
    let config = match &args.config {
        Some(path) => Config::load(path, &args.set)?,
        None => {
            let urls: Vec<&str> = args.urls.iter().map(ShardPattern::expose).collect();
            let text = format!("data.shards = {}", toml::Value::from(urls));
            Config::parse(&text, "the command line", &args.set)?
        }
    };
    config.require_bench()?;
    let options = SourceOptions {
        cache: None,
        ..source_options(&config)
    };
    let resolution = config.image.resolution;
    let is_chosen = args.config.is_some() || config.is_written("image.resolution");
    let data = DataAccess::open(options)?;
    let has_statistics = args.stats || args.stats_png.is_some();
    let tokens = if has_statistics {
        statistics::token_counter(&config, &data)?
    } else {
        None
    };
    let wanted = InspectOptions {
        image_keys: config.data.image_keys,
        caption_keys: config.data.caption_keys,
        resolution: is_chosen.then_some(resolution),
        statistics: has_statistics,
        tokens,
    };
    let urls = if args.urls.is_empty() {
        config.data.shards
    } else {
        args.urls
    };
    let shards = data.shards(&urls)?.shards;
    let mut report = InspectReport::default();
    let mut across = CrossShardCheck::default();
    let mut manifests = Manifests::default();
    let progress = Progress::later(ProgressOptions {
        total: shards.len() as u64,
        template: "{spinner} {wide_bar} {pos}/{len} shards · {msg}",
        line_every: Duration::from_secs(10),
    });
    for (index, url) in shards.iter().enumerate() {
        let read = inspect::shard(&data.sources, url, &wanted, &data.metrics);
        let show = || {
            let samples = data.metrics.snapshot().stage(Stage::Untar).items;
            let samples = format!("{} read", counted(samples, "sample"));
            let line = || format!("{index}/{} shards · {samples}", shards.len());
            progress.update(index as u64, &samples, line);
        };
        match data.wait(read, show) {
            Ok(mut shard) => {
                across.add(&mut shard);
                if shard.latents.is_some() {
                    manifests.check(url, &mut shard, &data);
                }
                if !args.json {
                    out!("{}", describe(&shard));
                }
                report.totals.add(&shard);
                report.shards.push(shard);
            }
            Err(error) => {
                let (url, text) = (url.to_string(), super::with_causes(&error));
                errln!("can't be read: {text}");
                super::failure::print_details(&error);
                let error = text;
                report.totals.unreadable_shards += 1;
                report.unreadable.push(Unreadable { url, error });
            }
        }
    }
    drop(progress);
    report.manifests = manifests.recipes();
    if args.json {
        let value = serde_json::to_value(&report).map_err(std::io::Error::from)?;
        outln!("{value:#}");
    } else {
        out!(
            "{}{}",
            describe_totals(&report.totals),
            describe_manifests(&report.manifests)
        );
        if let Some(statistics) = &report.totals.statistics {
            out!("{}", statistics::describe(statistics));
        }
    }
    if let (Some(statistics), Some(path)) = (&report.totals.statistics, &args.stats_png) {
        statistics::save(statistics, path)?;
    }
    let unreadable = (report.unreadable.len(), "can't be read");
    let different = report.shards.iter().filter(|shard| {
        let mut problems = shard.problems.iter();
        problems.any(|problem| problem.kind == ProblemKind::OtherThanManifest)
    });
    let failed: Vec<String> = [unreadable, (different.count(), "differ from the manifest")]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("shards that {what}: {count} of {}", shards.len()))
        .collect();
    match failed.is_empty() {
        true => Ok(()),
        false => Err(Failure::Failed(failed.join("; ").into())),
    }
}

/// The manifests beside latent shards. Each folder is read once.
#[derive(Default)]
struct Manifests(Vec<FolderManifests>);

struct FolderManifests {
    /// Folder or prefix.
    folder: ShardUrl,
    /// Each manifest with its URL, or the error when they can't be read.
    manifests: Result<Vec<(String, Manifest)>, String>,
}

impl Manifests {
    /// Adds to the shard's problems where it differs from its manifest.
    fn check(&mut self, url: &ShardUrl, shard: &mut ShardReport, data: &DataAccess) {
        let Some(folder) = url.folder() else {
            return;
        };
        let known = self.0.iter().position(|known| known.folder == folder);
        let index = known.unwrap_or_else(|| {
            let read = manifests(&folder, &data.sources, data.runtime.handle());
            let manifests = read.map_err(|error| super::with_causes(&error));
            self.0.push(FolderManifests { folder, manifests });
            self.0.len() - 1
        });
        let name = url.name();
        let found = match &self.0[index].manifests {
            Err(error) => vec![error.clone()],
            Ok(all) => {
                let mut all = all.iter();
                match all.find_map(|(_, m)| Some((&m.recipe, m.shards.get(&name)?))) {
                    Some((recipe, entry)) => differences(recipe, entry, shard),
                    None => vec!["no manifest beside it lists it".to_owned()],
                }
            }
        };
        shard.problems.extend(found.into_iter().map(|what| Problem {
            kind: ProblemKind::OtherThanManifest,
            key: String::new(),
            what,
        }));
    }

    fn recipes(self) -> BTreeMap<String, Recipe> {
        let read = self
            .0
            .into_iter()
            .filter_map(|folder| folder.manifests.ok());
        read.flatten()
            .map(|(url, manifest)| (url, manifest.recipe))
            .collect()
    }
}

/// Differences between a shard and its entry in the manifest.
fn differences(recipe: &Recipe, entry: &ShardEntry, shard: &ShardReport) -> Vec<String> {
    let mut found = Vec::new();
    for (what, listed, here) in [
        ("bytes", entry.bytes, shard.bytes),
        ("samples", entry.samples, shard.samples),
    ] {
        if listed != here {
            found.push(format!("{here} {what}, and {listed} in the manifest"));
        }
    }
    if entry.sha256 != shard.sha256 {
        let (listed, here) = (&entry.sha256, &shard.sha256);
        found.push(format!("SHA-256 {here}, and {listed} in the manifest"));
    }
    let embeds = recipe.prompt_embeds_shape;
    let embeds = embeds.map(|shape| format!("prompt_embeds.npy <f2 {shape:?}"));
    let latent = format!("latent.npy <f2 {:?}", recipe.latent_file_shape());
    let pooled = recipe.pooled_shape;
    let pooled = pooled.map(|shape| format!("pooled.npy <f2 {shape:?}"));
    for array in std::iter::once(latent).chain(embeds).chain(pooled) {
        let arrays = shard
            .latents
            .as_ref()
            .and_then(|latents| latents.arrays.get(&array));
        let count = arrays.copied().unwrap_or(0);
        if count != shard.samples {
            found.push(format!(
                "{count} of {} samples have {array}, which the manifest says of all",
                shard.samples
            ));
        }
    }
    found
}

fn describe_manifests(manifests: &BTreeMap<String, Recipe>) -> String {
    let mut text = String::new();
    for (url, recipe) in manifests {
        let Recipe {
            fingerprint, image, ..
        } = recipe;
        let second = fingerprint.second.as_ref();
        let second = second.map(|second| format!("  text 2    {}\n", second.text_encoder_2));
        let second = second.unwrap_or_default();
        text.push_str(&format!(
            "{url}\n  vae       {}\n  text      {}\n{second}  images    {} pixels, {} to a sample\n  latents   {:?}, to be multiplied by {}\n",
            fingerprint.vae,
            fingerprint.text_encoder,
            image.resolution,
            image.crops,
            recipe.latent.shape,
            recipe.latent.scaling_factor,
        ));
    }
    text
}

fn describe(shard: &ShardReport) -> String {
    let mut text = format!("{}\n", shard.url);
    let contents = Contents {
        samples: shard.samples,
        bytes: shard.bytes,
        members: &shard.members,
        formats: &shard.formats,
        width: &shard.width,
        height: &shard.height,
        caption_chars: &shard.caption_chars,
    };
    describe_contents(&mut text, &contents);
    describe_latents(&mut text, shard.latents.as_ref());
    describe_passed_over(&mut text, &shard.passed_over);
    if let Some(broken) = &shard.broken {
        text.push_str(&format!("  broken    {}\n", escaped(broken)));
    }
    let mut kinds = BTreeMap::<ProblemKind, Vec<&inspect::Problem>>::new();
    for problem in &shard.problems {
        kinds.entry(problem.kind).or_default().push(problem);
    }
    for (kind, problems) in kinds {
        text.push_str(&format!(
            "  problem   {}: {}\n",
            kind.name(),
            problems.len()
        ));
        for problem in problems.iter().take(LISTED_PROBLEMS) {
            let separator = if problem.key.is_empty() { "" } else { " " };
            let (key, what) = (escaped(&problem.key), escaped(&problem.what));
            text.push_str(&format!("    {key}{separator}{what}\n"));
        }
        if let Some(more) = problems.len().checked_sub(LISTED_PROBLEMS + 1) {
            text.push_str(&format!("    and {} more; --json lists them\n", more + 1));
        }
    }
    text
}

fn describe_totals(totals: &Totals) -> String {
    let mut text = format!("total\n  shards    {}\n", totals.shards);
    let contents = Contents {
        samples: totals.samples,
        bytes: totals.bytes,
        members: &totals.members,
        formats: &totals.formats,
        width: &totals.width,
        height: &totals.height,
        caption_chars: &totals.caption_chars,
    };
    describe_contents(&mut text, &contents);
    describe_latents(&mut text, totals.latents.as_ref());
    describe_passed_over(&mut text, &totals.passed_over);
    let shards = [
        (totals.unreadable_shards, "unreadable shard"),
        (totals.broken_shards, "broken shard"),
    ];
    let shards = shards
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| counted(count, what));
    let kinds = totals.problems_by_kind.iter();
    let found: Vec<String> = shards
        .chain(kinds.map(|(kind, count)| format!("{count} {}", kind.name())))
        .collect();
    let found = if found.is_empty() {
        "none".to_owned()
    } else {
        found.join(", ")
    };
    text.push_str(&format!("  problems  {found}\n"));
    text
}

/// Appends the line on members that belong to no sample, if there are any.
fn describe_passed_over(text: &mut String, counts: &BTreeMap<&'static str, u64>) {
    let parts: Vec<String> = counts
        .iter()
        .map(|(name, count)| format!("{count} x {name}"))
        .collect();
    if !parts.is_empty() {
        text.push_str(&format!("  passed over  {}\n", parts.join("; ")));
    }
}

/// Appends the lines on latents, if there are any.
fn describe_latents(text: &mut String, report: Option<&LatentReport>) {
    let Some(report) = report else {
        return;
    };
    let mut line = |name: &str, value: String| text.push_str(&format!("  {name:<9} {value}\n"));
    for (array, count) in &report.arrays {
        line("arrays", format!("{count} {}", escaped(array)));
    }
    if report.not_finite > 0 {
        line(
            "NaN, Inf",
            format!("in {}", counted(report.not_finite, "sample")),
        );
    }
    let half = report.channels.len() / 2;
    let (means, log_variances) = report.channels.split_at(half);
    for (channel, (mean, log_variance)) in means.iter().zip(log_variances).enumerate() {
        line(
            "channel",
            format!(
                "{channel}: mean {:.4}, std {:.4}; log-variance {:.2}",
                mean.mean, mean.std, log_variance.mean
            ),
        );
    }
}

/// Figures that a shard and the totals have in common.
struct Contents<'a> {
    samples: u64,
    bytes: u64,
    members: &'a BTreeMap<String, u64>,
    formats: &'a BTreeMap<String, u64>,
    width: &'a Spread,
    height: &'a Spread,
    caption_chars: &'a Spread,
}

fn describe_contents(text: &mut String, contents: &Contents<'_>) {
    let list = |counts: &BTreeMap<String, u64>| {
        let parts: Vec<String> = counts
            .iter()
            .map(|(name, count)| format!("{count} {}", escaped(name)))
            .collect();
        if parts.is_empty() {
            "none".to_owned()
        } else {
            parts.join(", ")
        }
    };
    let range =
        |spread: &Spread| format!("{}-{} (mean {:.0})", spread.min, spread.max, spread.mean);
    let mut line = |name: &str, value: String| text.push_str(&format!("  {name:<9} {value}\n"));
    line(
        "samples",
        format!(
            "{} in {:.2} MB",
            contents.samples,
            contents.bytes as f64 / 1e6
        ),
    );
    line("members", list(contents.members));
    line("images", list(contents.formats));
    if contents.width.count > 0 {
        line("width", format!("{} pixels", range(contents.width)));
        line("height", format!("{} pixels", range(contents.height)));
    }
    if contents.caption_chars.count > 0 {
        line(
            "captions",
            format!("{} characters", range(contents.caption_chars)),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(count: u64, min: u64, max: u64, mean: f64) -> Spread {
        let mut spread = Spread::default();
        (spread.count, spread.min, spread.max, spread.mean) = (count, min, max, mean);
        spread
    }

    #[test]
    fn spreads_merge_as_one_range() {
        let mut total = Spread::default();
        for part in [
            spread(2, 10, 20, 15.0),
            Spread::default(),
            spread(1, 60, 60, 60.0),
        ] {
            merge(&mut total, &part);
        }
        assert_eq!(total, spread(3, 10, 60, 30.0));
    }

    #[test]
    fn problems_are_grouped_and_long_lists_are_cut() {
        let problem = |kind, key: usize| Problem {
            kind,
            key: format!("key{key}"),
            what: "has no image".to_owned(),
        };
        let mut shard = ShardReport {
            problems: (0..LISTED_PROBLEMS)
                .map(|key| problem(ProblemKind::NoImage, key))
                .collect(),
            ..ShardReport::default()
        };
        shard.problems.insert(0, problem(ProblemKind::Animated, 7));
        let text = describe(&shard);
        assert!(!text.contains("more"), "{text}");
        assert!(
            text.contains("  problem   no_image: 3\n    key0 has no image\n    key1"),
            "{text}"
        );
        assert!(text.ends_with("  problem   animated: 1\n    key7 has no image\n"));
        shard.problems.push(problem(ProblemKind::NoImage, 99));
        shard.problems.push(problem(ProblemKind::NoImage, 100));
        let text = describe(&shard);
        assert!(
            text.contains("no_image: 5") && text.contains("and 2 more") && !text.contains("key99"),
            "{text}"
        );
    }
}
