//! `coffey precompute`: image shards in, latent shards out.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use coffey_pipeline::flow::FlowSnapshot;
use coffey_pipeline::order::Order;
use coffey_pipeline::{Content, ShardUrl, Stream, counted};

use super::output::{check_apart, check_writable};
use super::ranks::{RankArgs, check_enough_shards};
use super::resources::{
    DataAccess, check_memory, encode_device, source_options, start_monitor, stream_config,
};
use super::{ConfigArgs, Failure};
use crate::config::{self, Config};
use crate::encode::{EncodePool, Encoders};
use crate::latents::{
    Fingerprint, Joined, LatentError, LatentLayout, LatentWriter, Manifest, Recipe, TextShapes,
    join,
};
use crate::memory::Command;
use crate::models::{PipelineParts, UNetConfig, check_fit};
use crate::monitor::StreamingCommand;
use crate::precompute::{PrecomputeError, write_latents};
use crate::pretrained::{Components, Models};
use crate::ranks::{Job, Rank, RankOrigin};
use crate::signals::cancel_on_signals;
use crate::train::{describe_encoders, encoder_options};

/// Number of missing shards that a message names.
const MISSING_NAMED: usize = 10;

#[derive(Args, Debug)]
pub(super) struct PrecomputeArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    ranks: RankArgs,
    /// Encode nothing: join the manifests that the processes left into one, or say which shards are missing.
    #[arg(long, conflicts_with_all = ["rank", "world"])]
    finish: bool,
}

impl From<LatentError> for Failure {
    fn from(error: LatentError) -> Self {
        if error.is_config() {
            Self::Usage(error.into())
        } else {
            Self::Failed(error.into())
        }
    }
}

impl From<PrecomputeError> for Failure {
    fn from(error: PrecomputeError) -> Self {
        match error {
            PrecomputeError::Encode(error) => error.into(),
            PrecomputeError::Latents(error) => error.into(),
            PrecomputeError::Stopped => Self::Stopped,
        }
    }
}

pub(super) fn run(args: PrecomputeArgs) -> Result<(), Failure> {
    let cancel = cancel_on_signals()?;
    let mut config = args.config.load()?;
    let required = config.require_precompute()?;
    let output = required.latents.output.to_string_lossy();
    if args.finish {
        return finish(&config, &output);
    }
    let RankOrigin { rank, origin } = args.ranks.resolve()?;
    errln!("encoding with {} into {output}", required.teacher);
    if rank.world > 1 {
        errln!("rank {} of {}, from {origin}", rank.index, rank.world);
    }

    let data = DataAccess::open(source_options(&config))?;
    check_writable("latents.output", &required.latents.output, &data)?;
    let (monitor, _server) = start_monitor(&config, &data, StreamingCommand::Precompute)?;
    let models = data.until_cancelled(&cancel, || {
        data.models(&mut config, &required.teacher, Components::encoding)
    })?;
    let list = data.shards(&config.data.shards)?;
    let shards = list.shards.clone();
    check_apart("latents.output", &required.latents.output, &shards)?;
    check_enough_shards(rank, shards.len())?;
    errln!(
        "reading {} and {}",
        counted(shards.len(), "shard"),
        models.pipeline.display()
    );
    check_memory(
        Command::Precompute,
        &config,
        Content::Images,
        Some(&models),
        None,
        &Job::solo(),
    )?;
    // Before the encoders are loaded: it reads all weights into memory once.
    let fingerprint = Fingerprint::of(&models.pipeline, models.vae.as_deref())?;
    let first = load_encoders(&config, &models, 0)?;
    if let Some(how) = describe_encoders(&first) {
        errln!("encoding on {}: {how}", config.encode.devices[0]);
    }
    // The UNet trained on the latents must take them. A UNet that coffey does not build can be trained elsewhere.
    if let Ok(unet) = UNetConfig::read(&models.pipeline.join("unet")) {
        check_fit(&PipelineParts {
            folder: &models.pipeline,
            unet: &unet,
            vae: first.vae().config(),
            text_width: first.text().width(),
            pooled_width: first.text().pooled_width(),
            resolution: config.image.resolution as usize,
        })?;
    }
    let recipe = recipe(&config, &required.latents, fingerprint, &first, rank)?;
    let place = data.sources.destination(&output, data.runtime.handle())?;
    let mut writer = LatentWriter::open(place, recipe, rank, shards)?;
    let there = writer.manifest().shards.len();
    if there > 0 {
        errln!(
            "{} already in {output} (by the manifest and their sizes; contents were not read again)",
            counted(there, "shard")
        );
    }

    // The shards of other ranks are theirs, and a finished shard is not read again.
    let remaining: BTreeSet<&ShardUrl> = writer.remaining().iter().collect();
    let to_read = list.unlisted().filter(|url| remaining.contains(url));
    let looked_up = data.until_cancelled(&cancel, || data.look_up(&config, to_read))?;
    if !looked_up.is_empty() {
        errln!("{} to read{looked_up}", counted(remaining.len(), "shard"));
    }

    let started = Instant::now();
    let mut flow = None;
    if !writer.remaining().is_empty() && writer.remaining_samples() != Some(0) {
        let others = 1..config.encode.devices.len();
        let others = others.map(|index| load_encoders(&config, &models, index));
        let encoders = std::iter::once(Ok(first))
            .chain(others)
            .map(|encoders| Ok(Arc::new(encoders?.without_decoder())))
            .collect::<Result<Vec<_>, Failure>>()?;
        // The stream reads only the shards of this rank that are left.
        let shards = writer.remaining().to_vec();
        let mut stream_config =
            stream_config(&config, shards, Order::Sequential, config.encode.batch_size);
        stream_config.max_samples = writer.remaining_samples();
        stream_config.skip_duplicate_keys = true;
        stream_config.image.crops = required.latents.crops;
        let stream = Stream::open(
            stream_config,
            &data.sources,
            &data.metrics,
            data.runtime.handle(),
        )?;
        let runtime = data.runtime.handle();
        let pool = EncodePool::start(stream, encoders, &data.metrics, runtime)?;
        flow = write_latents(pool, &mut writer, &monitor, &cancel)?;
    }
    summarize(writer.manifest(), there, started.elapsed(), flow);
    let cut = data.metrics.snapshot().truncated_captions;
    if cut > 0 {
        let captions = counted(cut as usize, "caption");
        errln!("{captions} of this process cut: more tokens than the text encoder takes");
    }
    let missing = writer.finish()?.missing;
    if !missing.is_empty() {
        errln!(
            "{} of other processes still to come: the last process joins the manifests, or `coffey precompute --finish`",
            counted(missing.len(), "shard")
        );
    }
    outln!("{output}");
    Ok(())
}

