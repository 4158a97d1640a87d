//! `--init-latents`: noise from a `.npy` file.

use std::io::BufReader;
use std::path::Path;

use candle_core::{Device, Tensor};
use coffey_pipeline::regular_file;
use npyz::half::f16;
use npyz::{NpyFile, Order};

/// The shape that a file must have; `None`: any side.
#[derive(Clone, Copy, Debug)]
pub(super) struct NoiseShape {
    pub(super) prompts: usize,
    pub(super) channels: usize,
    pub(super) height: Option<usize>,
    pub(super) width: Option<usize>,
}

/// Reads noise `[B, C, h, w]` f32, one sample a prompt; a single sample is repeated. The error is a message for the user.
pub(super) fn read(path: &Path, wanted: NoiseShape) -> Result<Tensor, String> {
    let wrong = |message: String| format!("--init-latents {}: {message}", path.display());
    let file = regular_file::open(path).map_err(|error| wrong(error.to_string()))?;
    let file = NpyFile::new(BufReader::new(file))
        .map_err(|error| wrong(format!("not a .npy file: {error}")))?;
    let shape: Vec<usize> = file.shape().iter().map(|&n| n as usize).collect();
    if !fits(&shape, wanted) {
        return Err(wrong(format!(
            "has shape {shape:?}; needs {}",
            describe(wanted)
        )));
    }
    if file.order() != Order::C {
        return Err(wrong(
            "is in Fortran order; save numpy.ascontiguousarray of it".to_owned(),
        ));
    }
    let dtype = file.dtype().descr();
    let cut = |error: std::io::Error| wrong(format!("can't be read to its end: {error}"));
    let numbers: Vec<f32> = match file.try_data::<f32>() {
        Ok(numbers) => numbers.collect::<Result<_, _>>().map_err(cut)?,
        Err(file) => match file.try_data::<f16>() {
            Ok(numbers) => numbers
                .map(|x| x.map(f16::to_f32))
                .collect::<Result<_, _>>()
                .map_err(cut)?,
            Err(_) => {
                return Err(wrong(format!(
                    "holds numbers of type {dtype}; needs float32 or float16"
                )));
            }
        },
    };
    if numbers.iter().any(|x| !x.is_finite()) {
        return Err(wrong("holds numbers that are not finite".to_owned()));
    }
    Tensor::from_vec(numbers, shape.as_slice(), &Device::Cpu)
        .and_then(|noise| match shape[0] {
            1 => noise.repeat((wanted.prompts, 1, 1, 1)),
            _ => Ok(noise),
        })
        .map_err(|error| wrong(error.to_string()))
}

fn fits(shape: &[usize], wanted: NoiseShape) -> bool {
    let &[batch, channels, height, width] = shape else {
        return false;
    };
    (batch == 1 || batch == wanted.prompts)
        && channels == wanted.channels
        && height > 0
        && width > 0
        && wanted.height.is_none_or(|h| h == height)
        && wanted.width.is_none_or(|w| w == width)
}

fn describe(wanted: NoiseShape) -> String {
    let batch = match wanted.prompts {
        1 => "1".to_owned(),
        prompts => format!("1 or {prompts}"),
    };
    let side = |name: &str, side: Option<usize>| {
        side.map_or_else(|| name.to_owned(), |side| side.to_string())
    };
    let (height, width) = (side("height", wanted.height), side("width", wanted.width));
    format!(
        "[{batch}, {}, {height}, {width}], in latents",
        wanted.channels
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use npyz::WriterBuilder;

    use super::*;

    const WANTED: NoiseShape = NoiseShape {
        prompts: 2,
        channels: 4,
        height: Some(2),
        width: None,
    };

    fn write<T: npyz::AutoSerialize + Clone>(
        folder: &Path,
        value: T,
        shape: &[u64],
        order: Order,
    ) -> PathBuf {
        let path = folder.join("latents.npy");
        let file = std::fs::File::create(&path).unwrap();
        let options = npyz::WriteOptions::new()
            .default_dtype()
            .shape(shape)
            .order(order);
        let mut writer = options.writer(file).begin_nd().unwrap();
        writer
            .extend(vec![value; shape.iter().product::<u64>() as usize])
            .unwrap();
        writer.finish().unwrap();
        path
    }

    #[test]
    fn init_latents_of_one_sample_serve_all_prompts() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), f16::from_f32(0.5), &[1, 4, 2, 3], Order::C);
        let noise = read(&path, WANTED).unwrap();
        assert_eq!(noise.dims(), [2, 4, 2, 3]);
        assert_eq!(
            noise.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            [0.5; 48]
        );
        let path = write(folder.path(), 0.25f32, &[2, 4, 2, 3], Order::C);
        assert_eq!(read(&path, WANTED).unwrap().dims(), [2, 4, 2, 3]);
    }

    #[test]
    fn init_latents_that_do_not_fit_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path: &Path| read(path, WANTED).unwrap_err();
        for shape in [
            &[3, 4, 2, 3][..],
            &[1, 3, 2, 3],
            &[1, 4, 3, 3],
            &[4, 2, 3],
            &[1, 4, 2, 0],
        ] {
            let message = refused(&write(folder.path(), 0f32, shape, Order::C));
            assert!(message.contains("needs [1 or 2, 4, 2, width]"), "{message}");
        }
        let fortran = refused(&write(folder.path(), 0f32, &[1, 4, 2, 3], Order::Fortran));
        assert!(fortran.contains("Fortran"), "{fortran}");
        let doubles = refused(&write(folder.path(), 0f64, &[1, 4, 2, 3], Order::C));
        assert!(
            doubles.contains("<f8") && doubles.contains("float32"),
            "{doubles}"
        );
        let not_a_number = refused(&write(folder.path(), f32::NAN, &[1, 4, 2, 3], Order::C));
        assert!(not_a_number.contains("not finite"), "{not_a_number}");
        let path = folder.path().join("text.npy");
        std::fs::write(&path, "no").unwrap();
        assert!(refused(&path).contains("not a .npy file"));
        assert!(refused(&folder.path().join("absent.npy")).contains("absent.npy"));
    }
}
