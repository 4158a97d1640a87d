//! Training every tensor of a UNet, with an exponential moving average of all of them.

use std::path::Path;

use candle_core::{DType, Device};

use super::saved::{TensorFile, UNET, UNET_TARGET, UNET_WEIGHTS};
use super::{Adaptation, AuditMoment, ForwardOptions, ModelFolder};
use crate::models::unet::{WEIGHTS_STEM, casts_parameter, student_tensors};
use crate::models::{
    Denoiser, FileContents, ModelError, UNet, UNetConfig, Weights, model_metadata,
};
use crate::params::{ParamSet, Tensors};
use crate::random::{generator, uniform};

/// A UNet of which every tensor is trained, and its exponential moving average.
#[derive(Debug)]
pub struct Full {
    params: ParamSet,
    target_params: ParamSet,
    student: UNet,
    frozen_student: UNet,
    target: UNet,
}

impl Full {
    /// A student that starts as the teacher in `folder`, with a new guidance embedding of width `guidance_width` if the teacher
    /// has none, drawn as `torch.nn.Linear` initialises.
    ///
    /// # Errors
    /// When the teacher can't be read.
    pub fn from_teacher(
        folder: &Path,
        guidance_width: usize,
        seed: u64,
        device: &Device,
        options: ForwardOptions,
    ) -> Result<Self, ModelError> {
        let config = UNetConfig::read(folder)?.with_guidance_embedding(guidance_width);
        let teacher = Weights::load(folder, WEIGHTS_STEM, DType::F32, device)?.into_tensors();
        let tensors = student_tensors(teacher, &config, |n, bound| {
            let mut rng = generator(seed, "cond_proj", 0, 0);
            let bound = f64::from(bound);
            (0..n)
                .map(|_| uniform(&mut rng, -bound, bound) as f32)
                .collect()
        })?;
        Self::new(&config, &tensors, &tensors, folder, options)
    }

    /// The student in the `unet/` and `unet_target/` of a checkpoint.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn load(
        checkpoint: &Path,
        device: &Device,
        options: ForwardOptions,
    ) -> Result<Self, ModelError> {
        let folder = checkpoint.join(UNET);
        let config = UNetConfig::read(&folder)?;
        let load = |folder: &Path| {
            Weights::load(folder, WEIGHTS_STEM, DType::F32, device).map(Weights::into_tensors)
        };
        let (params, target) = (load(&folder)?, load(&checkpoint.join(UNET_TARGET))?);
        Self::new(&config, &params, &target, checkpoint, options)
    }

    fn new(
        config: &UNetConfig,
        params: &Tensors,
        target: &Tensors,
        origin: &Path,
        options: ForwardOptions,
    ) -> Result<Self, ModelError> {
        let build = |tensors: Tensors| {
            let weights = Weights::new(tensors, origin);
            let unet = UNet::new(weights.builder(), config, options.attention)?;
            weights.expect_all_taken(&[])?;
            Ok::<_, ModelError>(unet.computing_in(options.compute))
        };
        let params = ParamSet::new(params)?;
        let params = match options.compute {
            Some(dtype) => params.with_copies(dtype, casts_parameter)?,
            None => params,
        };
        // A step uses the target's weights once, where copies would be held at the student's peak.
        let target_params = ParamSet::new(target)?;
        Ok(Self {
            student: build(params.tracked())?.with_activations(options.activations),
            frozen_student: build(params.detached())?,
            target: build(target_params.detached())?,
            params,
            target_params,
        })
    }
}

impl Full {
    fn folder(&self, name: String, params: &ParamSet) -> ModelFolder {
        ModelFolder {
            name,
            files: vec![TensorFile {
                name: UNET_WEIGHTS.to_owned(),
                contents: FileContents {
                    tensors: params.values(),
                    metadata: model_metadata(),
                },
            }],
            config: Some(self.student.config().to_json().clone()),
        }
    }
}

