//! Estimate of a UNet's activations.

use serde_json::{Map, Value};

/// Feature maps that a residual block keeps for the backward pass: its norms, activations, convolutions and concatenated
/// input.
const KEPT_BY_RESNET: u128 = 9;
/// Feature maps that a transformer block keeps, including its four times wider gated feed-forward.
const KEPT_BY_TRANSFORMER: u128 = 28;
/// Matrices that plain attention keeps: the scores and their softmax.
const KEPT_SCORES: u128 = 2;
/// Feature maps that a block keeps under activation checkpointing: its input and its result.
const KEPT_TO_RECOMPUTE: u128 = 2;
/// Tokens of a caption.
pub(super) const TEXT_TOKENS: u64 = 77;

/// Which activations of a forward pass are in memory together.
#[derive(Clone, Copy)]
pub(super) struct Held {
    /// The whole matrices of attention scores.
    pub(super) scores: bool,
    /// The results inside all blocks; `false`: of one block at a time (activation checkpointing, or no backward pass).
    pub(super) inside_blocks: bool,
}

/// Estimate of the numbers that the forward pass of one latent of `height` and `width` holds, from shapes alone.
pub(super) fn activations(unet: &Map<String, Value>, [height, width]: [u64; 2], kept: Held) -> u64 {
    let number = |key: &str| unet.get(key).and_then(Value::as_u64);
    let list = |key: &str| unet.get(key).and_then(Value::as_array);
    let channels: Vec<u64> = match list("block_out_channels") {
        Some(channels) => channels.iter().filter_map(Value::as_u64).collect(),
        None => vec![320, 640, 1280, 1280],
    };
    let layers = u128::from(number("layers_per_block").unwrap_or(2));
    let crosses = |key: &str, level: usize, default: bool| {
        let name = list(key)
            .and_then(|types| types.get(level))
            .and_then(Value::as_str);
        name.map_or(default, |name| name.starts_with("CrossAttn"))
    };
    let heads = |level: usize| {
        let value = ["num_attention_heads", "attention_head_dim"]
            .into_iter()
            .find_map(|key| unet.get(key).filter(|v| !v.is_null()));
        let of_level =
            value.and_then(|v| v.as_u64().or_else(|| v.get(level).and_then(Value::as_u64)));
        u128::from(of_level.unwrap_or(8))
    };
    // Layers of each transformer of a level; the most, where they differ.
    let depth = |level: usize| {
        let depths = unet.get("transformer_layers_per_block");
        let of_level = depths.and_then(|v| v.as_array().map_or(Some(v), |each| each.get(level)));
        let most = of_level.and_then(|v| match v.as_array() {
            Some(each) => each.iter().filter_map(Value::as_u64).max(),
            None => v.as_u64(),
        });
        u128::from(most.unwrap_or(1))
    };
    let last = channels.len().saturating_sub(1);
    let level_numbers = |(level, &channels): (usize, &u64)| {
        let channels = u128::from(channels);
        let deepest = u128::from(level == last);
        let pixels = u128::from(height >> level) * u128::from(width >> level);
        let resnets = 2 * layers + 1 + 2 * deepest;
        let down = u128::from(crosses("down_block_types", level, level != last));
        let up = u128::from(crosses("up_block_types", last - level, level != last));
        let transformers = down * layers + up * (layers + 1) + deepest;
        let scores = if kept.scores {
            KEPT_SCORES * heads(level) * (pixels + u128::from(TEXT_TOKENS))
        } else {
            0
        };
        let resnet = pixels * channels * KEPT_BY_RESNET;
        let layer = pixels * (channels * KEPT_BY_TRANSFORMER + scores);
        let transformer = layer * depth(level);
        let ends = pixels * channels * KEPT_TO_RECOMPUTE * (resnets + transformers);
        let largest = if transformers > 0 {
            transformer
        } else {
            resnet
        };
        if kept.inside_blocks {
            (resnet * resnets + transformer * transformers, 0)
        } else {
            (ends, largest)
        }
    };
    let levels: Vec<(u128, u128)> = channels.iter().enumerate().map(level_numbers).collect();
    let kept: u128 = levels.iter().map(|(kept, _)| kept).sum();
    let largest = levels.iter().map(|&(_, largest)| largest).max();
    u64::try_from(kept + largest.unwrap_or(0)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn activations_of_stable_diffusion_are_gigabytes() {
        let config = json!({
            "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        });
        let all = Held {
            scores: true,
            inside_blocks: true,
        };
        let numbers = activations(config.as_object().unwrap(), [64; 2], all);
        // At 512 pixels the scores of the first level alone, 5 blocks of 8 heads over 4096 pixels, are 5.4 GB.
        assert!((6e9..11e9).contains(&(4.0 * numbers as f64)), "{numbers}");
        let defaults = |side, kept| activations(&Map::new(), [side; 2], kept);
        assert_eq!(numbers, defaults(64, all));
        assert!(defaults(32, all) * 4 < numbers);
        let efficient = Held {
            scores: false,
            ..all
        };
        let recomputed = Held {
            inside_blocks: false,
            ..efficient
        };
        assert!(defaults(64, efficient) * 2 < numbers);
        assert!(defaults(64, recomputed) * 5 < defaults(64, efficient));
    }

    #[test]
    fn activations_count_every_layer_of_a_transformer() {
        let with = |depths: Value| {
            let config = json!({"transformer_layers_per_block": depths});
            let held = Held {
                scores: false,
                inside_blocks: true,
            };
            activations(config.as_object().unwrap(), [64; 2], held)
        };
        assert_eq!(with(json!(1)), with(json!([1, 1, 1, 1])));
        assert!(with(json!([1, 2, 10, 1])) > with(json!([1, 2, 1, 1])));
        assert_eq!(with(json!([1, 2, [10, 3], 1])), with(json!([1, 2, 10, 1])));
    }

    #[test]
    fn activations_beyond_integers_are_the_largest() {
        let config = json!({"block_out_channels": [65536], "layers_per_block": 1000, "attention_head_dim": 65536});
        let all = Held {
            scores: true,
            inside_blocks: true,
        };
        assert_eq!(
            activations(config.as_object().unwrap(), [1 << 16; 2], all),
            u64::MAX
        );
    }
}
