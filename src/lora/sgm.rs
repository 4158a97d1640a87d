//! Names of a UNet's modules in Stable Diffusion's original layout (`input_blocks`, `middle_block`, `output_blocks`).

/// Parts of a residual block, in diffusers and in the original layout.
const RESNET: [(&str, &str); 4] = [
    ("conv1", "in_layers.2"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
];

/// Modules outside the blocks, in diffusers and in the original layout.
const OUTER: [(&str, &str); 6] = [
    ("conv_in", "input_blocks.0.0"),
    ("conv_out", "out.2"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
];

/// The original name of the module with the diffusers name `module`, of a UNet whose levels have equally many layers; `None` if it has
/// none. `exists` tells whether the UNet has a module. As `_maybe_map_sgm_blocks_to_diffusers` of diffusers, in the other direction.
pub(super) fn original_name(module: &str, exists: impl Fn(&str) -> bool) -> Option<String> {
    if let Some((_, original)) = OUTER.iter().find(|(name, _)| *name == module) {
        return Some((*original).to_owned());
    }
    let (block, rest) = module.split_once('.')?;
    if block == "mid_block" {
        return in_middle(rest);
    }
    let (level, rest) = number(rest)?;
    let (part, rest) = rest.split_once('.')?;
    let (layer, rest) = number(rest)?;
    let layers = |block: &str| {
        let is_layer = |n: &usize| exists(&format!("{block}.0.resnets.{n}.conv1"));
        (0..).take_while(is_layer).count()
    };
    match (block, part) {
        ("down_blocks", "downsamplers") => {
            let index = (level + 1) * (layers(block) + 1);
            (rest == "conv").then(|| format!("input_blocks.{index}.0.op"))
        }
        ("down_blocks", _) => {
            let index = 1 + level * (layers(block) + 1) + layer;
            in_layer("input_blocks", index, part, rest)
        }
        ("up_blocks", "upsamplers") => {
            let layers = layers(block);
            let index = (level + 1) * layers - 1;
            let attended = exists(&format!("up_blocks.{level}.attentions.0.proj_in"));
            let place = 1 + usize::from(attended);
            Some(format!("output_blocks.{index}.{place}.{rest}"))
        }
        ("up_blocks", _) => in_layer("output_blocks", level * layers(block) + layer, part, rest),
        _ => None,
    }
}

/// The name of a module of the middle block: a residual block, a transformer, a residual block.
fn in_middle(rest: &str) -> Option<String> {
    let (part, rest) = rest.split_once('.')?;
    let (layer, rest) = number(rest)?;
    match part {
        "resnets" => Some(format!("middle_block.{}.{}", 2 * layer, in_resnet(rest)?)),
        "attentions" => Some(format!("middle_block.{}.{rest}", 2 * layer + 1)),
        _ => None,
    }
}

/// The name of a module of a layer: a residual block, and a transformer after it.
fn in_layer(blocks: &str, index: usize, part: &str, rest: &str) -> Option<String> {
    match part {
        "resnets" => Some(format!("{blocks}.{index}.0.{}", in_resnet(rest)?)),
        "attentions" => Some(format!("{blocks}.{index}.1.{rest}")),
        _ => None,
    }
}

fn in_resnet(module: &str) -> Option<&'static str> {
    let part = RESNET.iter().find(|(name, _)| *name == module);
    part.map(|(_, original)| *original)
}

/// The number that a text begins with, up to a dot, and the rest.
fn number(text: &str) -> Option<(usize, &str)> {
    let (number, rest) = text.split_once('.')?;
    Some((number.parse().ok()?, rest))
}
