//! Runs of several ranks: the same bits as one process, and an end by name where a rank fails.

use std::path::Path;

use tempfile::TempDir;

use crate::support::mpi::train;
use crate::support::{command, refused, says};

#[test]
fn ranks_without_mpi_are_refused() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let run = run.to_str().unwrap();
    for (rank, world) in [
        ("RANK", "WORLD_SIZE"),
        ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
    ] {
        let mut one = command(&train(run, &[]));
        one.env(rank, "1").env(world, "2");
        refused(one, 2, &[rank, "rank 1 of 2", "mpirun", "srun --mpi=pmix"]);
    }
    let mut without_library = command(&train(run, &["mpi.library=libnothing.so.1"]));
    without_library
        .env("OMPI_COMM_WORLD_RANK", "0")
        .env("OMPI_COMM_WORLD_SIZE", "2");
    refused(without_library, 2, &["libnothing.so.1", "mpi.library"]);
    assert!(!Path::new(run).exists());
}

/// Tests that need Debian's `openmpi-bin` and `mpich`.
mod needs_mpi {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::support::cloud::Cloud;
    use crate::support::cloud::proxy::clean;
    use crate::support::mpi::{assert_same, launched, newest_checkpoint};
    use crate::support::watched::Watched;
    use crate::support::{
        PRECOMPUTE, QUICKSTART, QUICKSTART_LORA, args, run, send, steps_made, texts, wait_for_steps,
    };

    const OPEN_MPI: &[&str] = &["mpirun.openmpi", "--oversubscribe", "--bind-to", "none"];
    const MPICH: &[&str] = &["mpiexec.hydra"];

    fn ranks(ranks: usize, args: &[String]) -> Command {
        launched(OPEN_MPI, ranks, args, None)
    }

