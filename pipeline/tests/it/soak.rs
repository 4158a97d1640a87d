//! A stream over a faulty network equals one over a good network, bit for bit.

use crate::support::proxy::{chance, clean};
use crate::support::{Bench, Faulty, config, shard, take, urls};
use coffey_pipeline::{Batch, StreamConfig};

/// The share of requests that fail.
const SHARE: f64 = 0.2;

fn batches(server: &Faulty, config: StreamConfig, count: usize) -> (Vec<Batch>, Bench) {
    let bench = server.bench(10);
    let stream = bench.open(config).unwrap();
    let batches = take(&stream, &bench.metrics, count).unwrap();
    assert_eq!(batches.len(), count);
    drop(stream);
    (batches, bench)
}

fn soak(shards: u32, samples: u32, epochs: u32, seeds: std::ops::Range<u64>) {
    let server = Faulty::start(clean());
    let size = shard(0, samples).len();
    for n in 0..shards {
        server.write(&format!("{n:05}.tar"), &shard(n, samples));
    }
    let all = server.both(&format!("{{00000..{:05}}}.tar", shards - 1));
    for url in &all {
        let config = config(urls(url));
        let count = (shards * samples * epochs) as usize / config.batch_size;
        let (expected, _) = batches(&server, config.clone(), count);
        assert_eq!(server.proxy.requests().len() as u32 / (shards * epochs), 1);
        for seed in seeds.clone() {
            server.proxy.follow(chance(seed, SHARE, size));
            let (found, bench) = batches(&server, config.clone(), count);
            assert!(found == expected, "seed {seed} over {url}");
            let requests = server.proxy.requests().len();
            let retries = bench.sources.s3_server().counts().retries;
            println!("seed {seed}: {requests} requests, repeated {retries:?}");
            assert!(requests as f64 > f64::from(shards * epochs) * 1.1);

            // Resumes in the middle, under other faults.
            server.proxy.follow(chance(seed + 1000, SHARE, size));
            let middle = count / 2;
            let mut resumed = config.clone();
            resumed.resume = Some(expected[middle - 1].cursor.clone());
            let (found, _) = batches(&server, resumed, count - middle);
            assert!(
                found == expected[middle..],
                "resumed, seed {seed} over {url}"
            );
        }
        server.proxy.follow(clean());
    }
}

#[test]
fn faults_on_one_request_in_five_change_no_bit() {
    soak(50, 4, 2, 0..1);
}

mod slow {
    use super::soak;

    #[test]
    #[ignore = "takes minutes"]
    fn faults_on_one_request_in_five_change_no_bit_of_long_runs() {
        soak(400, 12, 3, 0..8);
    }
}
