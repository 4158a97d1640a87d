//! `coffey sample` on the quickstart's teacher and on a student made of it.

mod faults;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::support::{
    NO_PICTURES, QUICKSTART, args, changed_teacher, command, messages, python, refuse, refused,
    repository, says, succeed, teacher, text, without_tensor,
};
use candle_core::{DType, Device, Tensor};
use coffey::models::unet::{WEIGHTS_STEM, student_tensors};
use coffey::models::{TEXT_ENCODER_STEM, UNetConfig, Weights, save_model};
use npyz::WriterBuilder;
use serde_json::json;
use tempfile::TempDir;

const TEACHER: &str = "assets/quickstart/teacher";

/// The arguments of `sample`.
fn sample(model: &Path, out: &Path, more: &[&str]) -> Vec<String> {
    let args = ["sample", "--model", text(model), "--out", text(out)];
    args.iter()
        .chain(more)
        .map(|arg| (*arg).to_owned())
        .collect()
}

fn write_npy(path: &Path, shape: &[u64], values: &[f32]) {
    let file = std::fs::File::create(path).unwrap();
    let options = npyz::WriteOptions::new().default_dtype().shape(shape);
    let mut writer = options.writer(file).begin_nd().unwrap();
    writer.extend(values.iter().copied()).unwrap();
    writer.finish().unwrap();
}

/// Noise for one image of the quickstart's teacher, in a file.
fn write_noise(folder: &TempDir) -> PathBuf {
    let noise: Vec<f32> = (0..4 * 16 * 16)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 29.0)
        .collect();
    let file = folder.path().join("noise.npy");
    write_npy(&file, &[1, 4, 16, 16], &noise);
    file
}

#[test]
fn teacher_draws_same_image_for_same_seed() {
    let folder = TempDir::new().unwrap();
    let draw = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let prompt = ["--prompt", "red apple", "--guidance", "4"];
        let printed = succeed(&sample(&teacher(), &out, &[&prompt, more].concat()));
        assert_eq!(printed.trim_end(), text(&out));
        image::open(&out).unwrap().into_rgb8()
    };
    let image = draw("a.png", &["--steps", "2"]);
    assert_eq!(image.dimensions(), (64, 64));
    assert_eq!(draw("new/b.png", &["--steps", "2"]), image);
    assert_ne!(draw("c.png", &["--steps", "2", "--seed", "1"]), image);
    assert_ne!(
        draw("d.png", &["--steps", "2", "--scheduler", "lcm"]),
        image
    );
    assert_eq!(
        draw(
            "e.png",
            &["--steps", "1", "--height", "36", "--width", "44"] // odd latents
        )
        .dimensions(),
        (44, 36)
    );
}

#[test]
fn sample_grid_equals_single_images() {
    let folder = TempDir::new().unwrap();
    let file = write_noise(&folder);
    let draw = |prompts: &[&str]| {
        let out = folder.path().join("image.png");
        let settings = ["--steps", "1", "--init-latents", text(&file), "--prompt"];
        succeed(&sample(&teacher(), &out, &[&settings, prompts].concat()));
        image::open(&out).unwrap().into_rgb8()
    };
    let grid = draw(&["cat face", "red apple", "cat face"]);
    assert_eq!(grid.dimensions(), (128, 128));
    let part = |x, y| image::imageops::crop_imm(&grid, x, y, 64, 64).to_image();
    assert_eq!(part(0, 0), part(0, 64));
    assert_ne!(part(0, 0), part(64, 0));
    let alone = draw(&["red apple"]);
    let largest = alone
        .iter()
        .zip(part(64, 0).iter())
        .map(|(a, b)| a.abs_diff(*b))
        .max();
    assert!(largest <= Some(1), "{largest:?}");
}

