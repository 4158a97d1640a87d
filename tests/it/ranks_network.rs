//! Ranks on machines of their own, joined by a network that is slow, loses packets, or breaks.

/// Tests that need root, `iproute2`, and Debian's `openmpi-bin` and `mpich`.
mod needs_netns {
    use std::fs::File;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Stdio};
    use std::thread;
    use std::time::{Duration, Instant};

    use tempfile::TempDir;

    use crate::support::mpi::{assert_same, launched, newest_checkpoint, train};
    use crate::support::network::Network;
    use crate::support::{QUICKSTART_LORA, command, run, says, text, wait_for_steps};

    /// The machine of the launcher, of rank 0 and of rank 1.
    const MACHINES: [&str; 3] = ["desk", "north", "south"];
    /// Seconds without an answer after which a rank ends the run.
    const STALL: u64 = 3;
    /// The longest time that a job of these tests may take.
    const LONGEST: Duration = Duration::from_secs(90);

    #[derive(Clone, Copy, Debug)]
    enum Launcher {
        OpenMpi,
        Mpich,
    }

    /// A job of two ranks.
    struct Job {
        launcher: Child,
        /// File of its standard error: processes that a launcher leaves behind would keep a pipe open.
        said: PathBuf,
    }

    impl Job {
        fn start(network: &Network, launcher: Launcher, args: &[String]) -> Self {
            let agent = network.agent();
            let desk = Network::address(0);
            let ranks = [1, 2].map(Network::address).join(",");
            let words = match launcher {
                Launcher::OpenMpi => vec![
                    "mpirun.openmpi",
                    "--bind-to",
                    "none",
                    "--mca",
                    "plm_rsh_agent",
                    text(&agent),
                    "--host",
                    ranks.as_str(),
                ],
                Launcher::Mpich => vec![
                    "mpiexec.hydra",
                    "-localhost",
                    desk.as_str(),
                    "-launcher",
                    "ssh",
                    "-launcher-exec",
                    text(&agent),
                    "-hosts",
                    ranks.as_str(),
                ],
            };
            let enter = network.on(0);
            let mut all: Vec<&str> = enter.iter().map(String::as_str).collect();
            all.extend(words);
            let said = network.folder().join("said");
            let launcher = launched(&all, 2, args, None)
                // UCX would find that all machines have one kernel, and try shared memory.
                .env("UCX_TLS", "tcp,self")
                .env("TMPDIR", network.folder())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(&said).unwrap())
                .spawn()
                .unwrap();
            Self { launcher, said }
        }

        /// Waits for the end; returns the exit code and standard error.
        fn end(&mut self) -> (Option<i32>, String) {
            let begun = Instant::now();
            loop {
                let ended = self.launcher.try_wait().unwrap();
                let said = std::fs::read(&self.said).unwrap();
                let said = String::from_utf8_lossy(&said).into_owned();
                if let Some(status) = ended {
                    return (status.code(), said);
                }
                assert!(begun.elapsed() < LONGEST, "the job hangs: {said}");
                thread::sleep(Duration::from_millis(20));
            }
        }
    }

    impl Drop for Job {
        fn drop(&mut self) {
            // It may have ended already; what it leaves ends with the machines.
            self.launcher.kill().ok();
            self.launcher.wait().ok();
            if thread::panicking() {
                let said = std::fs::read(&self.said).unwrap_or_default();
                eprintln!("{}", String::from_utf8_lossy(&said));
            }
        }
    }

    /// The arguments of a short run of a LoRA, whose gradients are small.
    fn train_lora(output: &Path, more: &[&str]) -> Vec<String> {
        let mut args = train(text(output), more);
        args[2] = QUICKSTART_LORA.to_owned();
        args
    }

    #[test]
    #[ignore = "needs root, iproute2, Open MPI and MPICH"]
    fn slow_network_that_loses_packets_changes_no_bit() {
        let folder = TempDir::new().unwrap();
        let one = folder.path().join("one");
        run(command(&train_lora(&one, &[])), 0);
        for launcher in [Launcher::OpenMpi, Launcher::Mpich] {
            let two = folder.path().join(format!("{launcher:?}"));
            let network = Network::start(&MACHINES);
            network.slow(Duration::from_millis(20), 10);
            let mut job = Job::start(&network, launcher, &train_lora(&two, &[]));
            let (code, said) = job.end();
            assert_eq!(code, Some(0), "{said}");
            says(&said, &["2 ranks on 2 machines, ", "4 lanes"]);
            assert_same(&two, &one);
            // The gradients of four steps have gone through the switch.
            let (bytes, lost) = network.traffic();
            assert!(bytes > 10_000_000 && lost > 0, "{bytes} bytes, {lost} lost");
        }
    }

    /// Cuts off the machine of a rank during training.
    #[track_caller]
    fn cut_off(launcher: Launcher, rank: usize) {
        let folder = TempDir::new().unwrap();
        let output = folder.path().join("run");
        let train = |steps: usize| {
            let steps = format!("train.max_steps={steps}");
            let stall = format!("train.stall_timeout={STALL}");
            train_lora(&output, &["checkpoint.every=12", &steps, &stall])
        };
        let network = Network::start(&MACHINES);
        if matches!(launcher, Launcher::OpenMpi) {
            // Its mpirun ends when TCP has given the machine up.
            network.give_up_early();
        }
        let mut job = Job::start(&network, launcher, &train(100_000));
        // A step after the checkpoint of step 12.
        wait_for_steps(&output, 14);
        network.cut(rank + 1);
        let begun = Instant::now();
        let (code, said) = job.end();
        // Every rank waits for the limit; the rest is the launcher's.
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3 * STALL + 15), "{took:?}");
        assert_eq!(code, Some(1), "{said}");
        let name = MACHINES[rank + 1];
        says(
            &said,
            &[
                "error: MPI: ",
                &format!("no answer from rank {rank} ({name})"),
            ],
        );
        // The rank that is cut off ends as well, though MPICH's MPI_Abort gets no answer there.
        while (1..=2).any(|machine| network.runs(machine, "coffey")) {
            let took = begun.elapsed();
            assert!(took < Duration::from_secs(3 * STALL + 30), "{took:?}");
            thread::sleep(Duration::from_millis(50));
        }
        // The last checkpoint is whole, and one process goes on from it.
        let step = newest_checkpoint(&output);
        let said = run(command(&train(step + 1)), 0).1;
        says(&said, &[&format!("checkpoint-{step} (step {step})")]);
    }

    #[test]
    #[ignore = "needs root, iproute2 and Open MPI"]
    fn rank_1_cut_off_under_open_mpi_is_named() {
        cut_off(Launcher::OpenMpi, 1);
    }

    #[test]
    #[ignore = "needs root, iproute2 and MPICH"]
    fn rank_1_cut_off_under_mpich_is_named() {
        cut_off(Launcher::Mpich, 1);
    }

    #[test]
    #[ignore = "needs root, iproute2 and MPICH"]
    fn rank_0_cut_off_under_mpich_is_named() {
        cut_off(Launcher::Mpich, 0);
    }
}
