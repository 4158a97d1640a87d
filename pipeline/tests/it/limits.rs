//! The limiting stage of streams in which one stage is slow on purpose.

use std::path::Path;
use std::time::Duration;

use crate::support::{Bench, config, picture, shard, tar_of, urls};
use coffey_pipeline::flow::{FlowSnapshot, Recent, channel};
use coffey_pipeline::stages::{FlowChannel, Stage};
use coffey_pipeline::{S3Options, ShardUrl, StreamConfig, StreamError, decode_limit};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Writes one shard of `samples` square pictures with sides of `side` pixels.
fn pictures(folder: &Path, samples: u32, side: u32) -> Vec<ShardUrl> {
    let members: Vec<_> = (0..samples)
        .flat_map(|n| {
            [
                (format!("{n:04}.png"), picture(n, side, side)),
                (format!("{n:04}.txt"), b"a picture".to_vec()),
            ]
        })
        .collect();
    std::fs::write(folder.join("0.tar"), tar_of(&members)).unwrap();
    urls(folder.join("0.tar").to_str().unwrap())
}

fn endless(shards: Vec<ShardUrl>, decode_threads: usize) -> StreamConfig {
    StreamConfig {
        resample: true,
        decode_threads,
        open_shards: 1,
        ..config(shards)
    }
}

/// Runs `batches` batches through a stream, an encoder and a trainer that take the given times for each batch.
/// Returns the recent limiting stage and the one since the first batch.
fn limits(
    bench: &Bench,
    config: StreamConfig,
    batches: usize,
    (encoding, training): (Duration, Duration),
) -> [Option<Stage>; 2] {
    let stream = bench.open(config).unwrap();
    let metrics = &bench.metrics;
    let (encoded, ready) = channel(metrics, FlowChannel::Encoded.name(), 2);
    let (encode, train) = (metrics.stage(Stage::Encode), metrics.stage(Stage::Train));
    let mut recent = Recent::default();
    let mut last = None;
    std::thread::scope(|scope| {
        let batches_in = stream.batches().clone();
        scope.spawn(move || {
            while let Some(batch) = batches_in.recv_blocking(&encode) {
                let batch = batch.unwrap();
                encode.work(|| std::thread::sleep(encoding));
                if encoded.send_blocking(batch, &encode).is_err() {
                    return;
                }
            }
        });
        for _ in 0..batches {
            ready.recv_blocking(&train).unwrap();
            train.work(|| std::thread::sleep(training));
            last = recent.mark(metrics).and_then(FlowSnapshot::limiting_stage);
        }
        ready.close();
        stream.batches().close();
    });
    [
        last,
        recent
            .overall(metrics)
            .and_then(|flow| flow.limiting_stage()),
    ]
}

const NO_TIME: Duration = Duration::from_micros(1);

#[test]
fn limit_is_decode_for_large_images() {
    let folder = TempDir::new().unwrap();
    let bench = Bench::new(S3Options::default());
    let config = endless(pictures(folder.path(), 16, 500), 2);
    let found = limits(&bench, config, 40, (NO_TIME, NO_TIME));
    assert_eq!(found, [Some(Stage::Decode); 2], "{:#?}", bench.metrics);
}

#[test]
fn limit_is_slow_encoder_or_trainer() {
    let folder = TempDir::new().unwrap();
    let shards = pictures(folder.path(), 64, 24);
    let slow = Duration::from_millis(8);
    for (times, stage) in [
        ((slow, NO_TIME), Stage::Encode),
        ((NO_TIME, slow), Stage::Train),
    ] {
        let bench = Bench::new(S3Options::default());
        let found = limits(&bench, endless(shards.clone(), 24), 100, times);
        assert_eq!(found, [Some(stage); 2], "{:#?}", bench.metrics);
    }
}

#[test]
fn limit_is_fetch_for_slow_server() {
    let bench = Bench::new(S3Options::default());
    let object = shard(0, 40);
    let listener = bench
        .runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let url = format!("http://{}/0.tar", listener.local_addr().unwrap());
    bench.runtime.spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let object = object.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(socket.read_u8().await?);
                }
                let answer = format!(
                    "HTTP/1.1 200 OK\r\netag: \"1\"\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    object.len()
                );
                socket.write_all(answer.as_bytes()).await?;
                for piece in object.chunks(8 << 10) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    socket.write_all(piece).await?;
                }
                std::io::Result::Ok(())
            });
        }
    });
    let config = endless(urls(&url), 2);
    let found = limits(&bench, config, 30, (NO_TIME, NO_TIME));
    assert_eq!(found, [Some(Stage::Fetch); 2], "{:#?}", bench.metrics);
}

#[test]
fn decode_limit_is_measured_on_stream_samples() {
    let folder = TempDir::new().unwrap();
    let bench = Bench::new(S3Options::default());
    let of = |config: &StreamConfig, samples| {
        decode_limit(config, &bench.sources, bench.runtime.handle(), samples)
    };
    let config = endless(pictures(folder.path(), 10, 300), 2);
    let found = of(&config, 25).unwrap();
    assert_eq!(found.images, 25);
    assert!(
        found.threads >= 1 && !found.elapsed.is_zero() && !found.cpu.is_zero(),
        "{found:?}"
    );
    // The measurement does not count in the run's metrics.
    assert_eq!(bench.metrics.snapshot().stage(Stage::Decode).items, 0);
    let gone = endless(urls("nowhere/0.tar"), 2);
    assert!(matches!(of(&gone, 5), Err(StreamError::Source(_))));
}