#[test]
fn each_image_of_several_is_that_of_its_seed() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("image.png");
    for settings in [
        &["--steps", "2", "--scheduler", "lcm"][..],
        &["--steps", "2", "--width", "52"],
    ] {
        let draw = |seed: &str, prompts: &[&str]| {
            let more = [settings, &["--seed", seed, "--prompt"], prompts].concat();
            let said = messages(command(&sample(&teacher(), &out, &more)));
            (image::open(&out).unwrap().into_rgb8(), said)
        };
        let prompts = ["cat face", "red apple", "cat face"];
        let (grid, said) = draw("7", &prompts);
        says(
            &said,
            &[
                "3 images in a grid, row by row, 2 in a row,",
                "image 1/3 · step 1/2",
                "image 3/3 · step 2/2",
            ],
        );
        for (index, prompt) in (0u32..).zip(prompts) {
            let (alone, _) = draw(&(7 + index).to_string(), &[prompt]);
            let (width, height) = alone.dimensions();
            let (x, y) = (index % 2 * width, index / 2 * height);
            let part = image::imageops::crop_imm(&grid, x, y, width, height).to_image();
            assert!(part == alone, "{prompt} {index}");
        }
    }
}

#[test]
fn prompts_of_a_file_draw_as_those_of_the_command_line() {
    let folder = TempDir::new().unwrap();
    let [out, file] = ["image.png", "prompts.txt"].map(|name| folder.path().join(name));
    std::fs::write(&file, "cat face\r\n\n red apple").unwrap();
    let draw = |prompts: &[&str]| {
        succeed(&sample(
            &teacher(),
            &out,
            &[&["--steps", "1"], prompts].concat(),
        ));
        image::open(&out).unwrap().into_rgb8()
    };
    let listed = draw(&["--prompts-file", text(&file)]);
    assert_eq!(listed, draw(&["--prompt", "cat face", "red apple"]));
    std::fs::remove_file(&out).unwrap();
    std::fs::write(&file, b"cat face\n\xe4pfel\n").unwrap();
    let from_file = |more: &[&str]| {
        let file = ["--prompts-file", text(&file)];
        sample(&teacher(), &out, &[&file, more].concat())
    };
    refuse(2, &from_file(&[]), &["prompts.txt: line 2 is not UTF-8"]);
    refuse(2, &from_file(&["--prompt", "x"]), &["cannot be used with"]);
    std::fs::write(&file, "\n").unwrap();
    refuse(2, &from_file(&[]), &["prompts.txt: has no prompt; "]);
    assert!(!out.exists());
}

/// A run's folder with an untrained student.
fn student_run(folder: &TempDir) -> PathBuf {
    let run = folder.path().join("run");
    let unet = teacher().join("unet");
    let config = UNetConfig::read(&unet).unwrap().with_guidance_embedding(8);
    let tensors = Weights::load(&unet, WEIGHTS_STEM, DType::F32, &Device::Cpu)
        .unwrap()
        .into_tensors();
    let tensors: BTreeMap<String, Tensor> = student_tensors(tensors, &config, |count, bound| {
        (0..count).map(|i| bound * (i % 3) as f32).collect()
    })
    .unwrap();
    save_model(
        &run.join("checkpoint-5/unet_target"),
        WEIGHTS_STEM,
        config.to_json(),
        &tensors,
    )
    .unwrap();
    save_model(&run.join("unet"), WEIGHTS_STEM, config.to_json(), &tensors).unwrap();
    let description = json!({"teacher": TEACHER, "vae": null});
    std::fs::write(run.join("run.json"), description.to_string()).unwrap();
    run
}

