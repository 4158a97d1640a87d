//! `coffey precompute`: image shards in, latent shards out.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use coffey_pipeline::flow::{FlowMetrics, FlowSnapshot, Recent};
use coffey_pipeline::order::Order;
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{Stream, StreamError};
use indicatif::{ProgressBar, ProgressStyle};

use super::data::{DataAccess, source_options, stream_config, until_a_signal};
use super::ranks::RankArgs;
use super::watch::watch;
use super::{ConfigArgs, Failure, device};
use crate::config::{self, Config};
use crate::encode::{EncodeError, EncodePool, Encoders};
use crate::latents::{
    Fingerprint, Joined, LatentError, LatentLayout, LatentWriter, Manifest, Part, Recipe, join,
};
use crate::models::UNetConfig;
use crate::monitor::{Monitor, StreamingCommand};
use crate::pretrained::{Models, Wanted};
use crate::stop::Stop;
use crate::train::check_fit;

/// Time between two lines of progress where there is no terminal to draw a bar on.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// How many missing shards are named.
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
        match error.is_config() {
            true => Self::Usage(error.into()),
            false => Self::Failed(error.into()),
        }
    }
}

pub(super) fn run(args: PrecomputeArgs) -> Result<(), Failure> {
    let stop = Stop::on_signals()?;
    let config = args.config.load()?;
    let paths = config.require_precompute()?;
    let output = paths.latents.output.to_string_lossy();
    if args.finish {
        return finish(&config, &output);
    }
    let (part, origin) = args.ranks.resolve()?;
    if let Some(origin) = origin {
        errln!("rank {} of {}, from {origin}", part.rank, part.world);
    }

    let data = DataAccess::open(source_options(&config))?;
    let (monitor, _server) = watch(&config, &data, StreamingCommand::Precompute)?;
    let models = until_a_signal(&stop, || {
        data.models(&config, paths.teacher, Wanted::encoding)
    })?;
    let shards = data.shards(&config.data.shards)?;
    if shards.len() < part.world {
        let (shards, world) = (shards.len(), part.world);
        return Err(StreamError::TooFewShards { shards, world }.into());
    }
    errln!(
        "reading {} and {}",
        counted(shards.len(), "shard"),
        models.pipeline.display()
    );
    // Before the encoders are loaded: it reads all weights, once more in memory.
    let fingerprint = Fingerprint::of(&models.pipeline, models.vae.as_deref())?;
    let first = load_encoders(&config, &models, 0)?;
    // Whoever trains on these needs a UNet that takes them. One that coffey does not build can be trained elsewhere.
    if let Ok(unet) = UNetConfig::read(&models.pipeline.join("unet")) {
        check_fit(&unet, &first, &config, &models.pipeline)?;
    }
    let recipe = recipe(&config, paths.latents, fingerprint, &first, part)?;
    let place = data.sources.destination(&output, data.runtime.handle())?;
    let mut writer = LatentWriter::open(place, recipe, part, shards)?;
    let there = writer.manifest().shards.len();
    if there > 0 {
        errln!(
            "{} already in {output} (by the manifest and their sizes; contents were not read again)",
            counted(there, "shard")
        );
    }

    let started = Instant::now();
    let mut flow = None;
    if !writer.remaining().is_empty() && writer.remaining_samples() != Some(0) {
        let encoders = std::iter::once(Ok(first))
            .chain(
                (1..config.encode.devices.len())
                    .map(|index| load_encoders(&config, &models, index)),
            )
            .collect::<Result<Vec<_>, Failure>>()?;
        // The writer knows which shards are left of this part: to the stream they are all there is.
        let shards = writer.remaining().to_vec();
        let mut stream_config =
            stream_config(&config, shards, Order::Sequential, config.encode.batch_size);
        stream_config.max_samples = writer.remaining_samples();
        stream_config.image.crops = paths.latents.crops;
        let stream = Stream::open(
            stream_config,
            &data.sources,
            &data.metrics,
            data.runtime.handle(),
        )?;
        let pool = EncodePool::start(stream, encoders, &data.metrics)?;
        flow = write_all(pool, &mut writer, &monitor, &stop)?;
    }
    summarize(writer.manifest(), there, started.elapsed(), flow);
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

/// `--finish`: neither models nor images are looked at.
fn finish(config: &Config, output: &str) -> Result<(), Failure> {
    let data = DataAccess::open(source_options(config))?;
    let shards = data.shards(&config.data.shards)?;
    let place = data.sources.destination(output, data.runtime.handle())?;
    let Joined { manifest, missing } = join(&place, &shards)?;
    if missing.is_empty() {
        let samples = manifest.samples();
        errln!(
            "all {} there: {}",
            counted(manifest.shards.len(), "shard"),
            counted(samples as usize, "sample")
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
    let device = device::open(config.encode.devices[index])?;
    Ok(Encoders::load(
        &models.pipeline,
        models.vae.as_deref(),
        &device,
        config.encode.batch_size,
    )?)
}

fn recipe(
    config: &Config,
    latents: &config::Latents,
    fingerprint: Fingerprint,
    encoders: &Encoders,
    part: Part,
) -> Result<Recipe, Failure> {
    let vae = encoders.vae().config();
    let side = config.image.resolution / vae.downscale();
    let (_, tokens, width) = encoders.encode_text(&[""])?.dims3()?;
    Ok(Recipe::new(
        config,
        latents.text,
        latents.crops,
        fingerprint,
        LatentLayout {
            shape: [2 * vae.latent_channels, side, side],
            scaling_factor: vae.scaling_factor,
        },
        [tokens, width],
        part.world,
    ))
}

/// Writes what the pool makes, to its end or until a stop is asked for; what the stages did since the first batch.
fn write_all(
    mut pool: EncodePool,
    writer: &mut LatentWriter,
    monitor: &Monitor,
    stop: &Stop,
) -> Result<Option<FlowSnapshot>, Failure> {
    let interrupter = pool.interrupter();
    stop.on_stop(move || interrupter.interrupt());
    let metrics = monitor.flow();
    let stage = metrics.stage(Stage::Write);
    let mut progress = Progress::start(writer.remaining().len());
    monitor.expect("shards", 0, progress.shards as u64);
    monitor.beat();
    while !stop.asked()
        && let Some(batch) = pool.next(&stage)
    {
        let (samples, finished) = match batch {
            Ok(batch) => (batch.samples.len(), stage.work(|| writer.write(&batch))?),
            Err(EncodeError::Stream(error)) => match &*error {
                // Of the shards that were left none holds anything, but of those before them some do.
                StreamError::NothingUsable {
                    shards, skipped, ..
                } if writer.manifest().samples() > 0 => (0, writer.finish_shards(skipped, shards)?),
                _ => return Err((*error).into()),
            },
            Err(other) => return Err(other.into()),
        };
        stage.add_items(samples as u64);
        for name in &finished {
            let entry = &writer.manifest().shards[name];
            stage.add_bytes(entry.bytes);
            if let Some(cause) = &entry.broken {
                let samples = counted(entry.samples as usize, "sample");
                progress.say(&format!(
                    "warning: {} is broken after {samples}: {cause}",
                    entry.source
                ));
            }
        }
        progress.update(samples, finished.len(), metrics);
        monitor.advance(progress.shards_done as u64);
        monitor.beat();
    }
    monitor.rest();
    match stop.asked() {
        true => Err(Failure::Stopped),
        false => Ok(progress.recent.overall(metrics)),
    }
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
        counted(manifest.samples() as usize, "sample"),
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

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// A bar on a terminal, a line now and then elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    shards: usize,
    shards_done: usize,
    samples: usize,
    started: Instant,
    last_line: Instant,
    recent: Recent,
}

impl Progress {
    fn start(shards: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(shards as u64);
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {wide_bar} {pos}/{len} shards  {msg}")
            {
                bar.set_style(style);
            }
            bar.set_message("encoding the first batch");
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self {
            bar,
            shards,
            shards_done: 0,
            samples: 0,
            started: Instant::now(),
            last_line: Instant::now(),
            recent: Recent::default(),
        }
    }

    fn update(&mut self, samples: usize, shards: usize, metrics: &FlowMetrics) {
        self.samples += samples;
        self.shards_done += shards;
        let limit = self.recent.mark(metrics);
        let limit = limit.and_then(FlowSnapshot::limiting_stage);
        if self.bar.is_none() && self.last_line.elapsed() < LINE_EVERY {
            return;
        }
        let rate = self.samples as f64 / self.started.elapsed().as_secs_f64();
        let limit = limit.map_or(String::new(), |stage| format!("  limit: {stage}"));
        let message = format!(
            "{}  {rate:.1} samples/s{limit}",
            counted(self.samples, "sample")
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.shards_done as u64);
                bar.set_message(message);
            }
            None => {
                errln!("{}/{} shards  {message}", self.shards_done, self.shards);
                self.last_line = Instant::now();
            }
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| errln!("{line}")),
            None => errln!("{line}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