impl Adaptation for Full {
    fn describe(&self) -> String {
        "the whole UNet".to_owned()
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn target_params(&self) -> Option<&ParamSet> {
        Some(&self.target_params)
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

    fn checkpoint(&self) -> candle_core::Result<Vec<ModelFolder>> {
        Ok(vec![
            self.folder(UNET.to_owned(), &self.params),
            self.folder(UNET_TARGET.to_owned(), &self.target_params),
        ])
    }

    fn audited(&self, moment: AuditMoment) -> candle_core::Result<Vec<ModelFolder>> {
        let folder =
            |name: &str, params| self.folder(format!("{name}_{}", moment.suffix()), params);
        let mut folders = vec![folder(UNET, &self.params)];
        // The target starts as the student.
        if moment == AuditMoment::Final {
            folders.push(folder(UNET_TARGET, &self.target_params));
        }
        Ok(folders)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Result, Tensor};

    use super::*;
    use crate::models::Conditioning;
    use crate::ops::{self, Activations, Attention};
    use crate::params::Grads;

    /// The prediction of a network and the gradients of its square.
    fn step(network: &UNet, params: &ParamSet) -> Result<(Vec<f32>, Grads)> {
        let width = network.config().to_json()["cross_attention_dim"].as_u64();
        let channels = network.config().to_json()["in_channels"].as_u64();
        let filled = |shape: &[u64]| {
            let shape: Vec<usize> = shape.iter().map(|&n| n as usize).collect();
            let n = shape.iter().product::<usize>();
            Tensor::from_iter((0..n).map(|i| (i as f32).sin()), &Device::Cpu)?.reshape(shape)
        };
        let latents = filled(&[2, channels.expect("channels"), 8, 8])?;
        let conditioning = Conditioning::text(filled(&[2, 5, width.expect("a width")])?);
        let (gradients, output) = ops::gradients(|| {
            let output = network.forward(&latents, &[3, 700], &conditioning)?;
            Ok((output.sqr()?.mean_all()?, output))
        })?;
        let mut sums = Grads::new();
        params.accumulate(&mut sums, gradients)?;
        Ok((output.flatten_all()?.to_vec1()?, sums))
    }

    #[test]
    fn full_over_copies_equals_casts_at_every_use() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart/teacher/unet");
        let config = UNetConfig::read(&folder).unwrap();
        let tensors = Weights::load(&folder, WEIGHTS_STEM, DType::F32, &Device::Cpu).unwrap();
        let tensors = tensors.into_tensors();
        for (dtype, activations) in [
            (DType::F16, Activations::Recompute),
            (DType::BF16, Activations::Keep),
        ] {
            let options = ForwardOptions {
                attention: Attention::MemoryEfficient,
                activations,
                compute: Some(dtype),
            };
            let full = Full::new(&config, &tensors, &tensors, &folder, options).unwrap();
            let params = ParamSet::new(&tensors).unwrap();
            let weights = Weights::new(params.tracked(), &folder);
            let casting = UNet::new(weights.builder(), &config, options.attention).unwrap();
            let casting = casting.computing_in(options.compute);
            let (got, got_gradients) = step(&full.student, &full.params).unwrap();
            let (want, want_gradients) = step(&casting, &params).unwrap();
            assert_eq!(got, want);
            assert_eq!(got_gradients.len(), tensors.len());
            for (name, want) in &want_gradients {
                let got = &got_gradients[name];
                assert_eq!(got.dtype(), DType::F32, "{name}");
                let [got, want] = [got, want].map(|t| t.flatten_all()?.to_vec1::<f32>());
                assert_eq!(got.unwrap(), want.unwrap(), "{name}");
            }
            // Norms alone are computed in f32.
            let held = full.params.tracked();
            let wide = held
                .iter()
                .filter(|(_, tensor)| tensor.dtype() == DType::F32);
            assert!(wide.clone().count() > 0);
            assert!(wide.clone().all(|(name, _)| name.contains("norm")));
        }
    }
}
