//! The modules of a UNet that can have an adapter, and their names in kohya's layout.

use std::collections::BTreeMap;
use std::path::Path;

use super::sgm;
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{ModelError, tensor_shapes};

/// The linear and convolutional modules of a UNet: the shape of each one's weight, by the module's diffusers name.
#[derive(Clone, Debug, Default)]
pub struct Modules {
    shapes: BTreeMap<String, Vec<usize>>,
}

impl Modules {
    /// The modules that the weights of a UNet's folder have. Only headers are read.
    ///
    /// # Errors
    /// When the folder has no weights, or a file is damaged.
    pub fn read(unet: &Path) -> Result<Self, ModelError> {
        Ok(tensor_shapes(unet, WEIGHTS_STEM)?.into_iter().collect())
    }

    /// Shape of a module's weight: `[out, in]` or `[out, in, kh, kw]`.
    pub fn shape(&self, module: &str) -> Option<&[usize]> {
        self.shapes.get(module).map(Vec::as_slice)
    }

    /// Modules with the shapes of their weights, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[usize])> {
        let shapes = self.shapes.iter();
        shapes.map(|(name, shape)| (name.as_str(), shape.as_slice()))
    }

    /// Modules by their names in kohya's layout: those made of diffusers' names, and those made of the names of Stable Diffusion's
    /// original layout, which trainers of the kohya-ss family write for SDXL.
    pub(super) fn by_kohya_name(&self) -> BTreeMap<String, &str> {
        let original = self.shapes.keys().filter_map(|name| {
            let original = sgm::original_name(name, |module| self.shapes.contains_key(module))?;
            Some((kohya_name(&original), name.as_str()))
        });
        let own = self
            .shapes
            .keys()
            .map(|name| (kohya_name(name), name.as_str()));
        original.chain(own).collect()
    }
}

impl FromIterator<(String, Vec<usize>)> for Modules {
    /// The modules of tensors with these names and shapes; weights with two or four dimensions are of modules.
    fn from_iter<I: IntoIterator<Item = (String, Vec<usize>)>>(tensors: I) -> Self {
        let modules = tensors.into_iter().filter_map(|(name, shape)| {
            let module = name.strip_suffix(".weight")?.to_owned();
            matches!(shape.len(), 2 | 4).then_some((module, shape))
        });
        Self {
            shapes: modules.collect(),
        }
    }
}

/// A module's name in kohya's layout, without its prefix.
pub(super) fn kohya_name(module: &str) -> String {
    module.replace('.', "_")
}

/// The family of a base model, as readers of kohya's layout distinguish it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseVersion {
    /// Stable Diffusion 1.
    Sd1,
    /// Stable Diffusion 2.
    Sd2,
    /// SDXL.
    Sdxl,
}

impl BaseVersion {
    /// The family of the UNet with these modules, by the width of its text embeddings; `None` for another one.
    pub fn of(modules: &Modules) -> Option<Self> {
        let mut cross = modules
            .iter()
            .filter(|(name, _)| name.ends_with("attn2.to_k"));
        let (_, shape) = cross.next()?;
        match shape.get(1)? {
            768 => Some(Self::Sd1),
            1024 => Some(Self::Sd2),
            2048 => Some(Self::Sdxl),
            _ => None,
        }
    }

    /// Entries of a file's metadata, with sd-scripts' keys, by which A1111 tells the family. Other files with metadata are of Stable
    /// Diffusion 1 to it.
    pub(super) fn metadata(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Sd1 => &[],
            Self::Sd2 => &[("ss_base_model_version", "sd_v2"), ("ss_v2", "True")],
            Self::Sdxl => &[("ss_base_model_version", "sdxl_base_v1-0")],
        }
    }
}
