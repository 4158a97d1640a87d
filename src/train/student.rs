//! What is trained: the student's variables, and the target that follows them.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};
use rayon::prelude::*;

use crate::models::unet::{WEIGHTS_STEM, student_tensors};
use crate::models::{ModelError, UNet, UNetConfig, Weights};
use crate::ops::{self, Activations, Attention};
use crate::random::{generator, uniform};

/// Named variables, in name order: order must not depend on hashing.
pub(super) type Variables = BTreeMap<String, Var>;

/// How a student's passes are computed.
#[derive(Clone, Copy, Debug)]
pub struct Passes {
    /// How attention is computed.
    pub attention: Attention,
    /// What the online network's blocks keep for the backward pass.
    pub keep: Activations,
    /// The type to compute in, where it is not the weights' `f32`.
    pub compute: Option<DType>,
}

/// The online student, a UNet over variables, and its exponential moving average, the target.
#[derive(Debug)]
pub struct Student {
    online: Variables,
    target: Variables,
    unet: UNet,
    frozen: UNet,
    target_unet: UNet,
}

impl Student {
    /// A student that starts as the teacher in `folder`, with a new embedding of the guidance scale if the teacher has none.
    ///
    /// # Errors
    /// When the teacher can't be read.
    pub fn from_teacher(
        folder: &Path,
        guidance_width: usize,
        seed: u64,
        device: &Device,
        how: Passes,
    ) -> std::result::Result<Self, ModelError> {
        let config = UNetConfig::read(folder)?.with_guidance_embedding(guidance_width);
        let teacher = Weights::load(folder, WEIGHTS_STEM, DType::F32, device)?.into_tensors();
        let tensors = student_tensors(teacher, &config, |n, bound| {
            let mut rng = generator(seed, "cond_proj", 0, 0);
            let bound = f64::from(bound);
            (0..n)
                .map(|_| uniform(&mut rng, -bound, bound) as f32)
                .collect()
        })?;
        Self::new(&config, &tensors, &tensors, folder, how)
    }

    /// The student in a checkpoint's `unet/` and `unet_target/`.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn load(
        checkpoint: &Path,
        device: &Device,
        how: Passes,
    ) -> std::result::Result<Self, ModelError> {
        let folder = checkpoint.join("unet");
        let config = UNetConfig::read(&folder)?;
        let load = |folder: &Path| {
            Weights::load(folder, WEIGHTS_STEM, DType::F32, device).map(Weights::into_tensors)
        };
        let (online, target) = (load(&folder)?, load(&checkpoint.join("unet_target"))?);
        Self::new(&config, &online, &target, checkpoint, how)
    }

    fn new(
        config: &UNetConfig,
        online: &BTreeMap<String, Tensor>,
        target: &BTreeMap<String, Tensor>,
        origin: &Path,
        Passes {
            attention,
            keep,
            compute,
        }: Passes,
    ) -> std::result::Result<Self, ModelError> {
        let variables = |tensors: &BTreeMap<String, Tensor>| -> Result<Variables> {
            tensors
                .iter()
                .map(|(name, t)| Ok((name.clone(), Var::from_tensor(t)?)))
                .collect()
        };
        let build = |tensors: BTreeMap<String, Tensor>| {
            let weights = Weights::new(tensors, origin);
            let unet = UNet::new(weights.builder(), config, attention)?.computing_in(compute);
            weights.expect_all_taken(&[])?;
            Ok::<_, ModelError>(unet)
        };
        let (online, target) = (variables(online)?, variables(target)?);
        let tracked = online
            .iter()
            .map(|(name, var)| (name.clone(), var.as_tensor().clone()));
        let unet = build(tracked.collect())?.with_activations(keep);
        // These read the variables' storage through detached tensors: they never record a graph.
        let frozen = build(detached(&online))?;
        let target_unet = build(detached(&target))?;
        Ok(Self {
            online,
            target,
            unet,
            frozen,
            target_unet,
        })
    }

    /// The online network; its forward pass records a graph.
    pub fn unet(&self) -> &UNet {
        &self.unet
    }

    /// The online network for drawing samples: the same weights, no graph.
    pub fn frozen(&self) -> &UNet {
        &self.frozen
    }

    /// The target network.
    pub fn target(&self) -> &UNet {
        &self.target_unet
    }

    /// What is trained.
    pub(super) fn variables(&self) -> &Variables {
        &self.online
    }

    /// Moves the target towards the student: `target = decay·target + (1 - decay)·student`. As the reference's `update_ema`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn update_target(&self, decay: f64) -> Result<()> {
        let pairs: Vec<_> = self.target.values().zip(self.online.values()).collect();
        pairs
            .into_par_iter()
            .try_for_each(|(target, online)| ops::ema_update(target, online, decay))
    }

    /// The online student's tensors, which go on changing as it is trained.
    pub(super) fn online(&self) -> BTreeMap<String, Tensor> {
        detached(&self.online)
    }

    /// The target's tensors, which go on changing as it follows.
    pub(super) fn average(&self) -> BTreeMap<String, Tensor> {
        detached(&self.target)
    }
}

/// The variables' tensors, outside any graph.
pub(super) fn detached(variables: &Variables) -> BTreeMap<String, Tensor> {
    variables
        .iter()
        .map(|(name, var)| (name.clone(), var.as_detached_tensor()))
        .collect()
}
