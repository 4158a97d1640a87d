//! Training a LoRA: low-rank adapters of some layers of the teacher's UNet, which is itself frozen and shared with the teacher.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use candle_core::{DType, Device, Result, Tensor};
use coffey_pipeline::counted;

use super::dropout::{NamedDropout, Place};
use super::{Adaptation, AuditMoment, ForwardOptions, ModelFolder, TensorFile};
use crate::lora::{self, BaseVersion, DIFFUSERS_FILE, KOHYA_FILE, Layout, LoraError, Modules};
use crate::models::{Adapter, Denoiser, Dropout, UNet, casts_parameter};
use crate::params::{ParamSet, Tensors};
use crate::random::{generator, uniform};

/// Names of an adapter's two matrices behind that of its module: PEFT's.
const DOWN: &str = ".lora_A.weight";
const UP: &str = ".lora_B.weight";

/// Settings of a LoRA.
#[derive(Clone, Debug)]
pub struct LoraOptions {
    /// Rank of the adapters.
    pub rank: usize,
    /// Numerator of the factor of the adapters' output, whose denominator is the rank.
    pub alpha: f64,
    /// Share of the numbers at the input of an adapter that is set to 0 in training.
    pub dropout: f64,
    /// Names of the adapted modules, or the ends of their names: see [`Modules::targeted`].
    pub targets: Vec<String>,
    /// Whether the finished LoRA is written in diffusers' layout.
    pub save_peft: bool,
    /// Whether it is written in kohya's layout.
    pub save_kohya: bool,
    /// Type of the finished LoRA.
    pub save_dtype: DType,
}

/// A LoRA over a frozen UNet. The student is its own target: there is no moving average.
#[derive(Debug)]
pub struct Lora {
    options: LoraOptions,
    params: ParamSet,
    student: UNet,
    target: UNet,
    frozen_student: UNet,
    place: Place,
}

impl Lora {
    /// A student that starts as `teacher`: the first matrix of every adapter is drawn as PEFT draws it, uniformly within
    /// `1/√fan_in`, and the second is 0.
    ///
    /// # Errors
    /// [`LoraError::Targets`] where `options.targets` do not fit the network, or when a tensor operation fails.
    pub fn from_teacher(
        teacher: &UNet,
        options: LoraOptions,
        seed: u64,
        device: &Device,
        forward: ForwardOptions,
    ) -> std::result::Result<Self, LoraError> {
        let mut tensors = Tensors::new();
        for (module, weight) in modules_of(teacher).targeted(&options.targets)?.iter() {
            let [down, up] = Adapter::shapes(weight, options.rank);
            let fan_in: usize = down.iter().skip(1).product();
            let bound = 1.0 / (fan_in as f64).sqrt();
            let mut rng = generator(seed, &format!("lora {module}"), 0, 0);
            let drawn: Vec<f32> = (0..options.rank * fan_in)
                .map(|_| uniform(&mut rng, -bound, bound) as f32)
                .collect();
            let drawn = Tensor::from_vec(drawn, down, device)?;
            tensors.insert(format!("{module}{DOWN}"), drawn);
            let zeros = Tensor::zeros(up, DType::F32, device)?;
            tensors.insert(format!("{module}{UP}"), zeros);
        }
        Self::new(teacher, &tensors, options, seed, forward)
    }

    /// The student in the `unet_lora/` of a checkpoint, over `teacher`.
    ///
    /// # Errors
    /// When the file can't be read, or does not fit the teacher or the options.
    pub fn load(
        checkpoint: &Path,
        teacher: &UNet,
        options: LoraOptions,
        seed: u64,
        device: &Device,
        forward: ForwardOptions,
    ) -> std::result::Result<Self, LoraError> {
        let path = checkpoint.join(lora::FOLDER).join(DIFFUSERS_FILE);
        let modules = modules_of(teacher).targeted(&options.targets)?;
        let mut saved = lora::read(&path, &modules)?.lora;
        let mut tensors = Tensors::new();
        for (module, weight) in modules.iter() {
            let adapter = saved.adapters.remove(module);
            let fits = |adapter: &lora::Adapter| {
                let shapes = Adapter::shapes(weight, options.rank);
                [adapter.down.dims(), adapter.up.dims()] == shapes.each_ref().map(Vec::as_slice)
            };
            let Some(lora::Adapter { down, up, .. }) = adapter.filter(fits) else {
                return Err(LoraError::Config {
                    path,
                    what: format!("has no adapter of {module} of rank {}", options.rank),
                });
            };
            tensors.insert(format!("{module}{DOWN}"), down.to_device(device)?);
            tensors.insert(format!("{module}{UP}"), up.to_device(device)?);
        }
        Self::new(teacher, &tensors, options, seed, forward)
    }

