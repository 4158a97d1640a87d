//! `coffey export`: a LoRA in another layout, with a lower rank, or merged into the UNet of its base model.

mod place;

use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use coffey_pipeline::{counted, json};
use serde_json::{Map, Value};

use super::Failure;
use super::lora::{LoraRun, check_lora, merged_weights, read_lora};
use super::numbers::whole;
use super::resources::DataAccess;
use super::run_description::{ModelRequest, Part, RunDescription, environments_s3};
use crate::config::{Model, ModelPlace, ModelRef};
use crate::lora::{BaseVersion, DIFFUSERS_FILE, Layout, Lora, Modules, reduce_rank};
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{ModelError, save_model};
use crate::ops::all_finite;
use crate::pretrained::Components;
use place::Place;

/// Greatest `--rank`.
const MAX_RANK: usize = 4096;
/// The file of an adapter in PEFT's own layout.
const PEFT_FILE: &str = "adapter_model.safetensors";
const PEFT_CONFIG: &str = "adapter_config.json";

/// Options of `coffey export`.
#[derive(Args, Debug)]
pub(super) struct ExportArgs {
    /// The run of a LoRA or one of its checkpoints; or, with --lora, the base model: a pipeline in diffusers layout (a folder,
    /// s3://bucket/prefix or a Hub id) or a UNet's folder.
    #[arg(value_name = "MODEL")]
    model: ModelRef,
    /// The LoRA: a safetensors file in the layout of diffusers, PEFT or kohya, or a folder with pytorch_lora_weights.safetensors
    /// [default: the run's own]
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
    /// Branch, tag or commit of MODEL on the Hub [default: main]
    #[arg(long, value_name = "REV")]
    revision: Option<String>,
    /// Write the base model's UNet with the LoRA merged into it: a folder that diffusers loads as any UNet.
    #[arg(long)]
    merge: bool,
    /// Reduce the rank to N: the best approximation of each module's change, by its singular values.
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole(1..=MAX_RANK))]
    rank: Option<usize>,
    /// Layout of the LoRA.
    #[arg(long, value_enum, default_value_t = Format::Diffusers)]
    format: Format,
    /// Type of the tensors [default: f16; f32 with --merge]
    #[arg(long, value_enum)]
    dtype: Option<Type>,
    /// Path of the output, which must not exist: a .safetensors file; a folder with --merge and with --format peft.
    #[arg(short, long, value_name = "PATH")]
    out: PathBuf,
}

/// Layout of a LoRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A file for `load_lora_weights` of diffusers.
    Diffusers,
    /// A file for A1111, ComfyUI and sd-scripts; `load_lora_weights` reads it, too.
    Kohya,
    /// A folder for `PeftModel.from_pretrained` of PEFT.
    Peft,
}

/// Type of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

