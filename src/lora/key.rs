//! Names of tensors in LoRA files, in all layouts that are read.

/// The part of an adapter that a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum AdapterTensor {
    Down,
    Up,
    Alpha,
}

impl AdapterTensor {
    /// The part, for messages.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Down => "its A (lora_A or lora_down)",
            Self::Up => "its B (lora_B or lora_up)",
            Self::Alpha => "its alpha",
        }
    }
}

/// The meaning of a tensor's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// A part of the adapter of a module with this diffusers name.
    Module(String, AdapterTensor),
    /// The same with the module's name in kohya's layout.
    Kohya(String, AdapterTensor),
    /// A part of an adapter of a text encoder.
    TextEncoder,
    /// Something else: what it is, as the end of a message.
    Other(&'static str),
}

/// Ends of names, and the parts they are of.
const ENDS: [(&str, AdapterTensor); 11] = [
    // PEFT and diffusers
    (".lora_A.weight", AdapterTensor::Down),
    (".lora_B.weight", AdapterTensor::Up),
    // PEFT's state_dict(), with the name of its adapter
    (".lora_A.default.weight", AdapterTensor::Down),
    (".lora_B.default.weight", AdapterTensor::Up),
    // kohya-ss
    (".lora_down.weight", AdapterTensor::Down),
    (".lora_up.weight", AdapterTensor::Up),
    (".alpha", AdapterTensor::Alpha),
    // diffusers before PEFT
    (".lora.down.weight", AdapterTensor::Down),
    (".lora.up.weight", AdapterTensor::Up),
    // the attention processors of older diffusers
    ("_lora.down.weight", AdapterTensor::Down),
    ("_lora.up.weight", AdapterTensor::Up),
];

/// Marks of adapters of other kinds.
const OTHERS: [(&str, &str); 8] = [
    (
        "hada_",
        "is of a LoHa adapter (LyCORIS), and only LoRA is read",
    ),
    (
        "lokr_",
        "is of a LoKr adapter (LyCORIS), and only LoRA is read",
    ),
    (
        "lora_mid.",
        "is of a convolution in three factors (LyCORIS), and only LoRA of two factors is read",
    ),
    ("dora_scale", "is of a DoRA adapter, and only LoRA is read"),
    (
        "lora_magnitude_vector",
        "is of a DoRA adapter, and only LoRA is read",
    ),
    (
        "lora_B.bias",
        "is a bias of an adapter, and only LoRA without bias is read",
    ),
    (
        ".diff",
        "is a difference of whole weights, and only LoRA is read",
    ),
    ("to_k_ip", "is of an IP-Adapter and not of a LoRA"),
];

impl Key {
    /// Reads a tensor's name.
    pub(super) fn parse(name: &str) -> Self {
        if name.starts_with("lora_te") || name.starts_with("text_encoder") {
            return Self::TextEncoder;
        }
        if let Some((_, what)) = OTHERS.iter().find(|(mark, _)| name.contains(mark)) {
            return Self::Other(what);
        }
        let found = ENDS
            .iter()
            .find_map(|(end, part)| Some((name.strip_suffix(end)?, *end, *part)));
        let Some((module, end, part)) = found else {
            return Self::Other(
                "is no part of a LoRA: names end in lora_A.weight and lora_B.weight (diffusers, PEFT), or in lora_down.weight, \
                 lora_up.weight and alpha (kohya)",
            );
        };
        if let Some(module) = module.strip_prefix("lora_unet_") {
            return Self::Kohya(module.to_owned(), part);
        }
        let module = module.strip_prefix("unet.").unwrap_or(module);
        let module = module.strip_prefix("base_model.model.").unwrap_or(module);
        let module = match end.starts_with('_') {
            false => module.to_owned(),
            true => {
                let module = module.replace(".processor.", ".");
                match module.ends_with(".to_out") {
                    true => module + ".0",
                    false => module,
                }
            }
        };
        Self::Module(module, part)
    }
}
