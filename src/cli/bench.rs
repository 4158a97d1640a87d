//! `coffey bench`: the data pipeline alone, and which of its stages limits the speed.

use std::time::{Duration, Instant};

use clap::Args;
use coffey_pipeline::flow::{FlowSnapshot, Recent, StageSnapshot};
use coffey_pipeline::image::normalize;
use coffey_pipeline::order::Order;
use coffey_pipeline::source::S3Counts;
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{BatchData, CacheCounts, DecodeLimit, Lanes, Stream, counted, decode_limit};
use serde::Serialize;

use super::numbers::whole;
use super::ranks::{RankArgs, check_enough_shards};
use super::resources::{
    DataAccess, check_memory, content, source_options, start_monitor, stream_config,
};
use super::{ConfigArgs, Failure};
use crate::latents::LatentSource;
use crate::memory::Command;
use crate::monitor::StreamingCommand;
use crate::process::{cpu_time, peak_memory};
use crate::progress::{Progress, ProgressOptions};
use crate::ranks::Job;

/// Options of `coffey bench`.
#[derive(Args, Debug)]
pub(super) struct BenchArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    ranks: RankArgs,
    /// Samples to read, in the order of training.
    #[arg(long, value_name = "N", default_value_t = 2000, allow_negative_numbers = true, value_parser = whole(1..=1_000_000_000_000u64))]
    samples: u64,
    /// Then decode, resize and crop the same samples from memory on all cores, without the stream, and print the stream's speed as a
    /// share of that decode limit.
    #[arg(long)]
    limit: bool,
    /// Print one JSON object to standard output.
    #[arg(long)]
    json: bool,
}

/// The measurements. Field names are the keys of `--json`.
#[derive(Serialize)]
struct Measured {
    samples: u64,
    batches: u64,
    batch_size: u64,
    elapsed_seconds: f64,
    first_batch_seconds: f64,
    images_per_second: f64,
    /// Compressed megabytes (10⁶ bytes) fetched.
    megabytes_per_second: f64,
    /// CPU time of the whole process, including the embedded S3 server.
    cpu_ms_per_image: f64,
    /// CPU time outside the stages: network and TLS, the embedded S3 server.
    other_cpu_seconds: f64,
    peak_memory_bytes: Option<u64>,
    /// The limiting stage after the first batch.
    limiting_stage: Option<Stage>,
    /// Hits and misses of the shard cache, if there is one.
    cache: Option<CacheCounts>,
    /// With `--limit`.
    #[serde(rename = "machine")]
    decode_limit: Option<DecodeLimitReport>,
    #[serde(flatten)]
    flow: FlowSnapshot,
    #[serde(flatten)]
    s3: S3Counts,
}

/// The decode limit: how fast this machine decodes, resizes and crops the same samples from memory, without the stream.
#[derive(Serialize)]
struct DecodeLimitReport {
    images: u64,
    threads: usize,
    images_per_second: f64,
    /// CPU time of decoding, resizing and cropping alone.
    cpu_ms_per_image: f64,
    /// The stream's speed divided by the decode limit.
    reached: f64,
}

impl DecodeLimitReport {
    /// `stream` is the stream's speed. Images per second.
    fn new(alone: &DecodeLimit, stream: f64) -> Self {
        let images_per_second = alone.images as f64 / alone.elapsed.as_secs_f64();
        Self {
            images: alone.images,
            threads: alone.threads,
            images_per_second,
            cpu_ms_per_image: alone.cpu.as_secs_f64() * 1e3 / alone.images.max(1) as f64,
            reached: stream / images_per_second,
        }
    }
}