#[test]
fn student_is_sampled_as_its_objective_says() {
    let folder = TempDir::new().unwrap();
    let run = student_run(&folder);
    let out = folder.path().join("image.png");
    let draw = |description: &serde_json::Value, more: &[&str]| {
        std::fs::write(run.join("run.json"), description.to_string()).unwrap();
        let prompt = ["--prompt", "sunflower"];
        let printed = messages(command(&sample(&run, &out, &[&prompt, more].concat())));
        (image::open(&out).unwrap().into_rgb8(), printed)
    };
    let lcm = json!({"teacher": TEACHER, "vae": null, "objective": "lcm"});
    let tcd = json!({"teacher": TEACHER, "vae": null, "objective": "tcd", "tcd_gamma": 0.5});
    let pcm = json!({"teacher": TEACHER, "vae": null, "objective": "pcm"});
    let (image, printed) = draw(&tcd, &[]);
    says(&printed, &["4 TCD steps"]);
    assert_eq!(draw(&lcm, &["--scheduler", "tcd", "--eta", "0.5"]).0, image);
    assert_ne!(draw(&tcd, &["--eta", "0.2"]).0, image);
    let (image, printed) = draw(&pcm, &[]);
    says(&printed, &["4 DDIM steps"]);
    let ddim = ["--scheduler", "ddim", "--steps", "4"];
    assert_eq!(draw(&lcm, &ddim).0, image);
    let eta = sample(&run, &out, &["--prompt", "x", "--eta", "0.5"]);
    refuse(2, &eta, &["--eta", "--scheduler tcd"]);
}

#[test]
fn run_and_checkpoint_draw_same_image() {
    let folder = TempDir::new().unwrap();
    let run = student_run(&folder);
    let out = folder.path().join("image.png");
    let draw = |model: &Path, more: &[&str]| {
        let prompt = ["--prompt", "sunflower"];
        let args = sample(model, &out, &[&prompt, more].concat());
        let printed = messages(command(&args));
        (image::open(&out).unwrap().into_rgb8(), printed)
    };
    let (image, printed) = draw(&run, &[]);
    says(&printed, &["4 LCM steps, guidance 8, embedded"]);
    for part in ["checkpoint-5", "unet", "checkpoint-5/unet_target"] {
        assert_eq!(draw(&run.join(part), &[]).0, image, "{part}");
    }
    assert_eq!(
        draw(&run, &["--teacher", TEACHER, "--unet", "unet"]).0,
        image
    );
    assert_ne!(draw(&run, &["--guidance", "2"]).0, image);
    assert_ne!(
        draw(&run, &["--scheduler", "ddim", "--steps", "4"]).0,
        image
    );
    std::fs::remove_file(run.join("run.json")).unwrap();
    refuse(
        1,
        &sample(&run, &out, &["--prompt", "x"]),
        &["text_encoder", "--teacher"],
    );
    refuse(
        2,
        &sample(&run, &out, &["--prompt", "x", "--unet", "lora"]),
        &["--unet lora: no folder lora"],
    );
    let own = run.join("checkpoint-5/unet_target");
    refuse(
        2,
        &sample(&own, &out, &["--prompt", "x", "--unet", "unet"]),
        &["--unet unet: has no effect", "is the folder of one UNet"],
    );
}

#[test]
fn run_without_a_student_names_its_checkpoint() {
    let folder = TempDir::new().unwrap();
    let (run, out) = (student_run(&folder), folder.path().join("image.png"));
    let wrong = |model: &Path, words: &[&str]| {
        refuse(2, &sample(model, &out, &["--prompt", "x"]), words);
    };
    std::fs::remove_dir_all(run.join("unet")).unwrap();
    let named = format!("as {}/checkpoint-5", text(&run));
    wrong(&run, &["name one of its checkpoints", &named]);
    std::fs::remove_dir_all(run.join("checkpoint-5")).unwrap();
    wrong(&run, &["has no checkpoint yet (no unet_target/ or unet/)"]);
    // A folder above runs holds no model.
    wrong(folder.path(), &["no folder unet_target or unet"]);
}

