//! `coffey sample`: images from a prompt, drawn by a student or by a teacher.

mod faults;
mod init_latents;
mod pipeline_folders;
mod plan;

use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use clap::{ArgGroup, Args};
use image::RgbImage;

use super::Failure;
use super::lora::{LoraRun, check_lora, merged_weights, read_lora};
use super::numbers::{fraction, guidance, lora_scale, whole};
use super::output::check_picture;
use super::resources::DataAccess;
use super::run_description::{ModelRequest, Part, environments_s3};
use crate::config::{DeviceSpec, MAX_RESOLUTION, Model, ModelPlace, ModelRef};
use crate::device;
use crate::diffusion::NoiseSchedule;
use crate::draw::{plain_grid, save_png};
use crate::encode::{EncoderOptions, Encoders};
use crate::memory::{MemoryLimits, check_sampling};
use crate::models::{UNet, UNetConfig};
use crate::ops::Attention;
use crate::pretrained::Components;
use crate::progress::{Progress, ProgressOptions};
use crate::prompt_file;
use crate::sample::Generator;
use faults::{explain, refuse_one_colour};
use pipeline_folders::{Given, PipelineFolders, around_unet, without_unet};
use plan::{Plan, Scheduler};

/// Guidance where --guidance is not given; that of a LoRA is built into it.
const GUIDANCE: f64 = 8.0;
const LORA_GUIDANCE: f64 = 1.0;
/// Guidance above which the images of a LoRA for few steps burn out.
const MOST_LORA_GUIDANCE: f64 = 2.0;
/// Greatest number of --steps; that of a model is lower.
const MAX_STEPS: usize = 100_000;

/// Options of `coffey sample`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("prompts").args(["prompt", "prompts_file"]).required(true)))]
pub(super) struct SampleArgs {
    /// A pipeline in diffusers layout (a folder, s3://bucket/prefix or a Hub id), the folder of a run or of one of its
    /// checkpoints, or a UNet's folder in one of these.
    #[arg(long, value_name = "MODEL")]
    model: ModelRef,
    /// Model to take text encoder, tokenizer, VAE and scheduler from, if --model lacks them [default: the teacher that the run was
    /// distilled from]
    #[arg(long, value_name = "MODEL")]
    teacher: Option<ModelRef>,
    /// Another VAE, named as a model is [default: that of the run, else that of --model or --teacher]
    #[arg(long, value_name = "MODEL")]
    vae: Option<ModelRef>,
    /// Branch, tag or commit of --model on the Hub, or of --teacher if only that is there [default: main]
    #[arg(long, value_name = "REV")]
    revision: Option<String>,
    /// UNet of the model that draws [default: unet_target if there is one, else unet]
    #[arg(long, value_name = "NAME")]
    unet: Option<String>,
    /// LoRA to merge into the UNet: a safetensors file in the layout of diffusers, PEFT or kohya, or a folder with
    /// pytorch_lora_weights.safetensors [default: the run's own, if --model is the run of a LoRA]
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
    /// Factor of the LoRA's change of weights [default: 1]
    #[arg(long, value_name = "SCALE", allow_negative_numbers = true, value_parser = lora_scale)]
    lora_scale: Option<f64>,
    /// Prompt of an image; several make a grid without gaps, row by row.
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    prompt: Vec<String>,
    /// Prompts from a text file in UTF-8, one a line, at most 1000; empty lines are left out.
    #[arg(long, value_name = "FILE")]
    prompts_file: Option<PathBuf>,
    /// Sampling steps [default: 4 with lcm and tcd, and for a student of objective pcm; else 50]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole(1..=MAX_STEPS))]
    steps: Option<usize>,
    /// Guidance scale: embedded into a UNet that takes it (a student); for another one classifier-free guidance, off at 1 or less
    /// [default: 8; 1 with a LoRA]
    #[arg(long, allow_negative_numbers = true, value_parser = guidance)]
    guidance: Option<f64>,
    /// Negative prompt of all images: with classifier-free guidance only.
    #[arg(long, value_name = "TEXT")]
    negative_prompt: Option<String>,
    /// Seed of the noise of the first image; the next image has the next seed, so each can be drawn alone.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = whole(0..=u64::MAX))]
    seed: u64,
    /// Height of the images in pixels [default: what the model was trained on]
    #[arg(long, value_name = "H", allow_negative_numbers = true, value_parser = whole(1..=MAX_RESOLUTION as usize))]
    height: Option<usize>,
    /// Width of the images in pixels [default: what the model was trained on]
    #[arg(long, value_name = "W", allow_negative_numbers = true, value_parser = whole(1..=MAX_RESOLUTION as usize))]
    width: Option<usize>,
    /// Sampler [default: that of the run's objective or lcm for a student or a LoRA, ddim for a teacher]
    #[arg(long, value_enum)]
    scheduler: Option<Scheduler>,
    /// Stochasticity of the tcd scheduler, 0 (deterministic) to 1 [default: the run's, or 0.3]
    #[arg(long, value_name = "GAMMA", allow_negative_numbers = true, value_parser = fraction)]
    eta: Option<f64>,
    /// Start from this noise, standard normal: .npy, f32 or f16, [1, C, h, w] for all prompts or [B, C, h, w] for one each.
    #[arg(long, value_name = "FILE.npy")]
    init_latents: Option<PathBuf>,
    /// Device to draw on: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: DeviceSpec,
    /// The picture to write.
    #[arg(long, value_name = "FILE.png")]
    out: PathBuf,
}

