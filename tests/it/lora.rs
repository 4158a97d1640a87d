//! `coffey export`, and `coffey sample` with a LoRA, on the quickstart's teacher.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use coffey::lora::{Adapter, Layout, Lora, Modules};
use image::RgbImage;
use serde_json::json;
use tempfile::TempDir;

use crate::support::{command, messages, refuse, repository, says, succeed, teacher, text};

/// What the reference's scripts train, by the ends of names.
const TRAINED: [&str; 8] = [
    ".to_q",
    ".to_out.0",
    ".proj_in",
    ".ff.net.2",
    ".conv1",
    ".conv_shortcut",
    "samplers.0.conv",
    ".time_emb_proj",
];

/// A LoRA of the quickstart's teacher, whose change is large enough to be seen.
fn lora(rank: usize, alpha: f64) -> Lora {
    let modules = Modules::read(&teacher().join("unet")).unwrap();
    let mut seed = 0;
    let mut filled = |shape: &[usize], size: f32| {
        seed += 1;
        let count = shape.iter().product::<usize>();
        let values = (0..count).map(|i| size * ((i * 31 + seed * 17) % 101) as f32 / 50.0 - size);
        let tensor = Tensor::from_iter(values, &Device::Cpu).unwrap();
        tensor.reshape(shape).unwrap()
    };
    let mut adapters = BTreeMap::new();
    for (module, shape) in modules.iter() {
        if !TRAINED.iter().any(|end| module.ends_with(end)) {
            continue;
        }
        let inputs = shape[1..].iter().product::<usize>();
        let ones = vec![1; shape.len() - 2];
        let adapter = Adapter {
            down: filled(
                &[&[rank], &shape[1..]].concat(),
                (inputs as f32).sqrt().recip(),
            ),
            up: filled(&[&[shape[0], rank], &ones[..]].concat(), 0.2),
            alpha,
        };
        adapters.insert(module.to_owned(), adapter);
    }
    assert!(adapters.len() > 20, "{}", adapters.len());
    Lora { adapters }
}

fn write(lora: &Lora, layout: Layout, dtype: DType, path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let contents = lora.contents(layout, dtype).unwrap();
    contents
        .write(&mut std::fs::File::create(path).unwrap())
        .unwrap();
}

/// The folder of a finished run of a LoRA.
fn lora_run(folder: &TempDir) -> PathBuf {
    let run = folder.path().join("run");
    let lora = lora(4, 6.0);
    let files = run.join("unet_lora");
    write(
        &lora,
        Layout::Diffusers,
        DType::F32,
        &files.join("pytorch_lora_weights.safetensors"),
    );
    write(
        &lora,
        Layout::Kohya(None),
        DType::F16,
        &files.join("lora_kohya.safetensors"),
    );
    write(
        &lora,
        Layout::DiffusersWithAlpha,
        DType::F32,
        &run.join("checkpoint-5/unet_lora/pytorch_lora_weights.safetensors"),
    );
    let description = json!({"teacher": teacher(), "vae": null, "objective": "lcm"});
    std::fs::write(run.join("run.json"), description.to_string()).unwrap();
    run
}

fn sample(model: &Path, out: &Path, more: &[&str]) -> Vec<String> {
    let prompt = ["--prompt", "red apple", "--seed", "3"];
    let args = ["sample", "--model", text(model), "--out", text(out)];
    let args = args.iter().chain(&prompt).chain(more);
    args.map(|arg| (*arg).to_owned()).collect()
}

fn draw(model: &Path, folder: &TempDir, more: &[&str]) -> (RgbImage, String) {
    let out = folder.path().join("image.png");
    let said = messages(command(&sample(model, &out, more)));
    (image::open(&out).unwrap().into_rgb8(), said)
}