    fn new(
        teacher: &UNet,
        tensors: &Tensors,
        options: LoraOptions,
        seed: u64,
        forward: ForwardOptions,
    ) -> std::result::Result<Self, LoraError> {
        let params = ParamSet::new(tensors)?;
        let params = match forward.compute {
            Some(dtype) => params.with_copies(dtype, casts_parameter)?,
            None => params,
        };
        let place = Place::default();
        let scale = options.alpha / options.rank as f64;
        let over_teacher = |tensors: Tensors, dropout: Option<&'static str>| {
            let dropout = dropout.filter(|_| options.dropout > 0.0).map(|network| {
                Arc::new(NamedDropout {
                    share: options.dropout,
                    seed,
                    network,
                    place: Arc::clone(&place),
                }) as Arc<dyn Dropout>
            });
            let adapters = pairs(tensors).map(|(module, down, up)| {
                let dropout = dropout.clone();
                let adapter = Adapter {
                    down,
                    up,
                    scale,
                    dropout,
                };
                (module, adapter)
            });
            let compute = forward.compute.unwrap_or(DType::F32);
            let unet = teacher.clone().with_adapters(adapters.collect())?;
            Ok::<_, LoraError>(unet.computing_in(Some(compute)))
        };
        Ok(Self {
            student: over_teacher(params.tracked(), Some("student"))?
                .with_activations(forward.activations),
            // As in the reference, whose student is in training mode in both passes.
            target: over_teacher(params.detached(), Some("target"))?,
            frozen_student: over_teacher(params.detached(), None)?,
            place,
            options,
            params,
        })
    }

    /// A LoRA of the matrices in `tensors`.
    fn lora_of(&self, tensors: Tensors) -> lora::Lora {
        let alpha = self.options.alpha;
        let adapters = pairs(tensors);
        lora::Lora {
            adapters: adapters
                .map(|(module, down, up)| (module, lora::Adapter { down, up, alpha }))
                .collect(),
        }
    }

    /// A folder with the variables as they are: f32, with alpha in the metadata.
    fn exact(&self, folder: &str, file: &str) -> Result<Vec<ModelFolder>> {
        let lora = self.lora_of(self.params.values());
        let file = file_of(&lora, file, Layout::DiffusersWithAlpha, DType::F32)?;
        Ok(folder_of(folder, vec![file]))
    }
}

/// The module, the first and the second matrix of every adapter in `tensors`.
fn pairs(mut tensors: Tensors) -> impl Iterator<Item = (String, Tensor, Tensor)> {
    let names: Vec<String> = tensors.keys().cloned().collect();
    names.into_iter().filter_map(move |name| {
        let module = name.strip_suffix(DOWN)?.to_owned();
        let down = tensors.remove(&name)?;
        let up = tensors.remove(&format!("{module}{UP}"))?;
        Some((module, down, up))
    })
}

impl Adaptation for Lora {
    fn describe(&self) -> String {
        let layers = counted(self.params.iter().count() / 2, "layer");
        let rank = self.options.rank;
        format!("a LoRA of rank {rank} on {layers} of the UNet")
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn target_params(&self) -> Option<&ParamSet> {
        None
    }

    fn student(&self) -> &dyn Denoiser {
        &self.student
    }

    fn frozen_student(&self) -> &dyn Denoiser {
        &self.frozen_student
    }

    fn target(&self) -> &dyn Denoiser {
        &self.target
    }

    fn begin(&self, step: u64, micro_batch: u64) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = (step, micro_batch);
    }