/// `--finish`: joins manifests without reading models or images.
fn finish(config: &Config, output: &str) -> Result<(), Failure> {
    let data = DataAccess::open(source_options(config))?;
    let shards = data.shards(&config.data.shards)?.shards;
    let place = data.sources.destination(output, data.runtime.handle())?;
    let Joined { manifest, missing } = join(&place, &shards)?;
    if missing.is_empty() {
        let samples = manifest.samples();
        errln!(
            "all {} there: {}",
            counted(manifest.shards.len(), "shard"),
            counted(samples, "sample")
        );
        outln!("{output}");
        return Ok(());
    }
    let named: Vec<String> = missing
        .iter()
        .take(MISSING_NAMED)
        .map(|url| url.name())
        .collect();
    let more = match missing.len() - named.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let message = format!(
        "{output}: {} of {} missing: {}{more}; run `coffey precompute` for them, as often as it takes",
        missing.len(),
        counted(shards.len(), "shard"),
        named.join(", "),
    );
    Err(Failure::Failed(message.into()))
}

fn load_encoders(config: &Config, models: &Models, index: usize) -> Result<Encoders, Failure> {
    let device = encode_device(config, index)?;
    Ok(Encoders::load(
        &models.pipeline,
        models.vae.as_deref(),
        &device,
        encoder_options(config),
    )?)
}

fn recipe(
    config: &Config,
    latents: &config::Latents,
    fingerprint: Fingerprint,
    encoders: &Encoders,
    rank: Rank,
) -> Result<Recipe, Failure> {
    let vae = encoders.vae().config();
    let side = config.image.resolution as usize / vae.downscale();
    let (_, tokens, width) = encoders.encode_text(&[""])?.hidden.dims3()?;
    let shapes = TextShapes {
        prompt_embeds: [tokens, width],
        pooled: encoders.text().pooled_width().map(|width| [width]),
    };
    Ok(Recipe::new(
        config,
        latents.text,
        latents.crops,
        fingerprint,
        LatentLayout {
            shape: [2 * vae.latent_channels, side, side],
            scaling_factor: vae.scaling_factor,
        },
        shapes,
        rank.world,
    ))
}

fn summarize(manifest: &Manifest, there: usize, elapsed: Duration, flow: Option<FlowSnapshot>) {
    let shards = &manifest.shards;
    let sum = |part: fn(&crate::latents::ShardEntry) -> u64| shards.values().map(part).sum::<u64>();
    let skipped = sum(|entry| entry.skipped.values().sum());
    errln!(
        "{}, {} of them new, in {:.1} s: {} in {:.1} MB, {skipped} left out",
        counted(shards.len(), "shard"),
        shards.len() - there,
        elapsed.as_secs_f64(),
        counted(manifest.samples(), "sample"),
        sum(|entry| entry.bytes) as f64 / 1e6,
    );
    let mut reasons = std::collections::BTreeMap::<&str, u64>::new();
    for (reason, count) in shards.values().flat_map(|entry| &entry.skipped) {
        *reasons.entry(reason).or_default() += count;
    }
    for (reason, count) in reasons {
        errln!("  {reason} {count}");
    }
    if let Some(flow) = flow
        && let Some(limit) = flow.limiting_stage()
    {
        let busy = flow.stage(limit).busy_share().unwrap_or(0.0);
        errln!("limit: {limit}, busy {:.0} % of its time", 100.0 * busy);
    }
}
