//! Which implementation computes each operation on a device, for people: what [`ops`](super) chooses by device and shape.

use candle_core::Device;

use super::Attention;

/// The attention of a network.
#[derive(Clone, Debug)]
pub struct NetworkAttention {
    /// The network, as messages name it.
    pub network: &'static str,
    /// Implementation that is asked for.
    pub kind: Attention,
    /// Numbers of a head, each width once. Empty in a network without attention.
    pub widths: Vec<usize>,
}

/// How a device other than the CPU computes the operations of `networks`, and of a training step with `optimizer`.
pub fn describe(device: &Device, networks: &[NetworkAttention], optimizer: bool) -> Option<String> {
    if device.is_cpu() {
        return None;
    }
    #[cfg(feature = "cuda")]
    let widest = device.is_cuda().then_some(super::cuda::WIDEST_HEAD);
    #[cfg(not(feature = "cuda"))]
    let widest = None;
    Some(description(widest, networks, optimizer))
}

/// [`describe`] for kernels that take heads of up to `widest` numbers, or for none.
fn description(widest: Option<usize>, networks: &[NetworkAttention], optimizer: bool) -> String {
    let mut parts: Vec<String> = networks
        .iter()
        .flat_map(|network| attention(widest, network))
        .collect();
    let rest = if optimizer {
        "norms, activations and optimiser"
    } else {
        "norms and activations"
    };
    let by = match widest {
        Some(_) => "coffey's kernels",
        None => "tensor operations",
    };
    parts.push(format!("{rest} by {by}"));
    parts.push(if cfg!(feature = "cudnn") {
        "convolutions by cuDNN".to_owned()
    } else {
        "convolutions as matrix products (this binary was built without cuDNN)".to_owned()
    });
    parts.push("products by cuBLAS".to_owned());
    parts.join(", ")
}

/// The parts of a description for a network's attention: one for the heads that the kernels take, one for the others.
fn attention(widest: Option<usize>, network: &NetworkAttention) -> Vec<String> {
    let NetworkAttention {
        network,
        kind,
        widths,
    } = network;
    let heads = |widths: &[usize]| {
        let widths: Vec<String> = widths.iter().map(usize::to_string).collect();
        format!(
            "attention of the {network} (heads of {})",
            widths.join(", ")
        )
    };
    let mut widths = widths.clone();
    widths.sort_unstable();
    widths.dedup();
    if widths.is_empty() {
        return Vec::new();
    }
    let all = heads(&widths);
    let Some(widest) = widest.filter(|_| *kind != Attention::Plain) else {
        return vec![match kind {
            Attention::Plain => format!("{all} with all scores in memory"),
            Attention::MemoryEfficient => format!("{all} by tensor operations"),
        }];
    };
    let (narrow, wide): (Vec<_>, Vec<_>) = widths.into_iter().partition(|&width| width <= widest);
    let mut parts = Vec::new();
    if !narrow.is_empty() {
        parts.push(format!("{} by coffey's kernels", heads(&narrow)));
    }
    if !wide.is_empty() {
        parts.push(format!(
            "{} by cuBLAS and tensor operations (coffey's kernels take heads of up to {widest})",
            heads(&wide)
        ));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::WIDEST_HEAD;

    fn network(network: &'static str, widths: &[usize]) -> NetworkAttention {
        NetworkAttention {
            network,
            kind: Attention::MemoryEfficient,
            widths: widths.to_vec(),
        }
    }

    /// A description without the convolutions, which depend on the build.
    fn described(widest: Option<usize>, networks: &[NetworkAttention], optimizer: bool) -> String {
        let text = description(widest, networks, optimizer);
        let (text, _) = text.split_once(", convolutions").unwrap();
        text.to_owned()
    }

    #[test]
    fn wide_heads_are_said_to_have_no_kernel() {
        let text = described(
            Some(WIDEST_HEAD),
            &[network("text encoder", &[64]), network("VAE", &[512])],
            false,
        );
        assert_eq!(
            text,
            "attention of the text encoder (heads of 64) by coffey's kernels, attention of the VAE (heads of 512) by cuBLAS and \
             tensor operations (coffey's kernels take heads of up to 160), norms and activations by coffey's kernels"
        );
    }

    #[test]
    fn each_width_of_a_network_is_told_once() {
        let text = described(
            Some(WIDEST_HEAD),
            &[network("UNet", &[40, 320, 160, 40])],
            true,
        );
        assert_eq!(
            text,
            "attention of the UNet (heads of 40, 160) by coffey's kernels, attention of the UNet (heads of 320) by cuBLAS and \
             tensor operations (coffey's kernels take heads of up to 160), norms, activations and optimiser by coffey's kernels"
        );
    }

    #[test]
    fn plain_attention_and_absent_kernels_are_told() {
        let plain = NetworkAttention {
            kind: Attention::Plain,
            ..network("UNet", &[40])
        };
        let text = described(Some(WIDEST_HEAD), &[plain], true);
        assert!(
            text.starts_with("attention of the UNet (heads of 40) with all scores in memory, "),
            "{text}"
        );
        let text = described(None, &[network("UNet", &[40])], true);
        assert_eq!(
            text,
            "attention of the UNet (heads of 40) by tensor operations, norms, activations and optimiser by tensor operations"
        );
    }

    #[test]
    fn networks_without_attention_are_left_out() {
        let text = described(Some(WIDEST_HEAD), &[network("VAE", &[])], false);
        assert_eq!(text, "norms and activations by coffey's kernels");
    }

    #[test]
    fn the_cpu_is_not_described() {
        assert_eq!(
            describe(&Device::Cpu, &[network("UNet", &[40])], true),
            None
        );
    }
}
