//! Images as they really are, against what Pillow makes of them. `golden/make.py` makes the files.

use std::path::{Path, PathBuf};

use coffey_pipeline::image::{DecodeError, decode, probe};

const MANY: u64 = 1 << 20;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Every kind: its name and bytes.
fn kinds() -> Vec<(String, Vec<u8>)> {
    let mut kinds: Vec<_> = std::fs::read_dir(golden().join("formats"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| !is_expectation(path))
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect();
    kinds.sort();
    assert!(kinds.len() > 40);
    kinds
}

/// `kind.jpg.png` is what Pillow makes of `kind.jpg`.
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
fn every_kind_is_what_pillow_makes_of_it() {
    let mut apart = Vec::new();
    for (name, bytes) in kinds() {
        // Rounding: of alpha blending, and of 16 bits to 8. A lossy WebP's colours are
        // interpolated by another decoder.
        let tolerance = match name.as_str() {
            "lossy.webp" | "lossy-clear.webp" => 2,
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
fn the_content_tells_the_format_and_the_name_does_not() {
    for (name, bytes) in kinds() {
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
fn what_ends_early_is_an_error_in_every_format() {
    let mut accepted = Vec::new();
    for (name, bytes) in kinds() {
        if name.contains("animated") {
            continue; // The first frame may be whole.
        }
        for share in [0.3, 0.5, 0.8, 0.95] {
            let cut = (bytes.len() as f64 * share) as usize;
            match decode(&bytes[..cut], MANY) {
                Ok(_) => accepted.push(format!("{name} at {share}")),
                Err(error) => assert!(matches!(error, DecodeError::Damaged(_)), "{name} {error}"),
            }
        }
    }
    assert!(accepted.is_empty(), "{accepted:?}");
}

#[test]
fn a_baseline_jpeg_may_lack_its_end_mark_and_no_more() {
    let name = "420.jpg";
    let whole = std::fs::read(golden().join("formats").join(name)).unwrap();
    assert!(whole.ends_with(&[0xFF, 0xD9]));
    assert_eq!(worst(name, &whole[..whole.len() - 2]), 0);
    assert!(decode(&whole[..whole.len() - 12], MANY).is_err());
}

#[test]
fn a_header_that_claims_too_much_is_refused_before_anything_is_decoded() {
    // Where each format's header has its width and height, how wide those are, and which end first.
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
    // A lossless WebP: 14 bits for each side less one, after the signature byte. 16383 is its limit.
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

/// As PNG checks its chunks.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0xEDB8_8320 * (sum & 1))
        })
    })
}

#[test]
fn a_progressive_image_of_endless_scans_is_refused() {
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
fn damaged_bytes_never_panic() {
    let mut random = fastrand::Rng::with_seed(9);
    for (_, whole) in kinds() {
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