#[test]
fn guidance_is_classifier_free_without_embedding() {
    let folder = TempDir::new().unwrap();
    let noise = write_noise(&folder);
    let out = folder.path().join("image.png");
    for scheduler in ["lcm", "ddim"] {
        let draw = |more: &[&str], words: &str| {
            let settings = [
                &["--steps", "1", "--scheduler", scheduler],
                &["--init-latents", text(&noise), "--prompt", "red apple"],
                more,
            ];
            let settings: Vec<&str> = settings.into_iter().flatten().copied().collect();
            let printed = messages(command(&sample(&teacher(), &out, &settings)));
            says(&printed, &[words]);
            image::open(&out).unwrap().into_rgb8()
        };
        let plain = draw(&["--guidance", "1"], "steps, no guidance");
        let guided = draw(&[], "classifier-free guidance 8");
        assert_ne!(plain, guided, "{scheduler}");
        assert_eq!(draw(&["--guidance", "0.5"], "no guidance"), plain);
        assert_eq!(draw(&["--negative-prompt", ""], "guidance 8"), guided);
        let away = draw(&["--negative-prompt", "cat face"], "guidance 8");
        assert_ne!(away, guided, "{scheduler}");
    }
    let student = student_run(&folder);
    for (model, guidance, words) in [
        (student.as_path(), "8", "takes guidance as an embedding"),
        (&teacher(), "1", "--guidance 1 turns"),
    ] {
        let more = [
            "--prompt",
            "x",
            "--negative-prompt",
            "y",
            "--guidance",
            guidance,
        ];
        let words = ["--negative-prompt: has no effect", words];
        refuse(2, &sample(model, &out, &more), &words);
    }
}

mod needs_python {
    use super::*;

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with PyTorch and diffusers"]
    fn drawings_equal_diffusers() {
        let folder = TempDir::new().unwrap();
        let (noise, run, teacher) = (write_noise(&folder), student_run(&folder), teacher());
        let out = folder.path().join("image.png");
        let (plain, student) = (teacher.join("unet"), run.join("unet"));
        // Between the steps of the lcm scheduler both draw noise, each its own.
        for (model, unet, scheduler, steps, guidance, negative) in [
            (&teacher, &plain, "lcm", "1", "8", None),
            (&teacher, &plain, "lcm", "1", "1", None),
            (&teacher, &plain, "lcm", "1", "3", Some("cat face")),
            (&teacher, &plain, "ddim", "4", "5", None),
            (&teacher, &plain, "ddim", "4", "0", None),
            (&run, &student, "lcm", "1", "8", None),
            (&run, &student, "ddim", "4", "2.5", None),
            (&run, &student, "tcd", "4", "8", None),
        ] {
            let mut more = vec!["--scheduler", scheduler, "--steps", steps];
            more.extend(["--eta", "0"].iter().filter(|_| scheduler == "tcd"));
            more.extend(["--guidance", guidance, "--init-latents", text(&noise)]);
            more.extend(["--prompt", "red apple", "--unet", "unet"]);
            more.extend(negative.iter().flat_map(|n| ["--negative-prompt", n]));
            succeed(&sample(model, &out, &more));
            let mut compared = [&teacher, unet, &noise, &out]
                .map(|path| text(path))
                .to_vec();
            compared.extend([scheduler, steps, guidance, "red apple"]);
            compared.extend(negative);
            python("compare_drawing.py", &compared);
        }
    }
}

#[test]
fn sample_refuses_bad_options() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("image.png");
    let wrong = |more: &[&str], words: &[&str]| {
        refuse(
            2,
            &sample(&teacher(), &out, &[&["--prompt", "x"], more].concat()),
            words,
        );
    };
    wrong(&["--steps", "0"], &["--steps", "at least 1"]);
    wrong(
        &["--steps", "51", "--scheduler", "lcm"],
        &["--steps 51", "50"],
    );
    wrong(&["--height", "30"], &["--height 30", "multiple of 4"]);
    wrong(&["--guidance", "inf"], &["--guidance", "finite number"]);
    wrong(&["--scheduler", "euler"], &["euler", "lcm", "ddim"]);
    wrong(&["--teacher", "nowhere"], &["--teacher nowhere"]);
    let file = folder.path().join("noise.npy");
    write_npy(&file, &[1, 4, 8, 16], &[0.0; 512]);
    wrong(
        &["--init-latents", text(&file), "--height", "64"],
        &["[1, 4, 8, 16]", "needs [1, 4, 16, width]"],
    );
    write_npy(&file, &[3, 4, 16, 16], &[0.0; 3072]);
    wrong(&["--init-latents", text(&file)], &["[3, 4, 16, 16]"]);
    wrong(&["--init-latents", "nowhere.npy"], &["nowhere.npy"]);
    refuse(
        2,
        &[
            "sample",
            "--model",
            "nowhere",
            "--prompt",
            "x",
            "--out",
            text(&out),
        ],
        &["--model nowhere"],
    );
    refuse(
        2,
        &[
            "sample", "--model", TEACHER, "--prompt", "x", "--out", "x.jpg",
        ],
        &["--out x.jpg", ".png"],
    );
    refuse(
        2,
        &["sample", "--model", TEACHER, "--out", text(&out)],
        &["--prompt <", "--prompts-file <"],
    );
    assert!(!out.exists());
}

