//! A UNet's `config.json`: which network it describes, with diffusers' meaning and defaults.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Number, Value, json};

use super::levels::{LevelConfig, Levels};
use super::time::SIZE_IDS;
use crate::models::ModelError;
use crate::models::activation::Activation;
use crate::models::blocks::{NormConfig, ResnetConfig, TimeConfig};
use crate::models::config::{Class, ConfigFile, range};

const CLASS: Class = Class {
    name: "UNet2DConditionModel",
    keys: &[
        "act_fn",
        "addition_embed_type",
        "addition_embed_type_num_heads",
        "addition_time_embed_dim",
        "attention_head_dim",
        "attention_type",
        "block_out_channels",
        "center_input_sample",
        "class_embed_type",
        "class_embeddings_concat",
        "conv_in_kernel",
        "conv_out_kernel",
        "cross_attention_dim",
        "cross_attention_norm",
        "down_block_types",
        "downsample_padding",
        "dropout",
        "dual_cross_attention",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "flip_sin_to_cos",
        "freq_shift",
        "in_channels",
        "layers_per_block",
        "mid_block_only_cross_attention",
        "mid_block_scale_factor",
        "mid_block_type",
        "norm_eps",
        "norm_num_groups",
        "num_attention_heads",
        "num_class_embeds",
        "only_cross_attention",
        "out_channels",
        "projection_class_embeddings_input_dim",
        "resnet_out_scale_factor",
        "resnet_skip_time_act",
        "resnet_time_scale_shift",
        "reverse_transformer_layers_per_block",
        "sample_size",
        "time_cond_proj_dim",
        "time_embedding_act_fn",
        "time_embedding_dim",
        "time_embedding_type",
        "timestep_post_act",
        "transformer_layers_per_block",
        "up_block_types",
        "upcast_attention",
        "use_linear_projection",
    ],
};

/// A UNet's `config.json`, as far as it decides the network.
#[derive(Clone, Debug, PartialEq)]
pub struct UNetConfig {
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Height and width of the latents it was trained on.
    pub sample_size: [usize; 2],
    /// Width of the text embeddings.
    pub cross_attention_dim: usize,
    /// Width of the guidance embedding, for students.
    pub time_cond_proj_dim: Option<usize>,
    /// The levels on the way down, from the finest.
    pub(super) down: Vec<LevelConfig>,
    pub(super) mid: Option<LevelConfig>,
    /// The levels on the way up, from the coarsest.
    pub(super) up: Vec<LevelConfig>,
    /// Settings that the residual blocks share.
    pub(super) resnet: ResnetConfig,
    /// Divisor of the sum of a middle block's branches.
    pub(super) mid_scale: f64,
    pub(super) time: TimeEmbeddingConfig,
    /// SDXL's pooled text and size ids: `addition_embed_type = "text_time"`.
    pub(super) added: Option<AddedConfig>,
    pub(super) center_input: bool,
    pub(super) conv_in_kernel: usize,
    pub(super) conv_out_kernel: usize,
    pub(super) downsample_padding: usize,
    pub(super) linear_projection: bool,
    map: Map<String, Value>,
}

/// The embedding of timesteps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TimeEmbeddingConfig {
    pub(super) flip_sin_to_cos: bool,
    pub(super) freq_shift: f64,
    /// Width of the embedding.
    pub(super) width: usize,
    /// The activation between the two linear maps.
    pub(super) activation: Activation,
    /// The activation after the second linear map: `timestep_post_act`.
    pub(super) post: Option<Activation>,
    /// The activation after `post`: `time_embedding_act_fn`.
    pub(super) last: Option<Activation>,
}

/// The embedding of a pooled text embedding and of size ids.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct AddedConfig {
    /// Width of the pooled text embedding.
    pub(super) pooled: usize,
    /// Width of the sinusoid of one size id: `addition_time_embed_dim`.
    pub(super) id_width: usize,
}

