//! Size ids: what SDXL is told of an image's size and crop (`time_ids` of diffusers' `StableDiffusionXLPipeline`).

use candle_core::{Device, Result, Tensor};

/// Size ids of one image. Pixels; height before width, as in diffusers' pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeIds {
    /// Height and width of the image before it was resized.
    pub original: [u32; 2],
    /// Top and left of the crop in the resized image.
    pub crop: [u32; 2],
    /// Height and width of the crop.
    pub target: [u32; 2],
}

impl SizeIds {
    /// The ids of an image that has the size of its crop.
    pub fn uncropped(target: [u32; 2]) -> Self {
        Self {
            original: target,
            crop: [0, 0],
            target,
        }
    }

    /// The ids of `B` images, `[B, 6]` f32: no 16-bit type holds all of them exactly.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn tensor(all: &[Self], device: &Device) -> Result<Tensor> {
        let ids: Vec<f32> = all
            .iter()
            .flat_map(|ids| [ids.original, ids.crop, ids.target])
            .flatten()
            .map(|id| id as f32)
            .collect();
        Tensor::from_vec(ids, (all.len(), 6), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_ids_have_the_height_before_the_width() -> Result<()> {
        let cropped = SizeIds {
            original: [4096, 1001],
            crop: [3, 0],
            target: [1024, 768],
        };
        let all = [cropped, SizeIds::uncropped([640, 512])];
        let ids: Vec<Vec<f32>> = SizeIds::tensor(&all, &Device::Cpu)?.to_vec2()?;
        assert_eq!(ids[0], [4096.0, 1001.0, 3.0, 0.0, 1024.0, 768.0]);
        assert_eq!(ids[1], [640.0, 512.0, 0.0, 0.0, 640.0, 512.0]);
        Ok(())
    }
}