/// Runs `coffey bench`.
pub(super) fn run(args: BenchArgs) -> Result<(), Failure> {
    let mut config = args.config.load()?;
    config.require_bench()?;
    let rank = args.ranks.resolve()?.rank;
    let data = DataAccess::open(source_options(&config))?;
    let (monitor, _server) = start_monitor(&config, &data, StreamingCommand::Bench)?;
    data.metrics.count_cpu();
    errln!("opening {}", config.data.shown_shards());
    let shards = data.shards(&config.data.shards)?.shards;
    check_enough_shards(rank, shards.len())?;
    let latents = data.latents(&mut config, &shards)?;
    check_memory(
        Command::Bench,
        &config,
        content(latents.as_ref()),
        None,
        None,
        &Job::solo(),
    )?;
    let batch_size = config.train.batch_size;
    errln!(
        "{}; reading {} in batches of {batch_size}, decode_threads = {}",
        counted(shards.len(), "shard"),
        counted(args.samples, "sample"),
        config.data.decode_threads
    );
    let mut stream = stream_config(&config, shards, Order::Shuffled, batch_size);
    let lanes = config.lanes(stream.shards.len());
    let lanes = rank.lanes(lanes, config.batches_in_turn(lanes));
    // Where ranks can't share a run's lanes, they still share its shards.
    stream.lanes = lanes.unwrap_or_else(|_| Lanes::one(rank.index, rank.world));
    stream.content = content(latents.as_ref());
    stream.listed = latents.as_ref().map(LatentSource::listed);
    let settings = stream.clone();

    let (cpu_before, start) = (cpu_time(), Instant::now());
    let stream = Stream::open(stream, &data.sources, &data.metrics, data.runtime.handle())?;
    let consumer = data.metrics.stage(Stage::Train);
    let (mut samples, mut batches, mut first_batch) = (0, 0, Duration::ZERO);
    let mut recent = Recent::default();
    monitor.expect("samples", 0, args.samples);
    let progress = Progress::later(ProgressOptions {
        total: args.samples,
        template: "{spinner} {wide_bar} {pos}/{len} samples · {msg}",
        line_every: Duration::from_secs(10),
    });
    monitor.heartbeat();
    while samples < args.samples {
        let Some(batch) = stream.batches().recv_blocking(&consumer) else {
            break;
        };
        let batch = batch?;
        samples += batch.samples.len() as u64;
        consumer.work(|| std::hint::black_box(as_f32(&batch.data)));
        consumer.add_items(batch.samples.len() as u64);
        batches += 1;
        monitor.advance(samples);
        monitor.heartbeat();
        let rate = samples as f64 / start.elapsed().as_secs_f64();
        let rate = format!("{rate:.1} samples/s");
        progress.update(samples, &rate, || {
            format!("{samples}/{} samples · {rate}", args.samples)
        });
        if batches == 1 {
            first_batch = start.elapsed();
            recent.mark(&data.metrics);
        }
    }
    let (elapsed, cpu) = (start.elapsed().as_secs_f64(), cpu_time() - cpu_before);
    let flow = data.metrics.snapshot();
    let s3 = data.sources.s3_server().counts();
    let overall = recent.overall(&data.metrics);
    let limiting_stage = overall.and_then(|flow| flow.limiting_stage());
    monitor.stop_waiting();
    drop((progress, stream));
    let (images_per_second, peak_memory_bytes) = (samples as f64 / elapsed, peak_memory());
    let decode_limit = if args.limit {
        errln!("decoding the same samples from memory");
        let alone = decode_limit(&settings, &data.sources, data.runtime.handle(), samples)?;
        Some(DecodeLimitReport::new(&alone, images_per_second))
    } else {
        None
    };

    let per_sample = 1.0 / samples.max(1) as f64;
    let staged: f64 = flow.stages.iter().map(|stage| stage.cpu_seconds).sum();
    let measured = Measured {
        samples,
        batches,
        batch_size: batch_size as u64,
        elapsed_seconds: elapsed,
        first_batch_seconds: first_batch.as_secs_f64(),
        images_per_second,
        megabytes_per_second: flow.stage(Stage::Fetch).bytes as f64 / 1e6 / elapsed,
        cpu_ms_per_image: cpu.as_secs_f64() * 1e3 * per_sample,
        other_cpu_seconds: (cpu.as_secs_f64() - staged).max(0.0),
        peak_memory_bytes,
        limiting_stage,
        decode_limit,
        cache: data.sources.cache_counts(),
        flow,
        s3,
    };
    if args.json {
        let value = serde_json::to_value(&measured).map_err(std::io::Error::from)?;
        outln!("{value:#}");
    } else {
        out!("{}", describe(&measured, config.s3.embedded_root.is_some()));
    }
    Ok(())
}

/// Converts a batch to f32, as the models read it.
fn as_f32(data: &BatchData) -> Vec<f32> {
    match data {
        BatchData::Pixels { levels, .. } => normalize(levels),
        BatchData::Latents {
            moments,
            prompt_embeds,
            pooled,
        } => {
            let embeds = prompt_embeds.iter().flat_map(|embeds| &embeds.values);
            let pooled = pooled.iter().flat_map(|pooled| &pooled.values);
            let halves = moments.values.iter().chain(embeds).chain(pooled);
            halves.map(|half| half.to_f32()).collect()
        }
    }
}

