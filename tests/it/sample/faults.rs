//! Damaged models and places that can't be written.

use super::*;

/// Fills a tensor with one number.
fn fill(tensors: &mut BTreeMap<String, Tensor>, name: &str, value: f32) {
    let tensor = tensors.get_mut(name).unwrap();
    *tensor = Tensor::full(value, tensor.shape(), &Device::Cpu).unwrap();
}

#[test]
fn damaged_weights_are_named_and_draw_nothing() {
    let unet = "down_blocks.0.resnets.0.conv1.weight";
    let text_encoder = "final_layer_norm.weight";
    for (part, stem, name, value, words) in [
        (
            "unet",
            WEIGHTS_STEM,
            unet,
            f32::NAN,
            "the UNet's output in step 1 has numbers",
        ),
        (
            "unet",
            WEIGHTS_STEM,
            "conv_out.bias",
            f32::INFINITY,
            "the UNet's output in step 1",
        ),
        (
            "vae",
            WEIGHTS_STEM,
            "decoder.conv_in.weight",
            f32::NAN,
            "the VAE's output has numbers",
        ),
        (
            "text_encoder",
            TEXT_ENCODER_STEM,
            text_encoder,
            f32::NAN,
            "the text encoder's output",
        ),
    ] {
        let folder = TempDir::new().unwrap();
        let model = changed_teacher(&folder, part, stem, |tensors| fill(tensors, name, value));
        let out = folder.path().join("new/image.png");
        let file = format!("{part}/{stem}.safetensors");
        let words = [words, &format!("tensor \"{name}\" of "), &file];
        refuse(
            1,
            &sample(&model, &out, &["--prompt", "x", "--steps", "2"]),
            &words,
        );
        assert!(!folder.path().join("new").exists());
    }
    let folder = TempDir::new().unwrap();
    let model = changed_teacher(&folder, "vae", WEIGHTS_STEM, |tensors| {
        fill(tensors, "decoder.conv_out.weight", 0.0);
        fill(tensors, "decoder.conv_out.bias", -2.0);
    });
    let out = folder.path().join("image.png");
    refuse(
        1,
        &sample(&model, &out, &["--prompt", "x", "--steps", "1"]),
        &["\"x\" is nothing but the colour #000000", "changed/vae"],
    );
    assert!(!out.exists());
    // Finite weights, and noise that is too much for f32.
    let noise = folder.path().join("noise.npy");
    write_npy(&noise, &[1, 4, 16, 16], &[3e38; 1024]);
    refuse(
        1,
        &sample(
            &teacher(),
            &out,
            &[
                "--prompt",
                "x",
                "--steps",
                "1",
                "--init-latents",
                text(&noise),
            ],
        ),
        &["are finite", "--init-latents"],
    );
}

#[test]
fn place_of_the_picture_is_checked_before_models_are_read() {
    let folder = TempDir::new().unwrap();
    let broken = without_tensor(&folder, "vae", WEIGHTS_STEM, "decoder.conv_out.weight");
    let file = folder.path().join("file.png");
    std::fs::write(&file, "").unwrap();
    std::fs::create_dir(folder.path().join("folder.png")).unwrap();
    for (out, words) in [
        ("folder.png", "it is a folder"),
        ("file.png/a.png", "file.png is not a folder"),
        ("new.png/", "it ends in /"),
        ("-", "must be a .png file"),
        ("s3://bucket/x.png", "--out takes a local file"),
    ] {
        let out = match out {
            "-" | "s3://bucket/x.png" => PathBuf::from(out),
            name => folder.path().join(name),
        };
        refuse(
            2,
            &sample(&broken, &out, &["--prompt", "x"]),
            &["--out", words],
        );
    }
    refuse(
        2,
        &sample(&broken, Path::new("/proc/a.png"), &["--prompt", "x"]),
        &["--out", "/proc"],
    );
}