/// The device of `--device`.
fn open_device(spec: DeviceSpec) -> Result<Device, Failure> {
    device::open(spec).map_err(|error| {
        let message = format!("--device {spec} can't be opened: {error}").into();
        if error.is_config() {
            Failure::Usage(message)
        } else {
            Failure::Failed(message)
        }
    })
}

/// Runs `coffey sample`.
pub(super) fn run(args: SampleArgs) -> Result<(), Failure> {
    check_options(&args)?;
    let prompts = read_prompts(&args)?;
    let device = open_device(args.device)?;
    let folders = find_folders(&args)?;
    let schedule = NoiseSchedule::read(&folders.pipeline.join("scheduler"))?;
    let lora = match &args.lora {
        Some(file) => Some(file.clone()),
        None => LoraRun::find(&args.model).map(|run| run.file),
    };
    let unet = load_unet(&folders.unet, lora.as_deref(), args.lora_scale, &device)?;
    let encoders = Encoders::load(
        &folders.pipeline,
        folders.vae.as_deref(),
        &device,
        EncoderOptions::exact(1),
    )?;
    folders.check_fit(unet.config(), &encoders)?;

    let guidance_width = unet.config().time_cond_proj_dim;
    let student = guidance_width.is_some() || lora.is_some();
    let plan = Plan::new(&args, &folders, student, schedule.len())?;
    let scale = args.guidance.unwrap_or(match (guidance_width, &lora) {
        (None, Some(_)) => LORA_GUIDANCE,
        _ => GUIDANCE,
    });
    let guidance = describe_guidance(&args, scale, &folders.unet, guidance_width)?;
    if guidance_width.is_none() && lora.is_some() && plan.few && scale > MOST_LORA_GUIDANCE {
        errln!(
            "warning: --guidance {scale}: a LoRA for few steps has its guidance built in, and images burn out above \
             {MOST_LORA_GUIDANCE}; use {LORA_GUIDANCE} to {MOST_LORA_GUIDANCE}"
        );
    }
    let generator = Generator {
        denoiser: &unet,
        encoders: &encoders,
        schedule: &schedule,
        scheduler: plan.scheduler,
        steps: plan.steps,
        guidance: scale,
        negative_prompt: args.negative_prompt.as_deref(),
        seed: args.seed,
    };
    let noise = initial_noise(&args, prompts.len(), &unet, &generator)?;
    let card = device::memory(&device).map(|memory| (args.device.to_string(), memory));
    let limits = MemoryLimits::now(card.into_iter().collect());
    let (_, _, height, width) = noise.dims4()?;
    let on = args.device.to_string();
    check_sampling(
        unet.config(),
        encoders.vae().config(),
        [height, width],
        &on,
        &limits,
    )?;
    let columns = (prompts.len() as f64).sqrt().ceil() as usize;
    errln!(
        "{} from {}{} in {} {} steps, {guidance}",
        match prompts.len() {
            1 => "one image".to_owned(),
            n => format!("{n} images in a grid, row by row, {columns} in a row,"),
        },
        folders.unet.display(),
        lora.map_or_else(String::new, |lora| format!(
            " with the LoRA {}",
            lora.display()
        )),
        plan.steps,
        plan.name(),
    );
    let images = draw(&generator, &prompts, &noise, &folders)?;
    save_png(&plain_grid(&images, columns), &args.out)?;
    outln!("{}", args.out.display());
    Ok(())
}