fn describe(measured: &Measured, embedded: bool) -> String {
    let mut text = String::new();
    let per_image = 1e3 / measured.samples.max(1) as f64;
    let mut line = |line: std::fmt::Arguments<'_>| text.push_str(&format!("{line}\n"));
    line(format_args!(
        "{:<8} {:>9} {:>10} {:>9} {:>10} {:>10} {:>8} {:>12} {:>7}",
        "stage",
        "items",
        "MB",
        "busy s",
        "starved s",
        "blocked s",
        "CPU s",
        "CPU ms/image",
        "busy %"
    ));
    for (stage, busy) in measured
        .flow
        .stages
        .iter()
        .filter_map(|s| Some((s, s.busy_share()?)))
    {
        let StageSnapshot {
            stage,
            items,
            bytes,
            busy_seconds,
            starved_seconds,
            blocked_seconds,
            cpu_seconds,
        } = stage;
        // The network's threads do the fetching; their CPU time is not measured per stage.
        let [cpu, per_image] = if *stage == Stage::Fetch.name() {
            ["-".to_owned(), "-".to_owned()]
        } else {
            [
                format!("{cpu_seconds:.2}"),
                format!("{:.3}", cpu_seconds * per_image),
            ]
        };
        line(format_args!(
            "{:<8} {items:>9} {:>10.2} {busy_seconds:>9.2} {starved_seconds:>10.2} {blocked_seconds:>10.2} {cpu:>8} {per_image:>12} {:>7.0}",
            stage,
            *bytes as f64 / 1e6,
            busy * 100.0
        ));
    }
    line(format_args!(
        "times are summed over a stage's threads; an item is an object in fetch, a batch in batch, else a sample; fetch is busy while it\n\
         waits for the network, and its CPU time is in \"besides the stages\"; train is only the conversion of batches to f32"
    ));
    line(format_args!(""));
    let mut fact = |name: &str, value: String| text.push_str(&format!("{name:<20} {value}\n"));
    fact(
        "speed",
        format!(
            "{:.1} images/s, {:.2} MB/s ({} in {:.2} s)",
            measured.images_per_second,
            measured.megabytes_per_second,
            counted(measured.samples, "image"),
            measured.elapsed_seconds
        ),
    );
    fact(
        "first batch",
        format!("after {:.2} s", measured.first_batch_seconds),
    );
    let server = if embedded {
        ", the embedded S3 server"
    } else {
        ""
    };
    fact(
        "CPU",
        format!(
            "{:.2} ms an image, {:.2} ms of it besides the stages (network{server})",
            measured.cpu_ms_per_image,
            measured.other_cpu_seconds * per_image
        ),
    );
    if let Some(bytes) = measured.peak_memory_bytes {
        fact("peak memory", format!("{:.0} MB", bytes as f64 / 1e6));
    }
    if let Some(CacheCounts { hits, misses }) = measured.cache {
        let text = format!("{} from disk, {misses} fetched", counted(hits, "shard"));
        fact("data.cache_dir", text);
    }
    for (name, counts) in [
        ("left out", &measured.flow.skipped),
        ("repeated requests", &measured.s3.retries),
    ] {
        if !counts.is_empty() {
            let list: Vec<String> = counts
                .iter()
                .map(|(reason, count)| format!("{reason} {count}"))
                .collect();
            fact(name, list.join(", "));
        }
    }
    if let Some(stage) = measured.limiting_stage {
        fact(
            "limit",
            format!("{stage}: its threads wait least for others"),
        );
    }
    if let Some(limit) = &measured.decode_limit {
        fact(
            "machine",
            format!(
                "{:.1} images/s are decoded, resized and cropped from memory by {}, {:.2} ms of CPU each; the stream reached {:.0} %",
                limit.images_per_second,
                counted(limit.threads, "thread"),
                limit.cpu_ms_per_image,
                limit.reached * 100.0
            ),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffey_pipeline::FlowMetrics;

    #[test]
    fn bench_table_lists_stages_that_worked() {
        let metrics = FlowMetrics::new();
        let decode = metrics.stage(Stage::Decode);
        decode.add_items(10);
        decode.add_busy(Duration::from_secs(2));
        decode.add_blocked(Duration::from_secs(2));
        metrics.skip("no image");
        let flow = metrics.snapshot();
        let measured = Measured {
            samples: 10,
            batches: 1,
            batch_size: 10,
            elapsed_seconds: 2.0,
            first_batch_seconds: 1.0,
            images_per_second: 5.0,
            megabytes_per_second: 0.0,
            cpu_ms_per_image: 1.0,
            other_cpu_seconds: 0.004,
            peak_memory_bytes: None,
            limiting_stage: flow.limiting_stage(),
            cache: Some(CacheCounts { hits: 3, misses: 1 }),
            decode_limit: Some(DecodeLimitReport {
                images: 10,
                threads: 2,
                images_per_second: 6.25,
                cpu_ms_per_image: 300.0,
                reached: 0.8,
            }),
            flow,
            s3: S3Counts::default(),
        };
        let text = describe(&measured, false);
        let row: Vec<&str> = text
            .lines()
            .find(|l| l.starts_with("decode"))
            .unwrap()
            .split_whitespace()
            .collect();
        assert_eq!(
            row,
            [
                "decode", "10", "0.00", "2.00", "0.00", "2.00", "0.00", "0.000", "50"
            ]
        );
        assert!(!text.contains("\nfetch"));
        assert!(
            text.contains("no image 1")
                && text.contains("3 shards from disk, 1 fetched")
                && text.contains("limit                decode")
                && text.contains("the stream reached 80 %"),
            "{text}"
        );
    }
}