impl AddedConfig {
    /// `None` without an `addition_embed_type`.
    fn read(file: &ConfigFile) -> Option<Self> {
        const WIDTH: &str = "projection_class_embeddings_input_dim";
        file.only("addition_embed_type", &[json!("text_time")]);
        file.optional::<String>("addition_embed_type")?;
        let required = |key| {
            if file.optional::<Number>(key).is_none() {
                let known = "a number, which addition_embed_type = \"text_time\" needs";
                file.refuse(key, "null", known);
            }
        };
        required("addition_time_embed_dim");
        required(WIDTH);
        let id_width = file.whole("addition_time_embed_dim", 256, range::WIDTH);
        let inputs = file.whole(WIDTH, 2816, range::WIDTH);
        let ids = SIZE_IDS * id_width;
        let pooled = inputs.checked_sub(ids).filter(|pooled| *pooled > 0);
        if pooled.is_none() {
            let known = format!("numbers above {ids}, {SIZE_IDS} times addition_time_embed_dim");
            file.refuse(WIDTH, inputs, known);
        }
        Some(Self {
            pooled: pooled.unwrap_or(1),
            id_width,
        })
    }
}

/// Height and width of latents: one number for both, or two.
#[derive(serde::Deserialize)]
#[serde(untagged, expecting = "expected an integer or two")]
enum SampleSize {
    Square(usize),
    Sides([usize; 2]),
}

impl UNetConfig {
    /// Reads `config.json` from a UNet's folder.
    ///
    /// # Errors
    /// When it can't be read or asks for something that coffey does not build; the key is named.
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        let file = ConfigFile::read_class(folder, &CLASS)?;
        refuse_unsupported(&file);
        let channels = file.levels(&[320, 640, 1280, 1280])?;
        let base = channels[0];
        let activation = file.activation("act_fn").unwrap_or(Activation::Silu);
        let width = match file.optional::<Number>("time_embedding_dim") {
            None => 4 * base,
            Some(_) => match file.whole("time_embedding_dim", 0, 0..=4 * range::WIDTH.end()) {
                0 => 4 * base,
                width => width,
            },
        };
        let resnet = ResnetConfig {
            norm: NormConfig {
                groups: file.groups(&channels),
                eps: file.real("norm_eps", 1e-5, range::EPS),
            },
            activation,
            time: Some(TimeConfig {
                width,
                scale_shift: scale_shift(&file),
            }),
            output_scale: 1.0,
        };
        let time = TimeEmbeddingConfig {
            flip_sin_to_cos: file.get("flip_sin_to_cos", true),
            freq_shift: freq_shift(&file, base),
            width,
            activation,
            post: file.activation("timestep_post_act"),
            last: file.activation("time_embedding_act_fn"),
        };
        let config = Self {
            in_channels: file.whole("in_channels", 4, range::WIDTH),
            out_channels: file.whole("out_channels", 4, range::WIDTH),
            sample_size: sample_size(&file),
            cross_attention_dim: 0,
            time_cond_proj_dim: file
                .optional::<Number>("time_cond_proj_dim")
                .map(|_| file.whole("time_cond_proj_dim", 256, range::WIDTH)),
            down: Vec::new(),
            mid: None,
            up: Vec::new(),
            resnet,
            mid_scale: file.real("mid_block_scale_factor", 1.0, range::FACTOR),
            time,
            added: AddedConfig::read(&file),
            center_input: file.get("center_input_sample", false),
            conv_in_kernel: odd(&file, "conv_in_kernel"),
            conv_out_kernel: odd(&file, "conv_out_kernel"),
            downsample_padding: file.get("downsample_padding", 1),
            linear_projection: file.get("use_linear_projection", false),
            map: ConfigFile::only_keys_of(file.map.clone(), &CLASS),
        };
        let levels = Levels::read(&file, &channels);
        file.finish(levels.map(|levels| Self {
            cross_attention_dim: levels.cross_attention_dim,
            down: levels.down,
            mid: levels.mid,
            up: levels.up,
            ..config
        }))
    }

    /// The same network with a guidance embedding of `width`, unless it has one: the student of a teacher.
    pub fn with_guidance_embedding(&self, width: usize) -> Self {
        let mut student = self.clone();
        let width = *student.time_cond_proj_dim.get_or_insert(width);
        student
            .map
            .insert("time_cond_proj_dim".into(), json!(width));
        student.map.shift_remove("_name_or_path");
        student
    }

    /// The keys of `config.json` in which the network of `other` is another one than this, apart from the guidance embedding; empty
    /// if it is the same, however the two are written.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let network = |config: &Self| Self {
            sample_size: [0; 2],
            time_cond_proj_dim: None,
            map: Map::new(),
            ..config.clone()
        };
        if network(self) == network(other) {
            return Vec::new();
        }
        let without_effect = ["sample_size", "time_cond_proj_dim"];
        let keys: BTreeSet<&String> = self.map.keys().chain(other.map.keys()).collect();
        let differs = |key: &&String| {
            let noted = key.starts_with('_') || without_effect.contains(&key.as_str());
            !noted && self.map.get(*key) != other.map.get(*key)
        };
        keys.into_iter().filter(differs).cloned().collect()
    }

    /// `config.json` as it is written.
    pub fn to_json(&self) -> &Map<String, Value> {
        &self.map
    }

    /// Width of the pooled text embedding, for a network that takes it together with size ids (SDXL).
    pub fn pooled_width(&self) -> Option<usize> {
        self.added.map(|added| added.pooled)
    }

    /// Channels of the first level: the width of the sinusoidal time embedding.
    pub fn base_channels(&self) -> usize {
        self.down.first().map_or(0, |level| level.channels)
    }

    /// Numbers of a head of attention, for each level that has attention.
    pub fn head_widths(&self) -> Vec<usize> {
        let levels = self.down.iter().chain(&self.mid).chain(&self.up);
        levels.filter_map(LevelConfig::head_width).collect()
    }
}

