//! Names and sizes of the files of SD-1.5 and SDXL.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::lora::modules::kohya_name;
use crate::lora::*;

/// Modules of a real UNet: all, and those that the reference's scripts train.
fn real_modules(name: &str) -> (Modules, Modules) {
    type Shapes = BTreeMap<String, Vec<usize>>;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/lora_modules.json");
    let text = std::fs::read_to_string(path).unwrap();
    let mut golden: BTreeMap<String, BTreeMap<String, Shapes>> =
        serde_json::from_str(&text).unwrap();
    let golden = golden.remove(name).unwrap();
    let modules = |parts: &[&str]| -> Modules {
        let shapes = parts.iter().flat_map(|part| golden[*part].clone());
        shapes
            .map(|(module, shape)| (module + ".weight", shape))
            .collect()
    };
    (modules(&["trained", "others"]), modules(&["trained"]))
}

#[derive(Default)]
struct Counted(u64);

impl std::io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sizes of published files: 134,621,556 bytes is that of `latent-consistency/lcm-lora-sdv1-5`.
#[test]
fn files_have_the_size_of_published_ones() {
    let (kohya, peft) = (Layout::Kohya(None), Layout::Diffusers);
    for (name, count, sizes) in [
        (
            "sd15",
            278,
            vec![
                (kohya, DType::F16, 134_621_556),
                (
                    Layout::Kohya(Some(BaseVersion::Sd1)),
                    DType::F16,
                    134_621_556,
                ),
                (kohya, DType::F32, 269_127_096),
                (peft, DType::F32, 269_086_392),
                (peft, DType::F16, 134_581_584),
            ],
        ),
        (
            "sdxl",
            788,
            vec![
                (kohya, DType::F16, 393_854_624),
                (kohya, DType::F32, 787_359_648),
                (peft, DType::F32, 787_237_464),
                (peft, DType::F16, 393_734_256),
            ],
        ),
    ] {
        let (_, modules) = real_modules(name);
        assert_eq!(modules.iter().count(), count);
        let zeros = modules.iter().map(|(module, shape)| {
            // Views of one number: the tensors take no memory.
            let view = |shape: &[usize]| {
                let zero = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
                zero.broadcast_as(shape).unwrap()
            };
            let ones = vec![1; shape.len() - 2];
            let adapter = Adapter {
                down: view(&[&[64], &shape[1..]].concat()),
                up: view(&[&[shape[0], 64], &ones[..]].concat()),
                alpha: 64.0,
            };
            (module.to_owned(), adapter)
        });
        let lora = Lora {
            adapters: zeros.collect(),
        };
        for (layout, dtype, bytes) in sizes {
            let mut counted = Counted::default();
            let contents = lora.contents(layout, dtype).unwrap();
            contents.write(&mut counted).unwrap();
            assert_eq!(counted.0, bytes, "{name} {layout:?} {dtype:?}");
        }
    }
}

#[test]
fn kohya_names_are_of_one_module_each() {
    for name in ["sd15", "sdxl"] {
        let (modules, trained) = real_modules(name);
        let names: BTreeSet<String> = trained.iter().map(|(m, _)| kohya_name(m)).collect();
        assert_eq!(names.len(), trained.iter().count());
        let by_name = modules.by_kohya_name();
        for (module, _) in modules.iter() {
            assert_eq!(by_name[&kohya_name(module)], module);
        }
        // Every module has a name in the original layout, too.
        assert_eq!(by_name.len(), 2 * modules.iter().count());
    }
    let (modules, _) = real_modules("sdxl");
    let by_name = modules.by_kohya_name();
    for (original, module) in [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        (
            "input_blocks_4_0_skip_connection",
            "down_blocks.1.resnets.0.conv_shortcut",
        ),
        (
            "input_blocks_8_1_proj_in",
            "down_blocks.2.attentions.1.proj_in",
        ),
        (
            "middle_block_2_emb_layers_1",
            "mid_block.resnets.1.time_emb_proj",
        ),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        (
            "output_blocks_5_1_transformer_blocks_1_ff_net_0_proj",
            "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
        ),
        (
            "output_blocks_8_0_out_layers_3",
            "up_blocks.2.resnets.2.conv2",
        ),
        ("label_emb_0_2", "add_embedding.linear_2"),
    ] {
        assert_eq!(by_name[original], module);
    }
}

#[test]
fn base_version_is_told_by_the_text_width() {
    assert_eq!(
        BaseVersion::of(&real_modules("sd15").0),
        Some(BaseVersion::Sd1)
    );
    assert_eq!(
        BaseVersion::of(&real_modules("sdxl").0),
        Some(BaseVersion::Sdxl)
    );
    assert_eq!(BaseVersion::of(&super::two_modules()), None);
}
