//! How to draw with the student in diffusers.

use std::fs;

use serde::Deserialize;

use super::{Card, lora_files};
use crate::config::{Config, Distill, Lora, Model, ObjectiveKind};
use crate::hub::public::{PublicModel, public_model};
use crate::hub::{HubError, io};
use crate::lora;

/// Sampling steps of the card's example.
const SAMPLING_STEPS: usize = 4;

/// The scheduler that samples a student in diffusers.
struct DiffusersScheduler {
    class: &'static str,
    /// Arguments of `from_config` besides the teacher's configuration.
    options: String,
    /// Further arguments of the pipeline's call.
    call: String,
}

impl DiffusersScheduler {
    fn of(distill: &Distill) -> Self {
        let points = distill.num_ddim_timesteps;
        match distill.objective {
            ObjectiveKind::Lcm => Self {
                class: "LCMScheduler",
                options: format!(
                    "original_inference_steps={points}, timestep_scaling={:?}",
                    distill.timestep_scaling
                ),
                call: String::new(),
            },
            ObjectiveKind::Tcd => Self {
                class: "TCDScheduler",
                options: format!("original_inference_steps={points}"),
                call: format!(", eta={:?}", distill.tcd_gamma()),
            },
            ObjectiveKind::Pcm => Self {
                class: "DDIMScheduler",
                options: "timestep_spacing=\"trailing\"".to_owned(),
                call: String::new(),
            },
        }
    }
}

/// Keys of `run.json` that the card uses.
#[derive(Deserialize)]
struct RunInfo {
    revision: Option<String>,
}

/// The part of the example that puts the student into the pipeline.
struct StudentCode {
    /// Classes of diffusers besides the scheduler and the pipeline.
    imports: &'static str,
    /// Lines before the pipeline.
    before: String,
    /// An argument of the pipeline.
    argument: &'static str,
    /// Lines after the pipeline.
    after: String,
    guidance: f64,
    /// Sentences on steps and guidance.
    advice: String,
}

impl Card<'_> {
    pub(super) fn usage(&self, teacher: &PublicModel) -> Result<String, HubError> {
        let Config { distill, model, .. } = self.config;
        let StudentCode {
            imports,
            before,
            argument,
            after,
            guidance,
            advice,
        } = match &self.config.lora {
            Some(lora) => self.lora_code(lora),
            None => self.unet_code(),
        };
        let mut arguments = match teacher {
            PublicModel::Hub(id) => format!("{id:?}"),
            PublicModel::Private(_) => "teacher".to_owned(),
        };
        let mut code = String::new();
        if let PublicModel::Private(name) = teacher {
            code += &format!("teacher = {name:?}  # its folder, in diffusers layout\n");
        } else if let Some(revision) = self.revision()? {
            arguments += &format!(", revision={revision:?}");
        }
        code += &before;
        arguments += argument;
        let scheduler = DiffusersScheduler::of(distill);
        let mut imports = format!("DiffusionPipeline, {}{imports}", scheduler.class);
        if let Some(PublicModel::Hub(id)) = model.vae.as_ref().map(public_model) {
            imports.insert_str(0, "AutoencoderKL, ");
            code += &format!("vae = AutoencoderKL.from_pretrained({id:?}, torch_dtype=dtype)\n");
            arguments += ", vae=vae";
        }
        let validation = self.config.validation.as_ref();
        let prompt = validation.and_then(|v| v.prompts.first());
        let prompt = prompt.map_or("a lighthouse at dusk", String::as_str);
        Ok(format!(
            r#"## Use

```python
import torch
from diffusers import {imports}

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
{code}pipeline = DiffusionPipeline.from_pretrained({arguments}, torch_dtype=dtype).to(device)
{after}pipeline.scheduler = {}.from_config(
    pipeline.scheduler.config, {}
)
image = pipeline(
    {}, num_inference_steps={SAMPLING_STEPS}, guidance_scale={guidance:?}, height={side}, width={side}{}
).images[0]
image.save("image.png")
```

{advice}
"#,
            scheduler.class,
            scheduler.options,
            // A JSON string is a valid Python string.
            serde_json::Value::from(prompt),
            scheduler.call,
            side = self.config.image.resolution,
        ))
    }

    fn unet_code(&self) -> StudentCode {
        let distill = &self.config.distill;
        let validation = self.config.validation.as_ref();
        // diffusers' `guidance_scale` is w + 1, where the student was trained with w.
        let (least, most) = (distill.w_min + 1.0, distill.w_max + 1.0);
        StudentCode {
            imports: ", UNet2DConditionModel",
            before: format!(
                "# unet_target is its moving average\nunet = UNet2DConditionModel.from_pretrained({:?}, subfolder=\"unet\", \
                 torch_dtype=dtype)\n",
                self.id
            ),
            argument: ", unet=unet",
            after: String::new(),
            guidance: validation.map_or(8.0, |v| v.guidance).max(least).min(most),
            advice: format!(
                "One to eight steps; guidance from {least} to {most}. Guidance costs no second forward pass: it is an input of the \
                 student."
            ),
        }
    }

    fn lora_code(&self, settings: &Lora) -> StudentCode {
        let distill = &self.config.distill;
        let file = lora_files(settings).next().unwrap_or_default();
        let kohya = match lora_files(settings).nth(1) {
            Some(kohya) => {
                format!(
                    "\n\n`{}/{kohya}` is the same LoRA for AUTOMATIC1111, ComfyUI and kohya-ss.",
                    lora::FOLDER
                )
            }
            None => String::new(),
        };
        StudentCode {
            imports: "",
            before: String::new(),
            argument: "",
            after: format!(
                "pipeline.load_lora_weights({:?}, subfolder={:?}, weight_name={file:?})\n",
                self.id,
                lora::FOLDER
            ),
            guidance: 1.0,
            advice: format!(
                "One to eight steps; guidance 1 (off) to 2. A guidance of {} to {} is part of the LoRA: more burns the images.{kohya}",
                distill.w_min + 1.0,
                distill.w_max + 1.0
            ),
        }
    }

    /// The teacher's commit or branch, unless it is `main`.
    fn revision(&self) -> Result<Option<String>, HubError> {
        let path = self.folder.join("run.json");
        let text = fs::read_to_string(&path).map_err(io(&path))?;
        let run: RunInfo = serde_json::from_str(&text).map_err(|error| io(&path)(error.into()))?;
        Ok(run.revision.filter(|revision| revision != Model::MAIN))
    }
}