#[test]
fn sample_names_broken_model_file() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("image.png");
    let pipeline = without_tensor(&folder, "vae", WEIGHTS_STEM, "decoder.conv_out.weight");
    refuse(
        1,
        &sample(&pipeline, &out, &["--prompt", "x"]),
        &["decoder.conv_out.weight", "is missing"],
    );
    std::fs::write(
        pipeline
            .join("unet")
            .join(format!("{WEIGHTS_STEM}.safetensors")),
        "cut",
    )
    .unwrap();
    refuse(
        1,
        &sample(&pipeline, &out, &["--prompt", "x"]),
        &["not a readable safetensors file"],
    );
    std::fs::remove_dir_all(pipeline.join("unet")).unwrap();
    refuse(
        2,
        &sample(&pipeline, &out, &["--prompt", "x"]),
        &["no folder unet_target or unet"],
    );
}

#[test]
fn sample_finds_the_models_of_a_run_from_any_folder() {
    let folder = TempDir::new().unwrap();
    let (run, out) = (folder.path().join("run"), folder.path().join("image.png"));
    // The configuration names the teacher relative to the repository.
    let output = format!("train.output={}", text(&run));
    let settings = [output.as_str(), "train.batch_size=1", "train.max_steps=1"];
    let settings = [&settings[..], &NO_PICTURES].concat();
    messages(command(&args("train", QUICKSTART, settings)));
    let draw = |model: &str| {
        let more = ["--prompt", "red apple", "--steps", "1"];
        let mut command = command(&sample(Path::new(model), &out, &more));
        command.current_dir(folder.path());
        command
    };
    messages(draw("run"));
    let image = std::fs::read(&out).unwrap();
    for model in ["./run/", "run/checkpoint-1", "run/unet_target"] {
        messages(draw(model));
        assert!(std::fs::read(&out).unwrap() == image, "{model}");
    }
    std::fs::remove_file(&out).unwrap();

    let description = |teacher: &str, vae: Option<&str>, started_in: &Path| {
        let json = json!({"teacher": teacher, "vae": vae, "started_in": started_in});
        std::fs::write(run.join("run.json"), json.to_string()).unwrap();
    };
    let root = repository("");
    description("assets/none/teacher", None, &root);
    let looked_for = format!("no folder {}", root.join("assets/none/teacher").display());
    refused(
        draw("run"),
        1,
        &[
            "run.json: assets/none/teacher: ",
            &looked_for,
            "give --teacher",
        ],
    );
    description(TEACHER, Some("assets/none/teacher/vae"), &root);
    refused(draw("run"), 1, &["/vae: ", "give --vae"]);
    assert!(!out.exists());
    let mut elsewhere = draw("run");
    elsewhere.args(["--vae", text(&teacher().join("vae"))]);
    messages(elsewhere);
    assert!(std::fs::read(&out).unwrap() == image);
    // A run of a version that did not write it, and a folder that was moved as a whole.
    description("../teacher", None, Path::new("/no/such/folder"));
    crate::support::copy(&teacher(), &folder.path().join("teacher"));
    let mut moved = draw("../run");
    moved.current_dir(&run);
    messages(moved);
    assert!(std::fs::read(&out).unwrap() == image);
}
