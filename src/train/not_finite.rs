//! What a run says when its numbers are not finite: what would help, and where the same command goes on.

use super::TrainError;
use super::checkpoint::Saver;
use crate::config::{Config, DataKind, FloatType, MixedPrecision};

/// A pass whose numbers are not finite, in words.
const VAE: &str = "the VAE's";
const TEXT_ENCODER: &str = "the text encoder's";
const TEACHER: &str = "the teacher's";
const STUDENT: &str = "the student's";

/// Completes the message of [`TrainError::NotFinite`]; other errors stay as they are.
pub(super) fn with_advice(error: TrainError, config: &Config, saver: &Saver) -> TrainError {
    let TrainError::NotFinite {
        step, what, origin, ..
    } = error
    else {
        return error;
    };
    let mut advice = describe(origin, config);
    // A save that fails leaves no checkpoint, and the listing below shows that.
    drop(saver.wait());
    if let Ok(steps) = saver.checkpoints().steps() {
        advice += &match steps.into_iter().rfind(|&saved| saved < step) {
            Some(saved) => {
                format!(
                    "; the newest checkpoint is checkpoint-{saved}, and the same command goes on from it"
                )
            }
            None => "; no checkpoint has been saved".to_owned(),
        };
    }
    TrainError::NotFinite {
        step,
        what,
        origin,
        advice,
    }
}

/// Which pass is the first with such numbers, and the remedy.
fn describe(origin: Option<&'static str>, config: &Config) -> String {
    let pass = match origin {
        Some("latents") => Some(VAE),
        Some(
            "prompt_embeds"
            | "uncond_prompt_embeds"
            | "pooled_prompt_embeds"
            | "uncond_pooled_prompt_embeds",
        ) => Some(TEXT_ENCODER),
        Some("x_prev") => Some(TEACHER),
        Some("model_pred" | "target") => Some(STUDENT),
        _ => None,
    };
    let first = match (pass, origin) {
        (Some(pass), Some(origin)) => format!("; the first such numbers are {pass} ({origin})"),
        _ => String::new(),
    };
    let (train, encode) = (&config.train, &config.encode);
    let mut keys = Vec::new();
    let mut narrow = |is: bool, remedy| keys.extend(is.then_some(remedy));
    match pass {
        Some(VAE) => narrow(
            encode.vae_dtype == FloatType::F16 && config.data.kind == DataKind::Images,
            r#"encode.vae_dtype to "f32" or "bf16", or model.vae to a VAE made for f16 (of SDXL madebyollin/sdxl-vae-fp16-fix)"#,
        ),
        Some(TEXT_ENCODER) => narrow(
            encode.dtype == FloatType::F16,
            r#"encode.dtype to "f32" or "bf16""#,
        ),
        _ => {
            narrow(
                train.mixed_precision == MixedPrecision::Fp16,
                r#"train.mixed_precision to "bf16" or "no""#,
            );
            narrow(
                pass == Some(TEACHER) && train.teacher_dtype == FloatType::F16,
                r#"train.teacher_dtype to "f32" or "bf16""#,
            );
        }
    }
    let remedy = match (keys.as_slice(), pass) {
        ([_, ..], _) => format!(
            "f16 holds no number above 65504: set {}",
            keys.join(" and ")
        ),
        ([], Some(VAE | TEXT_ENCODER | TEACHER)) => {
            "its weights may be damaged: `coffey check` names the tensor".to_owned()
        }
        ([], _) => "a lower optimizer.learning_rate or optimizer.max_grad_norm may help".to_owned(),
    };
    format!("{first}; {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedy_is_for_the_pass_that_overflows() {
        let config = |change: fn(&mut Config)| {
            let mut config = Config::parse("[data]\nshards = \"a.tar\"\n", "a.toml", &[]).unwrap();
            change(&mut config);
            config
        };
        let exact = config(|_| ());
        let fp16 = config(|c| c.train.mixed_precision = MixedPrecision::Fp16);
        let f16 = config(|c| {
            c.train.teacher_dtype = FloatType::F16;
            c.encode.vae_dtype = FloatType::F16;
            c.encode.dtype = FloatType::F16;
        });
        let (precision, rate) = ("train.mixed_precision to", "optimizer.learning_rate");
        for (config, origin, words) in [
            (&exact, None, rate),
            (&exact, Some("model_pred"), rate),
            (&exact, Some("x_prev"), "coffey check"),
            (&fp16, None, precision),
            (&fp16, Some("target"), precision),
            (&fp16, Some("x_prev"), precision),
            (&fp16, Some("latents"), "coffey check"),
            (&f16, Some("x_prev"), "set train.teacher_dtype"),
            (&f16, Some("latents"), "set encode.vae_dtype"),
            (&f16, Some("prompt_embeds"), "set encode.dtype"),
            (&f16, Some("pooled_prompt_embeds"), "set encode.dtype"),
            (&f16, Some("loss"), rate),
        ] {
            let advice = describe(origin, config);
            assert!(advice.contains(words), "{origin:?}: {words:?}? {advice}");
            assert!(words == rate || !advice.contains(rate), "{advice}");
        }
    }
}