impl Type {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// Runs `coffey export`.
pub(super) fn run(args: ExportArgs) -> Result<(), Failure> {
    let place = check_options(&args)?;
    let (base, file) = find_base(&args)?;
    let lora = read_lora(&file, &base)?;
    let lora = match args.rank {
        Some(rank) => reduce(&lora, rank, &file)?,
        None => lora,
    };
    let default = if args.merge { Type::F32 } else { Type::F16 };
    let dtype = args.dtype.unwrap_or(default).dtype();
    match (args.merge, args.format) {
        (true, _) => write_merged(&base, &lora, dtype, &place)?,
        (false, Format::Peft) => write_peft(&lora, dtype, &place)?,
        (false, format) => {
            let layout = match format {
                Format::Kohya => Layout::Kohya(BaseVersion::of(&Modules::read(&base)?)),
                _ => Layout::Diffusers,
            };
            let contents = lora.contents(layout, dtype)?;
            place.write_file(|file| contents.write(file))?;
        }
    }
    errln!(
        "{} of rank {} from {}, {} into {}",
        counted(lora.adapters.len() as u64, "adapter"),
        lora.rank(),
        file.display(),
        match args.merge {
            true => "merged",
            false => "written",
        },
        args.out.display()
    );
    outln!("{}", args.out.display());
    Ok(())
}

/// Checks the options that do not depend on the model.
fn check_options(args: &ExportArgs) -> Result<Place, Failure> {
    let wrong = |message: String| Err(Failure::Usage(message.into()));
    match (args.model.place(), &args.revision) {
        (Err(error), _) => return wrong(format!("MODEL {}: {error}", args.model)),
        (Ok(ModelPlace::Hub(_)), _) | (_, None) => {}
        (_, Some(revision)) => {
            return wrong(format!(
                "--revision {revision}: has no effect, MODEL is not on the Hub"
            ));
        }
    }
    if args.merge && args.format != Format::Diffusers {
        return wrong("--format: has no effect with --merge, which writes a UNet".to_owned());
    }
    if let Some(lora) = &args.lora {
        check_lora(lora)?;
    }
    let is_folder = args.merge || args.format == Format::Peft;
    Place::check(&args.out, is_folder).map_err(|error| Failure::Usage(error.into()))
}

/// The folder of the base model's UNet, and the LoRA's file.
fn find_base(args: &ExportArgs) -> Result<(PathBuf, PathBuf), Failure> {
    let run = LoraRun::find(&args.model);
    let file = match (&args.lora, &run) {
        (Some(file), _) if file.is_dir() => file.join(DIFFUSERS_FILE),
        (Some(file), _) => file.clone(),
        (None, Some(run)) => run.file.clone(),
        (None, None) => {
            let message = format!(
                "MODEL {} is no run of a LoRA; name the LoRA with --lora FILE",
                args.model
            );
            return Err(Failure::Usage(message.into()));
        }
    };
    let fetch = |request: &ModelRequest<'_>| fetch_unet(request);
    let base = match run {
        Some(run) => match RunDescription::find(&run.folder)? {
            Some(description) => description.fetch(Part::Unet, fetch)?,
            None => {
                let message = format!(
                    "{} has no run.json that names its base model; give the base model as MODEL and --lora {}",
                    run.folder.display(),
                    run.file.display()
                );
                return Err(Failure::Failed(message.into()));
            }
        },
        None => fetch_unet(&ModelRequest {
            model: &args.model,
            revision: args.revision.as_deref().unwrap_or(Model::MAIN),
            part: Part::Unet,
            s3: environments_s3(),
        })?,
    };
    Ok((base, file))
}

/// The local folder of a model's UNet, or of a UNet.
fn fetch_unet(request: &ModelRequest<'_>) -> Result<PathBuf, Failure> {
    if let Ok(ModelPlace::Folder(folder)) = request.model.place()
        && folder.join("config.json").is_file()
    {
        return Ok(folder);
    }
    let access = DataAccess::open(request.s3.clone())?;
    let components = Components::sampling(Some("unet"), false);
    let folder = access.model(request.model, request.revision, &components)?;
    Ok(folder.join("unet"))
}

/// The LoRA with a lower rank; prints what it keeps.
fn reduce(lora: &Lora, rank: usize, file: &Path) -> Result<Lora, Failure> {
    let from = lora.rank();
    if rank >= from {
        let message = format!(
            "--rank {rank}: must be below {from}, the rank of {}",
            file.display()
        );
        return Err(Failure::Usage(message.into()));
    }
    let (lora, kept) = reduce_rank(lora, rank)?;
    errln!(
        "rank {from} to {rank}: {:.1} % of the norm of the change is kept, {:.1} % in {}",
        100.0 * kept.share,
        100.0 * kept.least,
        kept.module
    );
    Ok(lora)
}

/// Writes the UNet with the LoRA merged into it.
fn write_merged(base: &Path, lora: &Lora, dtype: DType, place: &Place) -> Result<(), Failure> {
    let config = read_config(base)?;
    let mut tensors = merged_weights(base, lora, 1.0, &Device::Cpu)?.into_tensors();
    for (name, tensor) in &mut tensors {
        if tensor.dtype().is_float() && tensor.dtype() != dtype {
            *tensor = tensor.to_dtype(dtype)?;
            if !all_finite(tensor)? {
                let message = format!(
                    "tensor \"{name}\" has values that are no numbers of {}; write --dtype f32 or bf16",
                    dtype.as_str()
                );
                return Err(Failure::Failed(message.into()));
            }
        }
    }
    place.write_folder(|folder| {
        save_model(folder, WEIGHTS_STEM, &config, &tensors).map_err(std::io::Error::other)
    })?;
    Ok(())
}

/// The `config.json` of a UNet, without the place that it was loaded from.
fn read_config(unet: &Path) -> Result<Map<String, Value>, Failure> {
    let path = unet.join("config.json");
    let bytes = bounded::read_file(&path, MAX_FILE_BYTES).map_err(|source| ModelError::Io {
        path: path.clone(),
        source,
    })?;
    let config: Result<Map<String, Value>, _> = json::from_slice(&bytes);
    let mut config = config.map_err(|error| ModelError::Config {
        message: error.to_string(),
        path,
    })?;
    config.shift_remove("_name_or_path");
    Ok(config)
}

/// Writes the LoRA as a folder of PEFT.
fn write_peft(lora: &Lora, dtype: DType, place: &Place) -> Result<(), Failure> {
    let contents = lora.contents(Layout::Peft, dtype)?;
    place.write_folder(|folder| {
        std::fs::write(folder.join(PEFT_CONFIG), lora.adapter_config())?;
        let file = std::fs::File::create_new(folder.join(PEFT_FILE))?;
        let mut writer = BufWriter::new(file);
        contents.write(&mut writer)?;
        writer.flush()
    })?;
    Ok(())
}
