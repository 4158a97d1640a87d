//! A UNet's `config.json`: which network it describes, with diffusers' meaning and defaults.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Number, Value, json};

use crate::models::activation::Activation;
use crate::models::blocks::{NormConfig, ResnetConfig, TimeConfig};
use crate::models::config::{Class, ConfigFile, range};
use crate::models::transformer::TransformerConfig;
use crate::models::{ModelError, numbers};
use crate::ops::Attention;

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
    pub(super) center_input: bool,
    pub(super) conv_in_kernel: usize,
    pub(super) conv_out_kernel: usize,
    pub(super) downsample_padding: usize,
    linear_projection: bool,
    map: Map<String, Value>,
}

/// The blocks at one resolution, on the way down, in the middle or on the way up.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LevelConfig {
    pub(super) channels: usize,
    pub(super) resnets: usize,
    attention: Option<AttentionConfig>,
}

/// The transformers of a level.
#[derive(Clone, Debug, PartialEq)]
struct AttentionConfig {
    heads: usize,
    /// Layers of each transformer, in order.
    depths: Vec<usize>,
    only_cross: bool,
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

/// One value for all levels or a list with one for each.
#[derive(serde::Deserialize)]
#[serde(
    untagged,
    expecting = "expected one value or a list with one for each level"
)]
enum PerLevel<T> {
    Each(Vec<T>), // first: a depth is a list, too
    One(T),
}

/// Layers of a level's transformers: of all of them, or of each.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(untagged, expecting = "expected an integer or a list of them")]
enum Depth {
    Same(usize),
    Each(Vec<usize>),
}

