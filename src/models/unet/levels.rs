//! The levels of a UNet: blocks, attention heads and transformer layers at each resolution.

use std::ops::RangeInclusive;

use super::config::UNetConfig;
use crate::models::ModelError;
use crate::models::config::{ConfigFile, numbers, range};
use crate::models::transformer::TransformerConfig;
use crate::ops::Attention;

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

impl LevelConfig {
    /// Numbers of a head of attention; `None` without attention.
    pub(super) fn head_width(&self) -> Option<usize> {
        Some(self.channels / self.attention.as_ref()?.heads)
    }
}

impl UNetConfig {
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

/// The levels that a `config.json` describes.
pub(super) struct Levels {
    pub(super) down: Vec<LevelConfig>,
    pub(super) mid: Option<LevelConfig>,
    pub(super) up: Vec<LevelConfig>,
    pub(super) cross_attention_dim: usize,
}

impl Levels {
    pub(super) fn read(file: &ConfigFile, channels: &[usize]) -> Result<Self, ModelError> {
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