/// The UNet in a folder, with a LoRA merged into it.
fn load_unet(
    folder: &Path,
    lora: Option<&Path>,
    scale: Option<f64>,
    device: &Device,
) -> Result<UNet, Failure> {
    let attention = Attention::MemoryEfficient;
    let Some(file) = lora else {
        if scale.is_some() {
            let message =
                "--lora-scale: has no effect, there is no --lora and --model is no run of a LoRA";
            return Err(Failure::Usage(message.into()));
        }
        return Ok(UNet::load(folder, DType::F32, device, attention)?);
    };
    let config = UNetConfig::read(folder)?;
    let lora = read_lora(file, folder)?;
    let weights = merged_weights(folder, &lora, scale.unwrap_or(1.0), device)?;
    let unet = UNet::new(weights.builder(), &config, attention)?;
    weights.expect_all_taken(&[])?;
    Ok(unet)
}

/// Draws an image of each prompt.
fn draw(
    generator: &Generator<'_>,
    prompts: &[String],
    noise: &Tensor,
    folders: &PipelineFolders,
) -> Result<Vec<RgbImage>, Failure> {
    let (all, steps) = (prompts.len(), generator.steps);
    let progress = Progress::new(ProgressOptions {
        total: (all * steps) as u64,
        template: "{spinner} [{elapsed}] {wide_bar} {msg} eta {eta}",
        line_every: Duration::from_secs(5),
    });
    let mut images = Vec::with_capacity(all);
    for (index, prompt) in prompts.iter().enumerate() {
        let on_step = |step| {
            let message = format!("image {}/{all} · step {step}/{steps}", index + 1);
            let position = (index * steps + step) as u64;
            progress.update(position, &message, || message.clone());
        };
        let image = generator
            .draw(prompt, index, &noise.narrow(0, index, 1)?, &on_step)
            .map_err(|error| explain(error, folders, generator.guidance))?;
        refuse_one_colour(&image, prompt, folders)?;
        images.push(image);
    }
    Ok(images)
}

/// The prompts of `--prompt` or of `--prompts-file`.
fn read_prompts(args: &SampleArgs) -> Result<Vec<String>, Failure> {
    let Some(file) = &args.prompts_file else {
        return Ok(args.prompt.clone());
    };
    prompt_file::read(file).map_err(|error| {
        let message = format!("--prompts-file {}: {error}", file.display());
        Failure::Usage(message.into())
    })
}

/// Checks the options that do not depend on the model.
fn check_options(args: &SampleArgs) -> Result<(), Failure> {
    let wrong = |message: String| Err(Failure::Usage(message.into()));
    let mut on_hub = false;
    for (option, model) in [
        ("--model", Some(&args.model)),
        ("--teacher", args.teacher.as_ref()),
        ("--vae", args.vae.as_ref()),
    ] {
        match model.map(ModelRef::place) {
            None => {}
            Some(Ok(place)) => on_hub |= matches!(place, ModelPlace::Hub(_)) && option != "--vae",
            Some(Err(error)) => {
                let model = model.map_or("", ModelRef::as_str);
                return wrong(format!("{option} {model}: {error}"));
            }
        }
    }
    if let (Some(revision), false) = (&args.revision, on_hub) {
        return wrong(format!(
            "--revision {revision}: has no effect, nothing is taken from the Hub"
        ));
    }
    if let Some(lora) = &args.lora {
        check_lora(lora)?;
    }
    check_picture("--out", &args.out)
}

/// The effect of the guidance `scale` on a UNet, for people: the scale is embedded where its embedding has a `width`. A negative prompt
/// without effect is refused.
fn describe_guidance(
    args: &SampleArgs,
    scale: f64,
    unet: &Path,
    width: Option<usize>,
) -> Result<String, Failure> {
    let unet = unet.display();
    let (why, description) = match width {
        Some(_) => (
            format!("the UNet in {unet} takes guidance as an embedding"),
            format!("guidance {scale}, embedded"),
        ),
        None if scale <= 1.0 => (
            format!("--guidance {scale} turns classifier-free guidance off; it is on above 1"),
            "no guidance".to_owned(),
        ),
        None => return Ok(format!("classifier-free guidance {scale}")),
    };
    match &args.negative_prompt {
        Some(_) => Err(Failure::Usage(
            format!("--negative-prompt: has no effect, {why}").into(),
        )),
        None => Ok(description),
    }
}