impl Depth {
    /// The layers of the first `count` transformers; `None` if the list is too short.
    fn of(&self, count: usize) -> Option<Vec<usize>> {
        match self {
            Self::Same(n) => Some(vec![*n; count]),
            Self::Each(each) => each.get(..count).map(<[usize]>::to_vec),
        }
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

    /// Channels of the first level: the width of the sinusoidal time embedding.
    pub fn base_channels(&self) -> usize {
        self.down.first().map_or(0, |level| level.channels)
    }

    /// Numbers of a head of attention, for each level that has attention.
    pub fn head_widths(&self) -> Vec<usize> {
        let levels = self.down.iter().chain(&self.mid).chain(&self.up);
        levels
            .filter_map(|level| Some(level.channels / level.attention.as_ref()?.heads))
            .collect()
    }

    /// The transformers of a level, one after each of its first residual blocks; none in a plain level.
    pub(super) fn transformers(
        &self,
        level: &LevelConfig,
        attention: Attention,
    ) -> Vec<TransformerConfig> {
        let Some(AttentionConfig {
            heads,
            depths,
            only_cross,
        }) = &level.attention
        else {
            return Vec::new();
        };
        let transformer = |&layers: &usize| TransformerConfig {
            channels: level.channels,
            width: heads * (level.channels / heads),
            heads: *heads,
            layers,
            cross_attention_dim: self.cross_attention_dim,
            only_cross_attention: *only_cross,
            groups: self.resnet.norm.groups,
            linear_projection: self.linear_projection,
            attention,
        };
        depths.iter().map(transformer).collect()
    }
}

/// The levels that a `config.json` describes.
struct Levels {
    down: Vec<LevelConfig>,
    mid: Option<LevelConfig>,
    up: Vec<LevelConfig>,
    cross_attention_dim: usize,
}

impl Levels {
    fn read(file: &ConfigFile, channels: &[usize]) -> Result<Self, ModelError> {
        let levels = channels.len();
        let last = levels - 1;
        let layers = numbers_per_level(file, "layers_per_block", 2, levels, range::LAYERS)?;
        // In diffusers the key attention_head_dim holds the number of heads.
        let heads = numbers_per_level(
            file,
            "attention_head_dim",
            8,
            levels,
            0..=*range::WIDTH.end(),
        )?;
        let only_cross = per_level(file, "only_cross_attention", false, levels)?;
        let widths = numbers_per_level(file, "cross_attention_dim", 1280, levels, range::WIDTH)?;
        let depths = per_level(file, "transformer_layers_per_block", Depth::Same(1), levels)?;
        let up_depths = match file.optional::<Vec<Depth>>("reverse_transformer_layers_per_block") {
            Some(depths) if depths.len() == levels => depths,
            Some(depths) => {
                let (found, needed) = (format!("{} entries", depths.len()), format!("{levels}"));
                let key = "reverse_transformer_layers_per_block";
                return Err(file.unsupported(key, found, needed));
            }
            None if depths.iter().any(|d| matches!(d, Depth::Each(_))) => {
                return Err(file.invalid(
                    "\"transformer_layers_per_block\" with lists in it needs \"reverse_transformer_layers_per_block\""
                        .to_owned(),
                ));
            }
            None => depths.iter().rev().cloned().collect(),
        };
        let attention = |level: usize, count: usize, depth: &Depth, key: &str, only_cross| {
            if heads[level] == 0 || heads[level] > channels[level] {
                let known = format!("a number of heads from 1 to {} channels", channels[level]);
                return Err(file.unsupported("attention_head_dim", heads[level], known));
            }
            let depths = depth
                .of(count)
                .filter(|depths| depths.iter().all(|n| range::LAYERS.contains(n)));
            let Some(depths) = depths else {
                let known = format!(
                    "{} or {count} of them for the level's {count} blocks",
                    numbers(&range::LAYERS)
                );
                return Err(file.unsupported(key, format!("{depth:?}"), known));
            };
            Ok(AttentionConfig {
                heads: heads[level],
                depths,
                only_cross,
            })
        };

        let (cross, plain) = ("CrossAttnDownBlock2D", "DownBlock2D");
        let default = [cross, cross, cross, plain];
        let down_types = block_types(file, "down_block_types", cross, plain, &default, levels)?;
        let (cross, plain) = ("CrossAttnUpBlock2D", "UpBlock2D");
        let default = [plain, cross, cross, cross];
        let up_types = block_types(file, "up_block_types", cross, plain, &default, levels)?;

        const DEPTHS: &str = "transformer_layers_per_block";
        let mut attended = Vec::new();
        let mut down = Vec::with_capacity(levels);
        for level in 0..levels {
            let resnets = layers[level];
            let attention = down_types[level]
                .then(|| attention(level, resnets, &depths[level], DEPTHS, only_cross[level]))
                .transpose()?;
            attended.extend(attention.is_some().then_some(widths[level]));
            down.push(LevelConfig {
                channels: channels[level],
                resnets,
                attention,
            });
        }
        let mid_type = if file.is_null("mid_block_type") {
            None
        } else {
            Some(file.get("mid_block_type", "UNetMidBlock2DCrossAttn".to_owned()))
        };
        let mid = match mid_type.as_deref() {
            None => None,
            Some("UNetMidBlock2DCrossAttn") => {
                attended.push(widths[last]);
                // diffusers' class of the middle does not take only_cross_attention.
                Some((2, Some(attention(last, 1, &depths[last], DEPTHS, false)?)))
            }
            Some("UNetMidBlock2D") => Some((1, None)),
            Some(other) => {
                return Err(file.unsupported(
                    "mid_block_type",
                    format!("\"{other}\""),
                    "\"UNetMidBlock2DCrossAttn\", \"UNetMidBlock2D\", null",
                ));
            }
        };
        let mid = mid.map(|(resnets, attention)| LevelConfig {
            channels: channels[last],
            resnets,
            attention,
        });
        let mut up = Vec::with_capacity(levels);
        for i in 0..levels {
            let level = last - i;
            let resnets = layers[level] + 1;
            let key = "reverse_transformer_layers_per_block";
            let attention = up_types[i]
                .then(|| attention(level, resnets, &up_depths[i], key, only_cross[level]))
                .transpose()?;
            attended.extend(attention.is_some().then_some(widths[level]));
            up.push(LevelConfig {
                channels: channels[level],
                resnets,
                attention,
            });
        }
        let cross_attention_dim = attended.first().copied().unwrap_or(widths[0]);
        if attended.iter().any(|&width| width != cross_attention_dim) {
            return Err(file.unsupported(
                "cross_attention_dim",
                format!("{widths:?}"),
                "one width for all levels with attention: they all look at the same text embeddings",
            ));
        }
        Ok(Self {
            down,
            mid,
            up,
            cross_attention_dim,
        })
    }
}

/// A key's value for each level.
fn per_level<T: Clone + serde::de::DeserializeOwned>(
    file: &ConfigFile,
    key: &str,
    default: T,
    levels: usize,
) -> Result<Vec<T>, ModelError> {
    match file.get(key, PerLevel::One(default)) {
        PerLevel::One(value) => Ok(vec![value; levels]),
        PerLevel::Each(each) if each.len() == levels => Ok(each),
        PerLevel::Each(each) => Err(file.unsupported(
            key,
            format!("a list of {}", each.len()),
            format!("one value or {levels} of them, as many as block_out_channels"),
        )),
    }
}

/// A key's number in `range` for each level.
fn numbers_per_level(
    file: &ConfigFile,
    key: &str,
    default: usize,
    levels: usize,
    range: RangeInclusive<usize>,
) -> Result<Vec<usize>, ModelError> {
    let each = per_level(file, key, default, levels)?;
    match each.iter().find(|number| !range.contains(number)) {
        Some(number) => Err(file.unsupported(key, number, numbers(&range))),
        None => Ok(each),
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

/// For each level, whether its block type is `cross` and not `plain`.
fn block_types(
    file: &ConfigFile,
    key: &str,
    cross: &str,
    plain: &str,
    default: &[&str],
    levels: usize,
) -> Result<Vec<bool>, ModelError> {
    let types: Vec<String> = file.get(key, default.iter().map(|&t| t.to_owned()).collect());
    if types.len() != levels {
        let wanted = format!("{levels} block types, as many as block_out_channels");
        return Err(file.unsupported(key, format!("{types:?}"), wanted));
    }
    let known = |block: String| match block {
        block if block == cross => Ok(true),
        block if block == plain => Ok(false),
        block => Err(file.unsupported(
            key,
            format!("\"{block}\""),
            format!("\"{cross}\", \"{plain}\""),
        )),
    };
    types.into_iter().map(known).collect()
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
        "addition_embed_type",
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