fn apart(a: &RgbImage, b: &RgbImage) -> u8 {
    let pixels = a.iter().zip(b.iter());
    pixels.map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

fn export(model: &Path, out: &Path, more: &[&str]) -> Vec<String> {
    let args = ["export", text(model), "--out", text(out)];
    args.iter()
        .chain(more)
        .map(|arg| (*arg).to_owned())
        .collect()
}

#[test]
fn run_of_a_lora_draws_with_its_base() {
    let folder = TempDir::new().unwrap();
    let run = lora_run(&folder);
    let (image, said) = draw(&run, &folder, &[]);
    says(
        &said,
        &[
            "4 LCM steps, no guidance",
            "unet_lora/pytorch_lora_weights.safetensors",
        ],
    );
    assert!(!said.contains("warning"), "{said}");
    for part in ["checkpoint-5", "unet_lora", "checkpoint-5/unet_lora"] {
        let (same, _) = draw(&run.join(part), &folder, &["--teacher", text(&teacher())]);
        assert!(apart(&same, &image) <= 1, "{part}");
    }
    let files = run.join("unet_lora");
    for lora in [
        &files,
        &files.join("pytorch_lora_weights.safetensors"),
        &files.join("lora_kohya.safetensors"),
    ] {
        let (same, _) = draw(&teacher(), &folder, &["--lora", text(lora)]);
        assert!(apart(&same, &image) <= 2, "{}", lora.display());
    }
    let lora = ["--lora", text(&files)];
    let with = |more: &[&str]| draw(&teacher(), &folder, &[&lora, more].concat());
    assert!(apart(&with(&["--lora-scale", "0.5"]).0, &image) > 10);
    let plain = ["--scheduler", "lcm", "--steps", "4", "--guidance", "1"];
    let (plain, _) = draw(&teacher(), &folder, &plain);
    assert!(apart(&plain, &image) > 10);
    assert!(apart(&with(&["--lora-scale", "0"]).0, &plain) == 0);
    let (_, said) = with(&["--guidance", "7.5", "--steps", "1"]);
    says(&said, &["warning: --guidance 7.5", "burn out above 2"]);
    let (_, said) = with(&["--guidance", "7.5", "--steps", "1", "--scheduler", "ddim"]);
    assert!(!said.contains("warning"), "{said}");
}

#[test]
fn merged_unet_draws_as_the_lora() {
    let folder = TempDir::new().unwrap();
    let run = lora_run(&folder);
    let (image, _) = draw(&run, &folder, &[]);
    let merged = folder.path().join("new/merged");
    let said = messages(command(&export(&run, &merged, &["--merge"])));
    says(&said, &["adapters of rank 4 from", "merged into"]);
    let lcm = ["--scheduler", "lcm", "--steps", "4", "--guidance", "1"];
    let teacher_flag = ["--teacher", text(&teacher()).to_owned().leak()];
    let (same, _) = draw(&merged, &folder, &[&lcm[..], &teacher_flag].concat());
    assert_eq!(apart(&same, &image), 0);
    let entries = |folder: &Path| {
        let entries = folder.read_dir().unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    };
    assert_eq!(
        entries(&merged),
        ["config.json", "diffusion_pytorch_model.safetensors"]
    );
    assert_eq!(entries(&folder.path().join("new")), ["merged"]);
}

#[test]
fn exported_layouts_draw_as_the_run() {
    let folder = TempDir::new().unwrap();
    let run = lora_run(&folder);
    let checkpoint = run.join("checkpoint-5");
    let (image, _) = draw(&run, &folder, &[]);
    for (format, name) in [
        ("diffusers", "a.safetensors"),
        ("kohya", "b.safetensors"),
        ("peft", "c"),
    ] {
        let out = folder.path().join(name);
        let printed = succeed(&export(&checkpoint, &out, &["--format", format]));
        assert_eq!(printed.trim_end(), text(&out));
        let file = match format {
            "peft" => out.join("adapter_model.safetensors"),
            _ => out.clone(),
        };
        let (same, _) = draw(&teacher(), &folder, &["--lora", text(&file)]);
        assert!(apart(&same, &image) <= 2, "{format}");
        refuse(2, &export(&run, &out, &["--format", format]), &["exists"]);
    }
    let [smaller, whole] = ["d", "e"].map(|name| folder.path().join(format!("{name}.safetensors")));
    let said = messages(command(&export(&run, &smaller, &["--rank", "2"])));
    says(
        &said,
        &[
            "rank 4 to 2: ",
            "% of the norm of the change is kept",
            "of rank 2",
        ],
    );
    succeed(&export(&run, &whole, &[]));
    let size = |path: &Path| path.metadata().unwrap().len();
    assert!(size(&smaller) < size(&whole) * 2 / 3);
    let (near, _) = draw(&teacher(), &folder, &["--lora", text(&smaller)]);
    assert_ne!(near, image);
}

#[test]
fn export_refuses_what_it_can_not_do() {
    let folder = TempDir::new().unwrap();
    let run = lora_run(&folder);
    let out = folder.path().join("x.safetensors");
    let base = teacher();
    let file = run.join("unet_lora/pytorch_lora_weights.safetensors");
    let wrong = |model: &Path, more: &[&str], words: &[&str]| {
        refuse(2, &export(model, &out, more), words);
    };
    wrong(&base, &[], &["is no run of a LoRA", "--lora FILE"]);
    wrong(
        &base,
        &["--lora", "nowhere"],
        &["--lora nowhere", "no such file"],
    );
    wrong(
        &base,
        &["--lora", text(&base)],
        &["pytorch_lora_weights.safetensors"],
    );
    wrong(&run, &["--merge"], &["as a folder"]);
    wrong(&run, &["--format", "peft"], &["as a folder"]);
    wrong(
        &run,
        &["--merge", "--format", "kohya"],
        &["--format", "--merge"],
    );
    wrong(&run, &["--rank", "4"], &["--rank 4", "below 4"]);
    wrong(&run, &["--rank", "0"], &["--rank", "at least 1"]);
    wrong(&run, &["--revision", "v1"], &["--revision v1"]);
    refuse(
        2,
        &export(&run, &folder.path().join("x"), &[]),
        &["must be a .safetensors file"],
    );
    let damaged = folder.path().join("damaged.safetensors");
    std::fs::write(&damaged, &std::fs::read(&file).unwrap()[..5000]).unwrap();
    refuse(
        1,
        &export(&base, &out, &["--lora", text(&damaged)]),
        &["damaged.safetensors", "cut short"],
    );
    let mut other = lora(2, 2.0);
    let adapter = other
        .adapters
        .remove("mid_block.attentions.0.proj_in")
        .unwrap();
    other
        .adapters
        .insert("mid_block.attentions.9.proj_in".to_owned(), adapter);
    write(&other, Layout::Diffusers, DType::F32, &damaged);
    refuse(
        1,
        &export(&base, &out, &["--lora", text(&damaged)]),
        &[
            "damaged.safetensors",
            "unet.mid_block.attentions.9.proj_in.lora_A.weight",
            "1 others",
        ],
    );
    assert!(!out.exists());
    std::fs::remove_file(run.join("run.json")).unwrap();
    refuse(1, &export(&run, &out, &[]), &["no run.json", "--lora"]);
    let picture = folder.path().join("x.png");
    for (model, more, words) in [
        (
            &base,
            &["--lora-scale", "2"][..],
            &["--lora-scale", "no effect"][..],
        ),
        (&base, &["--lora", "nowhere"], &["--lora nowhere"]),
        (&run, &["--unet", "unet"], &["--unet unet", "run of a LoRA"]),
    ] {
        refuse(2, &sample(model, &picture, more), words);
    }
    assert!(repository("src/lora").is_dir());
}

mod needs_python {
    use super::*;
    use crate::support::python;
    use npyz::WriterBuilder as _;
    use serde_json::Value;

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with PyTorch and diffusers"]
    fn sample_with_a_lora_draws_as_diffusers() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("lora.safetensors");
        let [noise, image] = ["noise.npy", "image.png"].map(|name| folder.path().join(name));
        let values = (0..4 * 16 * 16).map(|i| ((i * 37 % 101) as f32 - 50.0) / 29.0);
        let options = npyz::WriteOptions::<f32>::new().default_dtype();
        let options = options.shape(&[1, 4, 16, 16]);
        let mut writer = options
            .writer(std::fs::File::create(&noise).unwrap())
            .begin_nd()
            .unwrap();
        writer.extend(values).unwrap();
        writer.finish().unwrap();
        let lora = lora(4, 6.0);
        for (layout, dtype, scheduler, steps, guidance) in [
            (Layout::Diffusers, DType::F32, "lcm", "1", "1"),
            (Layout::DiffusersWithAlpha, DType::F16, "ddim", "4", "1"),
            (Layout::Kohya(None), DType::F32, "ddim", "3", "4"),
            (Layout::Kohya(None), DType::F16, "lcm", "1", "1"),
        ] {
            write(&lora, layout, dtype, &file);
            let settings = [
                "--scheduler",
                scheduler,
                "--steps",
                steps,
                "--guidance",
                guidance,
            ];
            let given = ["--lora", text(&file), "--init-latents", text(&noise)];
            succeed(&sample(
                &teacher(),
                &image,
                &[&settings[..], &given].concat(),
            ));
            let (base, unet) = (teacher(), teacher().join("unet"));
            let mut compared = [&base, &unet, &noise, &image]
                .map(|path| text(path))
                .to_vec();
            compared.extend([
                scheduler,
                steps,
                guidance,
                "red apple",
                "--lora",
                text(&file),
            ]);
            python("compare_drawing.py", &compared);
        }
    }

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with PyTorch, diffusers and PEFT"]
    fn exported_loras_and_unets_equal_diffusers() {
        let folder = TempDir::new().unwrap();
        let made = folder.path().join("made");
        python("lora_files.py", &["make", text(&made)]);
        let mut checks: Vec<Value> = Vec::new();
        for kind in ["sd", "sdxl"] {
            let base = made.join(kind);
            let unet = base.join("unet");
            let names = base
                .read_dir()
                .unwrap()
                .map(|entry| entry.unwrap().file_name());
            let names = names.map(|name| name.into_string().unwrap());
            let mut compared = 0;
            for name in names.filter(|name| name != "unet") {
                let file = match name.as_str() {
                    "peft" => base.join("peft/adapter_model.safetensors"),
                    _ => base.join(&name),
                };
                let expected = base.join(&name).join("expected.safetensors");
                let out = |what: &str| folder.path().join(format!("{kind}-{name}-{what}"));
                let given = |more: &[&str], out: &Path| {
                    let more = [&["--lora", text(&file)], more].concat();
                    messages(command(&export(&unet, out, &more)))
                };
                let merged = out("merged");
                given(&["--merge"], &merged);
                checks.push(json!({
                    "unet": merged, "dtype": "float32", "expected": expected, "tolerance": 1e-4
                }));
                compared += 1;
                if !["metadata", "patterns", "kohya"].contains(&name.as_str()) {
                    continue;
                }
                let half = out("half");
                given(&["--merge", "--dtype", "f16"], &half);
                checks.push(json!({
                    "unet": half, "dtype": "float16", "expected": expected, "tolerance": 1e-2
                }));
                for (dtype, tolerance) in [("f32", 1e-4), ("f16", 5e-3), ("bf16", 4e-2)] {
                    for format in ["diffusers", "kohya", "peft"] {
                        let is_folder = format == "peft";
                        let ending = if is_folder { "" } else { ".safetensors" };
                        let written = out(&format!("{format}-{dtype}{ending}"));
                        given(&["--format", format, "--dtype", dtype], &written);
                        let key = if is_folder { "peft" } else { "lora" };
                        checks.push(json!({
                            "base": base, key: written, "expected": expected, "tolerance": tolerance
                        }));
                    }
                }
                // A folder with both files loads as the one of diffusers.
                let both = out("both");
                std::fs::create_dir(&both).unwrap();
                for (format, file) in [
                    ("diffusers", "pytorch_lora_weights.safetensors"),
                    ("kohya", "lora_kohya.safetensors"),
                ] {
                    given(&["--format", format, "--dtype", "f32"], &both.join(file));
                }
                checks.push(json!({
                    "base": base, "lora": both, "expected": expected, "tolerance": 1e-4
                }));
                let smaller = out("smaller.safetensors");
                let said = given(&["--rank", "2", "--dtype", "f32"], &smaller);
                let share = said.split("rank 4 to 2: ").nth(1).unwrap();
                let share: f64 = share.split(' ').next().unwrap().parse().unwrap();
                checks.push(json!({
                    "base": base, "lora": smaller, "of": file, "rank": 2, "share": share
                }));
            }
            assert_eq!(compared, if kind == "sd" { 7 } else { 8 });
        }
        let list = folder.path().join("checks.json");
        std::fs::write(&list, Value::Array(checks).to_string()).unwrap();
        python("lora_files.py", &["check", text(&list)]);
    }
}
