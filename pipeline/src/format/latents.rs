//! Samples of latent shards, as `coffey precompute` writes them.
//!
//! Members of a sample, in this order:
//!
//! | member | content |
//! | --- | --- |
//! | `KEY.latent.npy` | `<f2` (f16) `[2C, h, w]` in C order, `[crops, 2C, h, w]` with several crops: the VAE's moments, `C` channels of mean, then `C` of log-variance, neither clamped nor scaled |
//! | `KEY.prompt_embeds.npy` | `<f2` (f16) `[T, width]`: the text encoder's `last_hidden_state`, of SDXL `hidden_states[-2]` of both text encoders side by side; optional |
//! | `KEY.pooled.npy` | `<f2` (f16) `[P]`: the pooled embedding of SDXL's second text encoder, beside `KEY.prompt_embeds.npy`; no other model has it |
//! | `KEY.txt` | the caption, UTF-8, as in the input |
//! | `KEY.json` | the input's json and the key `coffey` |
//!
//! `coffey` in the json says which part of the image the latents show ([`CropGeometry`]). Sizes are in pixels:
//!
//! ```json
//! {"caption": "doughnut", "coffey": {"original_width": 64, "original_height": 64, "resized_width": 64,
//!  "resized_height": 64, "crop_top": 0, "crop_left": 0, "flipped": false, "target_width": 64,
//!  "target_height": 64}}
//! ```
//!
//! With several crops, `crop_top`, `crop_left` and `flipped` are lists. The scale is `resized / original`; `crop_top`
//! and `crop_left` count in the resized image.
//!
//! The input's keys and values are copied as they are, also those that only Python reads ([`crate::json`]). An
//! input json that is not an object becomes the value of the key `json`, beside `coffey`; one that can't be read becomes
//! a string, the value of the key `unreadable_json` ([`crate::json::Unreadable::quoted`]).

use half::f16;
use serde_json::{Value, json};

use super::npy;
use crate::image::{CropGeometry, CropWindow};
use crate::json::{Document, SampleJson, is_key};

/// Extension of a sample's latents.
pub const LATENT: &str = "latent.npy";
/// Extension of a sample's text embeddings.
pub const PROMPT_EMBEDS: &str = "prompt_embeds.npy";
/// Extension of a sample's pooled text embedding.
pub const POOLED: &str = "pooled.npy";
/// Extension of a sample's caption.
pub const CAPTION: &str = "txt";
/// Extension of a sample's json.
pub const JSON: &str = "json";
/// Key of the json whose value is the [`CropGeometry`].
const GEOMETRY: &str = "coffey";
/// Key of an input json that is not an object.
const INPUT_JSON: &str = "json";
/// Key of an input json that can't be read.
const UNREADABLE_JSON: &str = "unreadable_json";

/// Expected shapes of a sample's arrays: a sample with other shapes is skipped.
///
/// The `Debug` text is part of a stream's identity (`OrderIdentity`): renaming the type or a field refuses the cursors of
/// older runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LatentShapes {
    /// Moments, `[2C, h, w]`. A sample may hold several crops, `[N, 2C, h, w]`: one of them is drawn
    /// each time.
    pub moments: [usize; 3],
    /// Text embeddings, `[T, width]`. With embeddings a sample needs no caption. `None` if captions are
    /// read instead.
    pub prompt_embeds: Option<[usize; 2]>,
    /// Pooled text embedding, `[P]`, of SDXL. `None` if it is not read.
    pub pooled: Option<[usize; 1]>,
}

impl std::fmt::Debug for LatentShapes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = f.debug_struct("LatentShapes");
        text.field("moments", &self.moments);
        text.field("prompt_embeds", &self.prompt_embeds);
        // Absent from the identity of streams that were begun without it.
        if let Some(pooled) = &self.pooled {
            text.field("pooled", pooled);
        }
        text.finish()
    }
}

/// A member of a sample: its extension and its content.
pub type Member = (&'static str, Vec<u8>);

/// An f16 array that a sample's member is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct F16Member<'a> {
    /// Shape of the array.
    pub shape: &'a [usize],
    /// Values in C order.
    pub values: Vec<f16>,
}