/// Folders of everything that is needed, fetched if they are not on this machine.
fn find_folders(args: &SampleArgs) -> Result<PipelineFolders, Failure> {
    let main = Model::MAIN;
    let revision = args.revision.as_deref().unwrap_or(main);
    if let Some(run) = LoraRun::find(&args.model) {
        if let Some(unet) = &args.unet {
            let message = format!(
                "--unet {unet}: has no effect, --model {} is the run of a LoRA, which draws with the UNet of its base model",
                args.model
            );
            return Err(Failure::Usage(message.into()));
        }
        let given = Given {
            teacher: args.teacher.as_ref(),
            revision,
            vae: args.vae.as_ref(),
            of_lora: true,
        };
        return PipelineFolders::find(&run.folder, None, given, fetch_part);
    }
    let (model, unet) = match (around_unet(&args.model), &args.unet) {
        (Some(_), Some(unet)) => {
            let message = format!(
                "--unet {unet}: has no effect, --model {} is the folder of one UNet",
                args.model
            );
            return Err(Failure::Usage(message.into()));
        }
        (Some((around, name)), None) => (around, Some(name)),
        (None, unet) => (args.model.clone(), unet.clone()),
    };
    let unet = unet.as_deref();
    let wanted = Components::sampling(unet, args.teacher.is_none());
    let access = DataAccess::open(environments_s3())?;
    let folder = access
        .model(&model, revision, &wanted)
        .map_err(|failure| without_unet(failure, &model, unet))?;
    let given = Given {
        teacher: args.teacher.as_ref(),
        revision: match model.place() {
            Ok(ModelPlace::Hub(_)) => main,
            _ => revision,
        },
        vae: args.vae.as_ref(),
        of_lora: false,
    };
    PipelineFolders::find(&folder, unet, given, fetch_part)
}

/// The local folder of a part of a model.
fn fetch_part(request: &ModelRequest<'_>) -> Result<PathBuf, Failure> {
    // A folder is read without the run's embedded S3 server, whose data may be elsewhere now.
    let s3 = match request.model.place() {
        Ok(ModelPlace::S3(_)) => request.s3.clone(),
        _ => environments_s3(),
    };
    let access = DataAccess::open(s3)?;
    let components = match request.part {
        Part::Vae => return access.vae(request.model),
        Part::Surroundings => Components::without_unet(),
        Part::Pipeline => Components::training(true),
        Part::Unet => Components::sampling(Some("unet"), false),
    };
    access.model(request.model, request.revision, &components)
}

/// Noise `[B, C, h, w]`, one sample a prompt: drawn from the seed, or read.
fn initial_noise(
    args: &SampleArgs,
    prompts: usize,
    unet: &UNet,
    generator: &Generator<'_>,
) -> Result<Tensor, Failure> {
    let config = unet.config();
    let downscale = generator.encoders.vae().config().downscale();
    let side = |name: &str, pixels: Option<usize>| match pixels {
        Some(pixels) if pixels == 0 || !pixels.is_multiple_of(downscale) => Err(Failure::Usage(
            format!("--{name} {pixels}: must be a multiple of {downscale} for this model").into(),
        )),
        Some(pixels) => Ok(Some(pixels / downscale)),
        None => Ok(None),
    };
    let (height, width) = (side("height", args.height)?, side("width", args.width)?);
    let (channels, device) = (config.in_channels, generator.encoders.device());
    if let Some(path) = &args.init_latents {
        let read = init_latents::read(
            path,
            init_latents::NoiseShape {
                prompts,
                channels,
                height,
                width,
            },
        );
        return Ok(read
            .map_err(|message| Failure::Usage(message.into()))?
            .to_device(device)?);
    }
    let latent = [
        channels,
        height.unwrap_or(config.sample_size[0]),
        width.unwrap_or(config.sample_size[1]),
    ];
    let each = (0..prompts)
        .map(|index| generator.noise(index, latent, device))
        .collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&each, 0)?)
}
