//! Decoded images against Pillow's. `golden/make.py` makes the files.

use std::path::{Path, PathBuf};

use coffey_pipeline::image::{DecodeError, decode, probe};

const MANY: u64 = 1 << 20;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The name and bytes of every golden image.
fn images() -> Vec<(String, Vec<u8>)> {
    let mut images: Vec<_> = std::fs::read_dir(golden().join("formats"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| !is_expectation(path))
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect();
    images.sort();
    assert!(images.len() > 40);
    images
}

/// Whether the file is Pillow's result: `420.jpg.png` for `420.jpg`.
fn is_expectation(path: &Path) -> bool {
    path.file_stem()
        .is_some_and(|stem| Path::new(stem).extension().is_some())
}

fn worst(name: &str, bytes: &[u8]) -> u8 {
    let decoded = decode(bytes, MANY).unwrap_or_else(|error| panic!("{name} {error}"));
    let path = golden().join("formats").join(format!("{name}.png"));
    let expected = image::open(path).unwrap().into_rgb8();
    assert_eq!(decoded.pixels.dimensions(), expected.dimensions(), "{name}");
    let pairs = decoded.pixels.as_raw().iter().zip(expected.as_raw());
    pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn decoded_images_equal_pillow() {
    let mut apart = Vec::new();
    for (name, bytes) in images() {
        // Alpha blending and 16 bits round differently. Pillow's WebP decoder interpolates the colours of lossy
        // images in another way.
        let tolerance = match name.as_str() {
            name if name.starts_with("lossy") => 2,
            name if name.contains("clear") || name == "rgb-16.png" => 1,
            _ => 0,
        };
        let worst = worst(&name, &bytes);
        if worst > tolerance {
            apart.push(format!("{name} by {worst}"));
        }
    }
    assert!(apart.is_empty(), "{apart:?}");
}

#[test]
fn image_format_is_told_by_content() {
    for (name, bytes) in images() {
        let extension = name.rsplit('.').next().unwrap();
        let expected = if extension == "jpg" {
            "jpeg"
        } else {
            extension
        };
        assert_eq!(probe(&bytes).unwrap().0, expected, "{name}");
        assert_eq!(decode(&bytes, MANY).unwrap().format, expected, "{name}");
    }
}

#[test]
fn cut_images_are_errors() {
    /// The last chunk, and the checksum of the image data before it. Bytes.
    const PNG_END: usize = 16;
    let mut accepted = Vec::new();
    for (name, bytes) in images() {
        if name.contains("animated") {
            continue; // the first frame may be whole
        }
        for share in [0.3, 0.5, 0.8, 0.95] {
            let cut = (bytes.len() as f64 * share) as usize;
            if name.ends_with("png") && cut >= bytes.len() - PNG_END {
                continue; // the image data is whole
            }
            match decode(&bytes[..cut], MANY) {
                Ok(_) => accepted.push(format!("{name} at {share}")),
                Err(error) => assert!(matches!(error, DecodeError::Damaged(_)), "{name} {error}"),
            }
        }
    }
    assert!(accepted.is_empty(), "{accepted:?}");
}

#[test]
fn baseline_jpeg_may_lack_only_its_end_mark() {
    let name = "420.jpg";
    let whole = std::fs::read(golden().join("formats").join(name)).unwrap();
    assert!(whole.ends_with(&[0xFF, 0xD9]));
    assert_eq!(worst(name, &whole[..whole.len() - 2]), 0);
    assert!(decode(&whole[..whole.len() - 12], MANY).is_err());
}

#[test]
fn oversized_image_header_is_refused() {
    // The offset of width and height in each format's header, the bytes of each, and whether they are little-endian.
    for (name, at, wide, little) in [
        ("rgb.png", 16, 4, false),
        ("rgb.bmp", 18, 4, true),
        ("still.gif", 6, 2, true),
    ] {
        let mut bytes = std::fs::read(golden().join("formats").join(name)).unwrap();
        for side in 0..2 {
            let claim = 60_000_u32;
            let start = at + side * wide;
            let field = &mut bytes[start..start + wide];
            if little {
                field.copy_from_slice(&claim.to_le_bytes()[..wide]);
            } else {
                field.copy_from_slice(&claim.to_be_bytes()[4 - wide..]);
            }
        }
        if name.ends_with("png") {
            let sum = crc32(&bytes[12..29]).to_be_bytes();
            bytes[29..33].copy_from_slice(&sum);
        }
        refused(name, &bytes);
    }
    for name in ["420.jpg", "progressive.jpg", "arithmetic.jpg"] {
        let mut bytes = std::fs::read(golden().join("formats").join(name)).unwrap();
        let frame = bytes
            .windows(2)
            .position(|pair| pair[0] == 0xFF && matches!(pair[1], 0xC0 | 0xC2 | 0xC9))
            .unwrap();
        bytes[frame + 5..frame + 9].copy_from_slice(&[0xEA, 0x60, 0xEA, 0x60]);
        refused(name, &bytes);
    }
    // A lossless WebP holds each side less one in 14 bits after the signature byte; 16383 is the largest side.
    let mut bytes = std::fs::read(golden().join("formats/lossless.webp")).unwrap();
    let start = bytes.windows(4).position(|four| four == b"VP8L").unwrap() + 9;
    bytes[start..start + 4].copy_from_slice(&[0xFE, 0xBF, 0xFF, 0x0F]);
    refused("lossless.webp", &bytes);
}

fn refused(name: &str, bytes: &[u8]) {
    match decode(bytes, 178_956_970) {
        Err(DecodeError::TooLarge { width, height, .. }) => {
            assert!(width > 16_000 && height > 16_000, "{name}");
        }
        other => panic!("{name}: {other:?}"),
    }
}

/// The CRC-32 of a PNG chunk.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0xEDB8_8320 * (sum & 1))
        })
    })
}

#[test]
fn progressive_jpeg_of_many_scans_is_refused() {
    let bytes = std::fs::read(golden().join("formats/progressive.jpg")).unwrap();
    let start = bytes
        .windows(2)
        .position(|pair| pair == [0xFF, 0xDA])
        .unwrap();
    let end = bytes[start + 2..]
        .windows(2)
        .position(|pair| pair[0] == 0xFF && pair[1] != 0)
        .unwrap();
    let scan = &bytes[start..start + 2 + end];
    let mut many = bytes[..start].to_vec();
    (0..5000).for_each(|_| many.extend(scan));
    many.extend(&bytes[start + 2 + end..]);
    let error = decode(&many, MANY).unwrap_err().to_string();
    assert!(error.contains("scan"), "{error}");
}

#[test]
fn damaged_images_never_panic() {
    let mut random = fastrand::Rng::with_seed(9);
    for (_, whole) in images() {
        for _ in 0..60 {
            let mut damaged = whole.clone();
            for _ in 0..random.usize(1..5) {
                let at = random.usize(0..damaged.len());
                damaged[at] = random.u8(..);
            }
            if let Err(DecodeError::Damaged(error)) = decode(&damaged, MANY) {
                assert!(!error.contains("gave up"), "{error}");
            }
        }
    }
}