/// A sample to be written.
#[derive(Debug)]
pub struct LatentSample<'a> {
    /// Moments, `[2C, h, w]`, or `[crops, 2C, h, w]` with several crops.
    pub moments: F16Member<'a>,
    /// Text embeddings, `[T, width]`.
    pub prompt_embeds: Option<F16Member<'a>>,
    /// Pooled text embedding, `[P]`.
    pub pooled: Option<F16Member<'a>>,
    /// The caption.
    pub caption: &'a str,
    /// The input's json.
    pub json: Option<&'a SampleJson>,
    /// Which part of the image the latents show.
    pub geometry: &'a CropGeometry,
    /// Side of the square that was encoded. Pixels.
    pub resolution: u32,
}

impl LatentSample<'_> {
    /// The sample's members, in the order of the shard.
    ///
    /// # Errors
    /// When the values don't fill the shape of an array.
    pub fn members(self) -> std::io::Result<Vec<Member>> {
        let json = json_with_geometry(self.json, self.geometry, self.resolution);
        let mut members = vec![(LATENT, npy::write(self.moments.shape, self.moments.values)?)];
        for (extension, array) in [(PROMPT_EMBEDS, self.prompt_embeds), (POOLED, self.pooled)] {
            if let Some(array) = array {
                members.push((extension, npy::write(array.shape, array.values)?));
            }
        }
        members.push((CAPTION, self.caption.as_bytes().to_vec()));
        members.push((JSON, json.into_bytes()));
        Ok(members)
    }
}

/// The input's json with the key `coffey`.
fn json_with_geometry(
    input: Option<&SampleJson>,
    geometry: &CropGeometry,
    resolution: u32,
) -> String {
    let of_crop = |value: fn(&CropWindow) -> Value| match geometry.crops.as_slice() {
        [crop] => value(crop),
        crops => crops.iter().map(value).collect(),
    };
    let mut members: Vec<String> = match input {
        None => Vec::new(),
        Some(Ok(document)) => match document.members() {
            Some(members) => members
                .filter(|(key, _)| !is_key(key, GEOMETRY))
                .map(|(key, value)| format!("{key}:{value}"))
                .collect(),
            None => vec![format!("\"{INPUT_JSON}\":{document}")],
        },
        Some(Err(unreadable)) => {
            vec![format!("\"{UNREADABLE_JSON}\":{}", unreadable.quoted())]
        }
    };
    let shown = json!({
        "original_width": geometry.original.0,
        "original_height": geometry.original.1,
        "resized_width": geometry.resized.0,
        "resized_height": geometry.resized.1,
        "crop_top": of_crop(|crop| crop.top.into()),
        "crop_left": of_crop(|crop| crop.left.into()),
        "flipped": of_crop(|crop| crop.flipped.into()),
        "target_width": resolution,
        "target_height": resolution,
    });
    members.push(format!("\"{GEOMETRY}\":{shown}"));
    format!("{{{}}}", members.join(","))
}

