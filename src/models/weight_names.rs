//! Names of tensors as other programs write them: wrappers that are removed, and names that tell what a file is.

use std::borrow::Cow;

/// Modules that PyTorch's wrappers put into a name at any depth: `torch.compile`, FSDP, activation checkpointing.
const WRAPPERS: [&str; 3] = [
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
];
/// The module that `DataParallel` and `DistributedDataParallel` put before all names.
const PARALLEL: &str = "module.";

/// A tensor's name without the modules of PyTorch's wrappers, which no model of diffusers or transformers has.
pub(super) fn unwrapped(name: &str) -> Cow<'_, str> {
    let mut name = Cow::Borrowed(name);
    for wrapper in WRAPPERS {
        let inner = format!(".{wrapper}");
        if name.starts_with(wrapper) || name.contains(&inner) {
            let rest = name.strip_prefix(wrapper).unwrap_or(&name);
            name = Cow::Owned(rest.replace(&inner, "."));
        }
    }
    match name.strip_prefix(PARALLEL) {
        Some(rest) => Cow::Owned(unwrapped(rest).into_owned()),
        None => name,
    }
}

/// Marks in the names of tensors, and what a file with such a tensor is.
const MARKS: &[(&[&str], &str)] = &[
    (
        &[".base_layer.", "base_model.model."],
        "a model with a LoRA of PEFT that is not merged; save it again after merge_and_unload(), or after fuse_lora() and \
         unload_lora_weights() of the pipeline",
    ),
    (
        &[
            "lora_A.",
            "lora_B.",
            ".lora.down.",
            ".lora.up.",
            "lora_down.",
            "lora_up.",
            "lora_unet_",
            "lora_te",
        ],
        "a LoRA and not a model; give the model that it belongs to, or the UNet that `coffey export MODEL --lora FILE --merge` writes",
    ),
    (
        &[
            "model.diffusion_model.",
            "first_stage_model.",
            "cond_stage_model.",
            "input_blocks.",
            "output_blocks.",
        ],
        "a checkpoint in Stable Diffusion's original layout; convert it in Python: \
         StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)",
    ),
    (
        &["controlnet_cond_embedding.", "controlnet_down_blocks."],
        "a ControlNet and not a UNet; give the model that it was made for",
    ),
    (
        &[".absmax", ".quant_map", ".SCB", ".qweight"],
        "a quantised model; give the model that it was made from",
    ),
    (
        &["add_embedding."],
        "the UNet of an SDXL model, which coffey does not train",
    ),
    (
        &["motion_modules."],
        "a motion model (AnimateDiff), which coffey does not train",
    ),
];

/// What a file is by the names of its tensors, as the end of a message; empty if they tell nothing. `missing` is the tensor that was
/// looked for.
pub(super) fn explain<'a>(
    names: impl Iterator<Item = &'a str> + Clone,
    missing: Option<&str>,
) -> String {
    for (marks, what) in MARKS {
        let marked = |name: &&str| marks.iter().any(|mark| name.contains(mark));
        if let Some(name) = names.clone().find(marked) {
            return format!("; by the name of its tensor \"{name}\" the file is {what}");
        }
    }
    let prefix = missing.and_then(|missing| {
        let mut prefixes = names.filter_map(|name| name.strip_suffix(missing));
        prefixes.find(|prefix| prefix.ends_with('.'))
    });
    prefix.map_or_else(String::new, |prefix| {
        format!(
            "; the file's names have the prefix \"{prefix}\": save this part of the model by itself, with its own save_pretrained"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_removed_from_names() {
        for (name, plain) in [
            ("conv_in.weight", "conv_in.weight"),
            ("_orig_mod.conv_in.weight", "conv_in.weight"),
            ("module.conv_in.weight", "conv_in.weight"),
            ("module._orig_mod.conv_in.weight", "conv_in.weight"),
            ("_orig_mod.module.conv_in.weight", "conv_in.weight"),
            (
                "mid_block._orig_mod.resnets.0.conv1.bias",
                "mid_block.resnets.0.conv1.bias",
            ),
            ("_fsdp_wrapped_module.a._fsdp_wrapped_module.b", "a.b"),
            ("a._checkpoint_wrapped_module.b", "a.b"),
            ("unet.conv_in.weight", "unet.conv_in.weight"),
            ("a.module.b", "a.module.b"),
        ] {
            assert_eq!(unwrapped(name), plain, "{name}");
        }
    }

    #[test]
    fn names_tell_what_a_file_is() {
        for (names, words) in [
            (
                &["a.to_q.base_layer.weight", "a.to_q.lora_A.default.weight"][..],
                &["base_layer", "merge_and_unload"][..],
            ),
            (&["unet.a.lora_A.weight"], &["a LoRA and not a model"]),
            (
                &["lora_unet_down_blocks_0.alpha"],
                &["a LoRA and not a model"],
            ),
            (
                &["model.diffusion_model.input_blocks.0.0.weight"],
                &["from_single_file"],
            ),
            (
                &["a", "controlnet_cond_embedding.conv_in.bias"],
                &["ControlNet"],
            ),
            (&["a.weight", "a.weight.absmax"], &["quantised"]),
            (&["unet.b", "unet.conv_in.weight"], &["prefix \"unet.\""]),
        ] {
            let said = explain(names.iter().copied(), Some("conv_in.weight"));
            for word in words {
                assert!(said.contains(word), "{names:?}: {word:?}? {said}");
            }
        }
        assert_eq!(
            explain(
                ["conv_in.bias", "aconv_in.weight"].into_iter(),
                Some("conv_in.weight")
            ),
            ""
        );
    }
}
