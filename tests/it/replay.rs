//! Odd configurations, trained by the binary and replayed in PyTorch + diffusers: the same numbers for each.
//!
//! Needs `COFFEY_PYTHON`. The `#[ignore]`d ones make 20 steps over every shape of `make_pipeline.py`: minutes, with
//! `cargo nextest run --release --run-ignored only -E 'binary(replay)'`.

use std::path::Path;

use crate::support::{python, succeed, text};
use tempfile::TempDir;

/// Trains a random pipeline of `shape` for `steps` audited steps on 8 x 8 latents and has PyTorch make them again.
///
/// The learning rates are such that rounding alone stays below the tolerances, in PyTorch too: neither so large that it grows
/// (`tests/reference/README.md`), nor so small that the average moves by single bits.
fn replay(shape: &str, steps: u64, settings: &[&str]) {
    replay_within(shape, steps, settings, &[]);
}

/// The same with other tolerances, arguments of `replay_audit.py`.
fn replay_within(shape: &str, steps: u64, settings: &[&str], tolerances: &[&str]) {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (teacher, run, audit) = (at("teacher"), at("run"), at("audit"));
    if !python("make_pipeline.py", &[&teacher, Path::new(shape)]) {
        return;
    }
    let fixed = [
        format!("model.teacher={}", text(&teacher)),
        format!("train.output={}", text(&run)),
        format!("audit.dir={}", text(&audit)),
        format!("audit.steps={steps}"),
        format!("train.max_steps={steps}"),
    ];
    let small = [
        "model.time_cond_proj_dim=32",
        "image.resolution=32",
        "train.batch_size=2",
        "optimizer.learning_rate=1e-6",
        "checkpoint.every=1000",
        "report.endpoint_captions=0",
        "report.grid=false",
        "validation.every=1000",
    ];
    let mut args = vec!["train", "-c", "configs/quickstart.toml"];
    let all = fixed.iter().map(String::as_str).chain(small);
    for setting in all.chain(settings.iter().copied()) {
        args.extend(["-s", setting]);
    }
    succeed(&args);
    let tolerances = tolerances.iter().map(Path::new);
    let args: Vec<&Path> = std::iter::once(&*audit).chain(tolerances).collect();
    python("replay_audit.py", &args);
}

/// Tests by name: the pipeline's shape, audited steps, settings.
macro_rules! replays {
    ($($(#[$attribute:meta])* $name:ident: $shape:literal, $steps:literal, $settings:expr;)*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            replay($shape, $steps, &$settings);
        }
    )*};
}

replays! {
    levels_layers_heads_and_projections_at_once: "everything", 4, [
        "distill.loss=l2", "optimizer.learning_rate=1e-5",
    ];
    plain_blocks_at_the_bottom_of_four_levels: "four-levels", 3, ["distill.huber_c=0.1"];
    one_layer_one_sample_accumulation_and_a_teacher_in_16_bits: "one-layer", 3, [
        "train.batch_size=1", "train.gradient_accumulation=3", "train.teacher_dtype=bf16",
    ];
    a_teacher_of_samples_with_decay_and_cosine: "sample", 4, [
        "optimizer.weight_decay=0.01", "optimizer.schedule=cosine", "optimizer.warmup_steps=2",
        "optimizer.learning_rate=1e-5",
    ];
    a_teacher_of_velocities_with_warmup: "v-prediction", 4, [
        "optimizer.schedule=constant_with_warmup", "optimizer.warmup_steps=2",
        "optimizer.learning_rate=1e-5",
    ];
    moments_in_8_bits: "small", 4, ["optimizer.kind=adamw8bit", "optimizer.learning_rate=1e-5"];
    a_teacher_with_guidance_and_a_wide_huber: "guided", 4, [
        "distill.huber_c=0.5", "optimizer.learning_rate=1e-4",
    ];
}

// PyTorch's autocast rounds in other places than we do (its norms give f32), and Adam's first steps turn a gradient's rounding
// into a difference of weights: what is compared is that the same things are in half precision.
#[test]
fn a_step_in_fp16() {
    let settings = ["train.mixed_precision=fp16", "distill.huber_c=0.1"];
    let tolerances = ["--tolerance=0.01", "--weights-tolerance=0.35"];
    replay_within("one-layer", 2, &settings, &tolerances);
}

#[test]
fn a_step_in_bf16() {
    let settings = ["train.mixed_precision=bf16", "distill.huber_c=0.1"];
    let tolerances = ["--tolerance=0.05", "--weights-tolerance=0.8"];
    replay_within("one-layer", 2, &settings, &tolerances);
}

/// 20 steps each.
mod long {
    use super::replay;

    replays! {
        #[ignore = "slow"] small: "small", 20, ["image.resolution=64"];
        #[ignore = "slow"] two_levels: "two-levels", 20, ["train.batch_size=3"];
        #[ignore = "slow"] one_level: "one-level", 20, [];
        #[ignore = "slow"] three_levels: "three-levels", 20, ["image.resolution=48"];
        #[ignore = "slow"] four_levels: "four-levels", 20, ["image.resolution=64"];
        #[ignore = "slow"] one_layer: "one-layer", 20, ["train.gradient_accumulation=2"];
        #[ignore = "slow"] three_layers: "three-layers", 20, ["train.batch_size=1"];
        #[ignore = "slow"] plain_top: "plain-top", 20, [];
        #[ignore = "slow"] plain_middle: "plain-middle", 20, [];
        #[ignore = "slow"] plain_bottom: "plain-bottom", 20, [];
        #[ignore = "slow"] heads_list: "heads-list", 20, [];
        #[ignore = "slow"] linear_projection: "linear-projection", 20, ["train.attention=plain"];
        #[ignore = "slow"] two_transformers: "two-transformers", 20, [];
        #[ignore = "slow"] transformers_list: "transformers-list", 20, ["optimizer.weight_decay=0.1"];
        #[ignore = "slow"] v_prediction: "v-prediction", 20, ["distill.loss=l2", "optimizer.learning_rate=1e-4"];
        #[ignore = "slow"] sample: "sample", 20, [
            "optimizer.schedule=linear", "optimizer.warmup_steps=5", "optimizer.learning_rate=5e-6",
        ];
        #[ignore = "slow"] linear_betas: "linear-betas", 20, ["distill.num_ddim_timesteps=20", "optimizer.epsilon=1e-6"];
        #[ignore = "slow"] cosine_betas: "cosine-betas", 20, ["distill.num_ddim_timesteps=10"];
        #[ignore = "slow"] eps: "eps", 20, ["distill.timestep_scaling=1.0"];
        #[ignore = "slow"] guided: "guided", 20, ["optimizer.schedule=polynomial", "optimizer.warmup_steps=1"];
        #[ignore = "slow"] everything: "everything", 20, ["distill.ema_decay=0.5", "optimizer.max_grad_norm=0.1"];
    }
}