/// `sample_size`. Only a default for the size of samples.
fn sample_size(file: &ConfigFile) -> [usize; 2] {
    const KEY: &str = "sample_size";
    const SIDE: RangeInclusive<usize> = 1..=8192;
    let sides = match file.optional(KEY) {
        None => [64; 2],
        Some(SampleSize::Square(side)) => [side; 2],
        Some(SampleSize::Sides(sides)) => sides,
    };
    if let Some(side) = sides.iter().find(|side| !SIDE.contains(side)) {
        file.refuse_number(KEY, side, &SIDE);
    }
    sides
}

/// `freq_shift`, which is subtracted from half of the width of the sinusoidal embedding, a divisor.
fn freq_shift(file: &ConfigFile, width: usize) -> f64 {
    const KEY: &str = "freq_shift";
    let shift = file.real(KEY, 0.0, 0.0..=1.0);
    let half = width / 2;
    if half > 0 && half as f64 <= shift {
        file.refuse(KEY, shift, format!("numbers below {half}"));
    }
    shift
}

/// A kernel's size, which must be odd.
fn odd(file: &ConfigFile, key: &str) -> usize {
    let kernel = file.whole(key, 3, 1..=31);
    if kernel.is_multiple_of(2) {
        file.refuse(key, kernel, "an odd number");
    }
    kernel
}

/// Whether `resnet_time_scale_shift` is `scale_shift`.
fn scale_shift(file: &ConfigFile) -> bool {
    let key = "resnet_time_scale_shift";
    file.only(key, &[json!("default"), json!("scale_shift")]);
    file.get(key, "default".to_owned()) == "scale_shift"
}

/// Refuses keys that would change the numbers, unless they have diffusers' usual value.
///
/// `resnet_out_scale_factor`, `resnet_skip_time_act`, `cross_attention_norm`, `mid_block_only_cross_attention` and
/// `addition_embed_type_num_heads` pass: in diffusers the blocks that coffey builds do not read them. `upcast_attention` asks
/// for `f32`, in which attention is computed anyway.
fn refuse_unsupported(file: &ConfigFile) {
    for key in [
        "class_embed_type",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "num_attention_heads", // refused by diffusers, too
        "num_class_embeds",
    ] {
        file.only(key, &[]);
    }
    for (key, values) in [
        ("attention_type", &[json!("default")][..]),
        ("class_embeddings_concat", &[json!(false)]),
        ("downsample_padding", &[json!(0), json!(1)]),
        ("dropout", &[json!(0.0), json!(0)]),
        ("dual_cross_attention", &[json!(false)]),
        ("time_embedding_type", &[json!("positional")]),
    ] {
        file.only(key, values);
    }
}