/// Geometry of crop number `index` from a sample's json. Missing values are zeros.
pub(crate) fn geometry_of_crop(json: &Document, index: usize) -> CropGeometry {
    let Some(geometry) = json.get(GEOMETRY) else {
        return CropGeometry::default();
    };
    let of_crop = |key: &str| match geometry.get(key)? {
        Value::Array(all) => all.get(index),
        one => Some(one),
    };
    let number = |key: &str| {
        let number = of_crop(key).and_then(Value::as_u64);
        number.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
    };
    CropGeometry {
        original: (number("original_width"), number("original_height")),
        resized: (number("resized_width"), number("resized_height")),
        crops: vec![CropWindow {
            top: number("crop_top"),
            left: number("crop_left"),
            flipped: of_crop("flipped").and_then(Value::as_bool).unwrap_or(false),
        }],
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::json::read_sample_json;

    fn geometry() -> CropGeometry {
        CropGeometry {
            original: (90, 60),
            resized: (96, 64),
            crops: vec![CropWindow {
                top: 0,
                left: 16,
                flipped: true,
            }],
        }
    }

    fn sample_json(text: &[u8]) -> SampleJson {
        read_sample_json(&Bytes::copy_from_slice(text))
    }

    fn read(text: &str) -> Document {
        Document::parse(text.as_bytes()).unwrap()
    }

    const SHOWN: &str = "\"coffey\":{\"original_width\":90,\"original_height\":60,\"resized_width\":96,\"resized_height\":64,\
         \"crop_top\":0,\"crop_left\":16,\"flipped\":true,\"target_width\":64,\"target_height\":64}";

    #[test]
    fn latent_json_keeps_the_input_and_adds_the_crop() {
        for (input, kept) in [
            (
                r#"{"width": 9, "coffey": 1, "z": 0.25}"#,
                r#""width":9,"z":0.25,"#,
            ),
            (
                r#"{"a": NaN, "b": [1e400, 12345678901234567890, 0.10]}"#,
                r#""a":NaN,"b":[1e400,12345678901234567890,0.10],"#,
            ),
            (
                r#"{"a": "\ud800", "a": -Infinity, "\u0063offey": 2}"#,
                r#""a":"\ud800","a":-Infinity,"#,
            ),
            ("\u{feff}{}", ""),
            ("[1]", r#""json":[1],"#),
            ("NaN", r#""json":NaN,"#),
            (r#"{"a": 1,}"#, r#""unreadable_json":"{\"a\": 1,}","#),
            ("", r#""unreadable_json":"","#),
        ] {
            let written = json_with_geometry(Some(&sample_json(input.as_bytes())), &geometry(), 64);
            assert_eq!(written, format!("{{{kept}{SHOWN}}}"));
            read(&written);
        }
        let none = json_with_geometry(None, &geometry(), 64);
        assert_eq!(none, format!("{{{SHOWN}}}"));
        let mut geometry = geometry();
        geometry.crops.push(CropWindow {
            top: 0,
            left: 3,
            flipped: false,
        });
        let two = read(&json_with_geometry(None, &geometry, 64));
        let two = two.get("coffey").unwrap();
        assert_eq!(two["crop_left"], json!([16, 3]));
        assert_eq!(two["flipped"], json!([true, false]));
        assert_eq!(two["target_width"], 64);
    }

    #[test]
    fn latent_json_is_read_as_it_was_written() {
        let mut written = geometry();
        let written_json = |written: &CropGeometry| read(&json_with_geometry(None, written, 64));
        assert_eq!(geometry_of_crop(&written_json(&written), 0), written);
        written.crops.push(CropWindow {
            top: 0,
            left: 3,
            flipped: false,
        });
        let json = written_json(&written);
        for (index, crop) in written.crops.iter().enumerate() {
            assert_eq!(geometry_of_crop(&json, index).crops, [*crop]);
        }
        assert_eq!(geometry_of_crop(&read("{}"), 0), CropGeometry::default());
        let partial = geometry_of_crop(&read(r#"{"coffey": {"crop_top": -1}}"#), 0);
        assert_eq!((partial.original, partial.resized), ((0, 0), (0, 0)));
    }

    #[test]
    fn latent_shapes_without_pooled_have_the_identity_of_older_streams() {
        let shapes = |pooled| LatentShapes {
            moments: [8, 4, 4],
            prompt_embeds: Some([77, 64]),
            pooled,
        };
        let older = "LatentShapes { moments: [8, 4, 4], prompt_embeds: Some([77, 64]) }";
        assert_eq!(format!("{:?}", shapes(None)), older);
        assert!(format!("{:?}", shapes(Some([32]))).ends_with(", pooled: [32] }"));
    }

    #[test]
    fn latent_members_keep_their_order() {
        let values = vec![f16::ONE; 4];
        let geometry = geometry();
        let sample = LatentSample {
            moments: F16Member {
                shape: &[2, 1, 2],
                values: values.clone(),
            },
            prompt_embeds: Some(F16Member {
                shape: &[2, 2],
                values: values.clone(),
            }),
            pooled: Some(F16Member {
                shape: &[4],
                values,
            }),
            caption: "a cup",
            json: None,
            geometry: &geometry,
            resolution: 64,
        };
        let extensions: Vec<_> = sample.members().unwrap().into_iter().map(|m| m.0).collect();
        assert_eq!(
            extensions,
            [
                "latent.npy",
                "prompt_embeds.npy",
                "pooled.npy",
                "txt",
                "json"
            ]
        );
    }
}
