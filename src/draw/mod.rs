//! Sample grids, loss curves and histograms as PNG files.
//!
//! This module works on images and numbers; only [`pixels_to_images`] takes a tensor. It never decides what is drawn.

mod canvas;
mod curves;
mod grid;
mod histograms;

use std::io::BufWriter;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use image::{ImageFormat, RgbImage};

pub use curves::{Curve, curves};
pub use grid::{grid, plain_grid};
pub use histograms::{Bars, histograms};

/// A PNG file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("can't write the picture {path}: {source}")]
pub struct SaveError {
    /// The file.
    pub path: PathBuf,
    /// The cause.
    pub source: std::io::Error,
}

/// `B` images from pixels `[B, 3, H, W]` of any float dtype, clamped to [-1, 1]. As diffusers' `VaeImageProcessor`.
///
/// # Errors
/// When the tensor has another shape.
pub fn pixels_to_images(pixels: &Tensor) -> candle_core::Result<Vec<RgbImage>> {
    let (batch, channels, height, width) = pixels.dims4()?;
    if channels != 3 {
        candle_core::bail!("an image has 3 channels, not {channels}");
    }
    let bytes = pixels
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F32)?
        .affine(0.5, 0.5)?
        .clamp(0f32, 1f32)?
        .permute((0, 2, 3, 1))?
        .flatten_all()?
        .to_vec1::<f32>()?
        .into_iter()
        .map(|value| (value * 255.0).round_ties_even() as u8)
        .collect::<Vec<u8>>();
    let size = height * width * 3;
    (0..batch)
        .map(|i| {
            let bytes = bytes[i * size..(i + 1) * size].to_vec();
            RgbImage::from_raw(width as u32, height as u32, bytes).ok_or_else(|| {
                candle_core::Error::msg(format!("an image of {width}x{height} pixels is too large"))
            })
        })
        .collect()
}

/// Writes a PNG file atomically; creates its folder.
///
/// # Errors
/// When the folder or the file can't be written.
pub fn save_png(picture: &RgbImage, path: &Path) -> Result<(), SaveError> {
    write_atomically(picture, path).map_err(|source| SaveError {
        path: path.to_owned(),
        source,
    })
}

/// Checks that [`save_png`] could write the file; writes nothing.
///
/// # Errors
/// When the path is a folder or another thing that is no file, or its folder can't be created or written to.
pub fn check_png(path: &Path) -> Result<(), SaveError> {
    check(path).map_err(|source| SaveError {
        path: path.to_owned(),
        source,
    })
}

fn check(path: &Path) -> std::io::Result<()> {
    let wrong = |message: String| Err(std::io::Error::other(message));
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return wrong("it ends in /, as the name of a folder".to_owned());
    }
    match std::fs::metadata(path) {
        Ok(there) if there.is_dir() => return wrong("it is a folder".to_owned()),
        Ok(there) if !there.is_file() => return wrong("it is not a file".to_owned()),
        _ => {}
    }
    // The folders that are missing are created in the first that is there.
    let folder = std::path::absolute(path)?;
    let mut folders = folder.ancestors().skip(1);
    let Some(folder) = folders.find(|folder| folder.exists()) else {
        return wrong("it has no folder".to_owned());
    };
    if !folder.is_dir() {
        return wrong(format!("{} is not a folder", folder.display()));
    }
    match tempfile::tempfile_in(folder) {
        Ok(_) => Ok(()),
        Err(error) => wrong(format!("{}: {error}", folder.display())),
    }
}

fn write_atomically(picture: &RgbImage, path: &Path) -> std::io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".picture-");
    // The umask applies to mode 0666. The default of temporary files is 0600.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(folder)?;
    let mut writer = BufWriter::new(&file);
    picture
        .write_to(&mut writer, ImageFormat::Png)
        .map_err(std::io::Error::other)?;
    writer
        .into_inner()
        .map_err(std::io::IntoInnerError::into_error)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_are_rounded_as_in_diffusers() {
        let values = [-2.0f32, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 0.25];
        // Red, green and blue planes of one row of eight pixels.
        let data: Vec<f32> = (0..3).flat_map(|_| values).collect();
        let pixels = Tensor::from_vec(data, (1, 3, 1, 8), &Device::Cpu).unwrap();
        let images = pixels_to_images(&pixels).unwrap();
        let red: Vec<u8> = images[0].pixels().map(|p| p.0[0]).collect();
        // numpy: ((x / 2 + 0.5).clip(0, 1) * 255).round()
        assert_eq!(red, [0, 0, 64, 128, 191, 255, 255, 159]);
        assert!(
            images[0]
                .pixels()
                .all(|p| p.0[0] == p.0[1] && p.0[1] == p.0[2])
        );
    }

    #[test]
    fn pixels_keep_channel_and_batch_order() {
        let data: Vec<f32> = [[1f32, -1.0, -1.0], [-1.0, -1.0, 1.0]].concat();
        let pixels = Tensor::from_vec(data, (2, 3, 1, 1), &Device::Cpu).unwrap();
        let images = pixels_to_images(&pixels).unwrap();
        assert_eq!(images[0].get_pixel(0, 0).0, [255, 0, 0]);
        assert_eq!(images[1].get_pixel(0, 0).0, [0, 0, 255]);
        assert!(
            pixels_to_images(&Tensor::zeros((1, 4, 2, 2), DType::F32, &Device::Cpu).unwrap())
                .is_err()
        );
    }

    #[test]
    fn png_files_replace_older_ones_atomically() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/picture.png");
        for side in [3, 5] {
            let picture = RgbImage::from_pixel(side, side, image::Rgb([9, 8, 7]));
            save_png(&picture, &path).unwrap();
            assert_eq!(image::open(&path).unwrap().into_rgb8(), picture);
        }
        assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1);
        let error = save_png(&RgbImage::new(1, 1), &path.join("below/a.png")).unwrap_err();
        assert!(error.to_string().contains("a.png"), "{error}");
    }

    #[test]
    fn place_of_a_png_file_is_checked_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/below/a.png");
        check_png(&path).unwrap();
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        save_png(&RgbImage::new(1, 1), &path).unwrap();
        check_png(&path).unwrap();
        for (path, what) in [
            (folder.path().to_owned(), "it is a folder"),
            (path.join(""), "it ends in /"),
            (folder.path().join("new.png/"), "it ends in /"),
            (path.join("b.png"), "a.png is not a folder"),
            (path.join("c/b.png"), "a.png is not a folder"),
            ("/dev/null".into(), "it is not a file"),
            ("/proc/a.png".into(), "/proc: "),
        ] {
            let message = check_png(&path).unwrap_err().to_string();
            assert!(message.contains(what), "{what:?}? {message}");
        }
    }
}