    fn checkpoint(&self) -> Result<Vec<ModelFolder>> {
        self.exact(lora::FOLDER, DIFFUSERS_FILE)
    }

    fn finished(&self) -> Result<Vec<ModelFolder>> {
        let kohya = Layout::Kohya(BaseVersion::of(&modules_of(&self.student)));
        let layouts = [
            (self.options.save_peft, DIFFUSERS_FILE, Layout::Diffusers),
            (self.options.save_kohya, KOHYA_FILE, kohya),
        ];
        let tensors = self.params.values().into_iter();
        let copied = tensors.map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?)));
        let lora = self.lora_of(copied.collect::<Result<_>>()?);
        let wanted = layouts.into_iter().filter(|(wanted, ..)| *wanted);
        let dtype = self.options.save_dtype;
        let files = wanted.map(|(_, name, layout)| file_of(&lora, name, layout, dtype));
        Ok(folder_of(lora::FOLDER, files.collect::<Result<_>>()?))
    }

    fn audited(&self, moment: AuditMoment) -> Result<Vec<ModelFolder>> {
        self.exact("", &format!("lora_{}.safetensors", moment.suffix()))
    }
}

fn file_of(lora: &lora::Lora, name: &str, layout: Layout, dtype: DType) -> Result<TensorFile> {
    let contents = lora.contents(layout, dtype);
    Ok(TensorFile {
        name: name.to_owned(),
        contents: contents.map_err(candle_core::Error::wrap)?,
    })
}

/// The only folder of a LoRA.
fn folder_of(name: &str, files: Vec<TensorFile>) -> Vec<ModelFolder> {
    vec![ModelFolder {
        name: name.to_owned(),
        files,
        config: None,
    }]
}

/// The layers of `unet` that can have an adapter.
fn modules_of(unet: &UNet) -> Modules {
    let weights = unet.adaptable_weights().into_iter();
    weights
        .map(|(module, shape)| (format!("{module}.weight"), shape))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Conditioning;
    use crate::ops::{Activations, Attention};

    fn prediction(network: &UNet) -> Vec<f32> {
        let config = network.config();
        let filled = |shape: &[usize]| {
            let n = shape.iter().product::<usize>();
            let numbers = (0..n).map(|i| (i as f32).sin());
            Tensor::from_iter(numbers, &Device::Cpu)?.reshape(shape)
        };
        let run = || {
            let latents = filled(&[2, config.in_channels, 8, 8])?;
            let text = Conditioning::text(filled(&[2, 5, config.cross_attention_dim])?);
            let output = network.forward(&latents, &[3, 700], &text)?;
            output.flatten_all()?.to_vec1()
        };
        crate::ops::no_grad(run).unwrap()
    }

    #[test]
    fn teacher_beside_a_lora_keeps_its_numbers() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart/teacher/unet");
        let attention = Attention::MemoryEfficient;
        let alone = UNet::load(&folder, DType::F32, &Device::Cpu, attention).unwrap();
        let want = prediction(&alone);
        let teacher = UNet::load(&folder, DType::F32, &Device::Cpu, attention).unwrap();
        let options = LoraOptions {
            rank: 4,
            alpha: 2.0,
            dropout: 0.0,
            targets: lora::DEFAULT_TARGETS.map(str::to_owned).into(),
            save_peft: true,
            save_kohya: true,
            save_dtype: DType::F16,
        };
        let forward = ForwardOptions {
            attention,
            activations: Activations::Keep,
            compute: None,
        };
        let student = Lora::from_teacher(&teacher, options, 1, &Device::Cpu, forward).unwrap();
        // The second matrices are 0: the student begins as the teacher.
        assert_eq!(prediction(&student.frozen_student), want);
        for (name, var) in student.params.iter() {
            if name.ends_with(UP) {
                var.set(&var.ones_like().unwrap()).unwrap();
            }
        }
        assert_ne!(prediction(&student.frozen_student), want);
        assert_eq!(prediction(&student.student), prediction(&student.target));
        assert_eq!(prediction(&teacher), want);
    }
}