    /// The process of a rank of a job that is started by `launcher`.
    fn process_of(launcher: &Child, rank: usize) -> u32 {
        let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            for entry in std::fs::read_dir("/proc").unwrap().flatten() {
                let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
                let status = String::from_utf8_lossy(&read("status")).into_owned();
                let child = status.contains(&format!("PPid:\t{}\n", launcher.id()));
                let environment = read("environ");
                let mut variables = environment.split(|&byte| byte == 0);
                if child && variables.any(|variable| variable == wanted.as_bytes()) {
                    return entry.file_name().to_string_lossy().parse().unwrap();
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("no process of rank {rank}");
    }

    /// Waits until a rank is gone: mpirun may end before it, and rank 0 holds the lock of the output until then.
    fn wait_for_end(process: u32) {
        let begun = Instant::now();
        while Path::new(&format!("/proc/{process}")).exists() {
            assert!(begun.elapsed() < Duration::from_secs(60), "rank 0 goes on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn signal(process: u32, signal: &str) {
        let mut kill = Command::new("kill");
        let sent = kill.args([signal, &process.to_string()]).status();
        assert!(sent.unwrap().success());
    }

    fn start(mut command: Command) -> Child {
        command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    #[ignore = "needs Open MPI and MPICH"]
    fn ranks_change_no_bit() {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.path().join(name);
        let grids = ["validation.every=2", "report.endpoint_captions=1"];
        let args = |name: &str| train(at(name).to_str().unwrap(), &grids);
        run(command(&args("one")), 0);
        for (name, launcher, n) in [
            ("two", OPEN_MPI, 2),
            ("four", OPEN_MPI, 4),
            ("mpich-1", MPICH, 1),
            ("mpich-2", MPICH, 2),
        ] {
            let said = run(launched(launcher, n, &args(name), None), 0).1;
            if n > 1 {
                says(&said, &[&format!("{n} ranks on 1 machine, "), "4 lanes"]);
                assert_eq!(
                    said.matches("waiting for the first batch").count(),
                    1,
                    "{said}"
                );
            }
            assert_same(&at(name), &at("one"));
        }
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn eight_ranks_share_the_shards() {
        let cloud = Cloud::start(clean());
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.path().join(name);
        // As many shards as lanes.
        let shards = cloud.root.path().join("served/emoji");
        for number in 4..8 {
            let shard = |number: u32| shards.join(format!("{number:05}.tar"));
            std::fs::copy(shard(number - 4), shard(number)).unwrap();
        }
        let args = |name: &str| {
            let more = [
                "train.gradient_accumulation=8",
                "train.max_steps=2",
                "data.shards=s3://emoji/{00000..00007}.tar",
            ];
            let mut args = train(at(name).to_str().unwrap(), &more);
            args[2] = cloud.config.to_str().unwrap().to_owned();
            args
        };
        run(command(&args("one")), 0);
        let before = cloud.proxy.requests().len();
        let said = run(ranks(8, &args("eight")), 0).1;
        says(&said, &["8 ranks on 1 machine, ", "8 lanes"]);
        assert_same(&at("eight"), &at("one"));
        // One rank looks each shard up, by its first byte. Each lane reads a shard, and may begin its next epoch with another.
        let requests = cloud.proxy.requests();
        let shards = requests[before..].iter();
        let shards = shards.filter(|request| request.starts_with("get /emoji/"));
        let (looked_up, read): (Vec<&String>, Vec<_>) =
            shards.partition(|request| request.contains("range: bytes=0-0\n"));
        assert_eq!(looked_up.len(), 8);
        assert!((8..=16).contains(&read.len()), "{}", read.len());
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn ranks_change_no_bit_of_other_runs() {
        let folder = TempDir::new().unwrap();
        let latents = folder.path().join("latents");
        let output = format!("latents.output={}", latents.display());
        run(
            command(&args("precompute", PRECOMPUTE, [output.as_str()])),
            0,
        );
        let shards = format!("data.shards={}/", latents.display());
        let from_latents = ["data.kind=latents", shards.as_str()];
        let lora = ["lora.dropout=0.1", "optimizer.kind=adamw8bit"];
        // The loss scale begins so high that the first steps overflow.
        let mixed = ["train.mixed_precision=fp16", "optimizer.kind=adamw8bit"];
        for (name, config, more) in [
            ("lora", QUICKSTART_LORA, &lora[..]),
            ("mixed", QUICKSTART, &mixed[..]),
            ("latents", QUICKSTART, &from_latents[..]),
        ] {
            let at = |n: usize| folder.path().join(format!("{name}-{n}"));
            let args = |n: usize| {
                let mut args = train(at(n).to_str().unwrap(), more);
                args[2] = config.to_owned();
                args
            };
            run(command(&args(1)), 0);
            run(ranks(2, &args(2)), 0);
            assert_same(&at(2), &at(1));
        }
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn killed_run_goes_on_with_fewer_ranks() {
        let cloud = Cloud::start(clean());
        let folder = TempDir::new().unwrap();
        let config = cloud.config.to_str().unwrap();
        let local = folder.path().to_str().unwrap();
        for (output, files) in [
            (local.to_owned(), folder.path().to_owned()),
            ("s3://out".to_owned(), cloud.out()),
        ] {
            let scratch = format!("train.scratch={local}/scratch");
            let args = |name: &str| {
                let mut args = train(
                    &format!("{output}/{name}"),
                    &["train.max_steps=9", &scratch, "checkpoint.background=false"],
                );
                args[2] = config.to_owned();
                args
            };
            run(command(&args("whole")), 0);
            let saved = |step: u32| files.join(format!("parts/checkpoint-{step}/state.json"));
            for (n, step) in [(4, 2), (2, 6)] {
                let mut job = start(ranks(n, &args("parts")));
                let begun = Instant::now();
                while !saved(step).exists() {
                    assert!(begun.elapsed() < Duration::from_secs(180));
                    std::thread::sleep(Duration::from_millis(20));
                }
                let leader = process_of(&job, 0);
                signal(process_of(&job, n - 1), "-KILL");
                assert!(!job.wait().unwrap().success());
                wait_for_end(leader);
            }
            run(command(&args("parts")), 0);
            assert_same(&files.join("parts"), &files.join("whole"));
        }
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn stopped_rank_is_named() {
        let folder = TempDir::new().unwrap();
        let output = folder.path().join("run");
        let args = train(
            output.to_str().unwrap(),
            &["train.max_steps=100000", "train.stall_timeout=3"],
        );
        let job = start(ranks(2, &args));
        wait_for_steps(&output, 3);
        let (leader, stopped) = (process_of(&job, 0), process_of(&job, 1));
        signal(stopped, "-STOP");
        let begun = Instant::now();
        let ended = job.wait_with_output().unwrap();
        assert!(
            begun.elapsed() < Duration::from_secs(15),
            "{:?}",
            begun.elapsed()
        );
        let (_, said) = texts(&ended);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        says(&said, &["error: ", "no answer from rank 1"]);
        wait_for_end(leader);
        // The last checkpoint is whole, and one process goes on from it.
        let step = newest_checkpoint(&output);
        let steps = format!("train.max_steps={}", step + 1);
        let said = run(command(&train(output.to_str().unwrap(), &[&steps])), 0).1;
        says(&said, &[&format!("checkpoint-{step} (step {step})")]);
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn leader_that_is_gone_is_named_while_it_draws() {
        let folder = TempDir::new().unwrap();
        let output = folder.path().join("run");
        // A grid takes much longer than the time without a sign of life.
        let args = train(
            output.to_str().unwrap(),
            &[
                "train.stall_timeout=2",
                "validation.every=1",
                "validation.images_per_prompt=64",
                "report.grid=true",
            ],
        );
        let job = start(ranks(2, &args));
        wait_for_steps(&output, 1);
        let leader = process_of(&job, 0);
        signal(leader, "-STOP");
        let ended = job.wait_with_output().unwrap();
        let (_, said) = texts(&ended);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        says(&said, &["rank 1: error: ", "no answer from rank 0"]);
        wait_for_end(leader);
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn rank_that_never_starts_ends_the_job() {
        let folder = TempDir::new().unwrap();
        let output = folder.path().join("run");
        let args = train(output.to_str().unwrap(), &["train.stall_timeout=2"]);
        let mut job = ranks(1, &args);
        job.args([":", "-n", "1", "sleep", "1000"]);
        let said = run(job, 1).1;
        says(&said, &["error: MPI: MPI_Init has not ended for 4.0 s"]);
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn check_measures_the_ranks() {
        let check = args("check", QUICKSTART, ["train.gradient_accumulation=4"]);
        let (said, _) = run(ranks(2, &check), 0);
        says(
            &said,
            &[
                "ok       ranks          2 ranks on 1 machine, Open MPI",
                "each reads 2 of 4 lanes and about 2 of 4 shards",
                "GB/s",
                "divided between 2 ranks",
            ],
        );
        assert_eq!(said.matches("configuration").count(), 1, "{said}");
        let check = args("check", QUICKSTART, ["train.gradient_accumulation=2"]);
        let said = run(ranks(4, &check), 2).1;
        says(&said, &["4 ranks can't share 2 lanes"]);
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn metrics_show_the_slowest_rank_and_the_exchange() {
        let folder = TempDir::new().unwrap();
        let output = folder.path().join("run");
        let args = train(output.to_str().unwrap(), &["train.max_steps=100000"]);
        let watched = Watched::of(ranks(2, &args));
        wait_for_steps(&output, 2);
        let text = watched.get("/metrics").unwrap().text();
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("{name}: {text}"))
                .trim()
                .parse::<f64>()
                .unwrap()
        };
        assert_eq!(value("coffey_ranks "), 2.0);
        assert!(value("coffey_slowest_rank ") < 2.0);
        let slowest = value("coffey_slowest_rank_seconds ");
        assert!(slowest >= value("coffey_fastest_rank_seconds ") && slowest > 0.0);
        assert!(value("coffey_exchange_seconds ") > 0.0);
        watched.terminate();
        let (code, _) = watched.end();
        assert_ne!(code, Some(0));
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn signal_to_one_rank_stops_all() {
        let folder = TempDir::new().unwrap();
        let output = folder.path().join("run");
        let args = |steps: &str| train(output.to_str().unwrap(), &[steps]);
        let mut job = start(ranks(2, &args("train.max_steps=100000")));
        wait_for_steps(&output, 3);
        signal(process_of(&job, 1), "-TERM");
        assert_eq!(job.wait().unwrap().code(), Some(143));
        let made = steps_made(&output);
        assert!(
            output
                .join(format!("checkpoint-{made}/state.json"))
                .is_file()
        );
        run(ranks(4, &args(&format!("train.max_steps={}", made + 1))), 0);
        // A signal to the launcher reaches all ranks; the job ends with the launcher's own code.
        let mut job = start(ranks(2, &args("train.max_steps=100000")));
        wait_for_steps(&output, made + 3);
        send(&job, "TERM");
        assert!(!job.wait().unwrap().success());
    }

    #[test]
    #[ignore = "needs Open MPI"]
    fn ranks_that_do_not_fit_are_refused() {
        let folder = TempDir::new().unwrap();
        let output = folder.path().join("run");
        let output = output.to_str().unwrap();
        let ours = train(output, &[]);
        let said = run(ranks(3, &ours), 2).1;
        says(
            &said,
            &["error: ", "3 ranks can't share 4 lanes: start 2 or 4 ranks"],
        );
        let one_lane = train(output, &["train.gradient_accumulation=1"]);
        let said = run(ranks(2, &one_lane), 2).1;
        says(
            &said,
            &["2 ranks can't share 1 lane", "train.gradient_accumulation"],
        );
        let audited = train(output, &["audit.dir=audit"]);
        let said = run(ranks(2, &audited), 2).1;
        says(&said, &["[audit]", "start one rank"]);
        let theirs = train(output, &["train.seed=1"]);
        let said = run(launched(OPEN_MPI, 1, &ours, Some(&theirs)), 2).1;
        says(
            &said,
            &["rank 1 makes another run than rank 0: its train.seed is 1"],
        );
    }
}
