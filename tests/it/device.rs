//! Devices that can't be opened, and what a binary with CUDA needs.

#[cfg(not(feature = "cuda"))]
#[test]
fn a_binary_without_cuda_refuses_cuda_devices() {
    let args = "sample --model assets/quickstart/teacher --prompt a --out a.png --device cuda:0";
    let args: Vec<&str> = args.split(' ').collect();
    let words = ["--device cuda:0 can't be opened: this binary was built without CUDA"];
    crate::support::refuse(2, &args, &words);
}

#[cfg(feature = "cuda")]
mod with_cuda {
    use std::path::Path;
    use std::process::Command;

    use crate::support::{QUICKSTART, args, command, refused};

    /// Runs a command that opens cuda:0 on a machine without a driver. Does nothing on a machine with one.
    fn without_driver(args: &[String], start: &str) {
        if Path::new("/dev/nvidiactl").exists() {
            return;
        }
        let mut command = command(args);
        command
            .env_remove("LD_LIBRARY_PATH")
            .env("RUST_BACKTRACE", "1");
        let message = refused(command, 2, &[]);
        let lines: Vec<&str> = message.lines().collect();
        let end = "can't be opened: no NVIDIA driver: libcuda.so.1 not found; install the driver (in a container: pass the GPU to it, as \
                   with `--gpus all`), or use \"cpu\"";
        assert_eq!(lines, [format!("error: {start}{end}")]);
    }

    #[test]
    fn missing_driver_is_one_line_with_the_remedy() {
        let train = args("train", QUICKSTART, ["train.device=cuda:0"]);
        let start = "-s train.device=cuda:0: key train.device = \"cuda:0\": ";
        without_driver(&train, start);

        let setting = "encode.devices=['cpu', 'cuda:0']";
        let train = args("train", QUICKSTART, [setting]);
        let start = format!("-s {setting}: key encode.devices[1] = \"cuda:0\": ");
        without_driver(&train, &start);

        let sample =
            "sample --model assets/quickstart/teacher --prompt a --out a.png --device cuda:0";
        let sample: Vec<String> = sample.split(' ').map(str::to_owned).collect();
        without_driver(&sample, "--device cuda:0 ");
    }

    #[test]
    fn no_cuda_library_is_needed_at_the_start() {
        // From binutils, as the linker's driver is.
        let output = Command::new("readelf")
            .args(["-d", env!("CARGO_BIN_EXE_coffey")])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let needed: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("(NEEDED)"))
            .collect();
        assert!(needed.iter().any(|line| line.contains("libc.so")), "{text}");
        for library in ["libcu", "libnv"] {
            assert!(
                !needed.iter().any(|line| line.contains(library)),
                "a function of it is missing in src/device/symbols.rs: {needed:?}"
            );
        }
    }
}
