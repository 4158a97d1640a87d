//! f32 values to f16, refused where f16 can't hold them.

use npyz::half::f16;

/// A value that f16 can't hold, and why.
#[derive(Clone, Copy, Debug)]
pub(super) struct NotF16(pub(super) f32, pub(super) &'static str);

/// `values` as f16. The first value that is not finite in f16 is an error.
pub(super) fn to_f16(values: &[f32]) -> Result<Vec<f16>, NotF16> {
    values
        .iter()
        .map(|&value| match f16::from_f32(value) {
            half if half.is_finite() => Ok(half),
            _ if value.is_finite() => Err(NotF16(value, "more than f16 can hold (65504)")),
            _ => Err(NotF16(
                value,
                "which no finite input makes of sound weights in f32; in f16 some VAEs overflow: \
                 encode.vae_dtype = \"bf16\" or \"f32\", or a VAE made for f16 (model.vae, of SDXL madebyollin/sdxl-vae-fp16-fix)",
            )),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_keeps_what_it_can_hold_and_refuses_the_rest() {
        let kept = to_f16(&[0.1, -65504.0, 1e-9]).unwrap();
        assert_eq!(kept[0].to_f32(), 0.099_975_586);
        assert_eq!(kept[2].to_f32(), 0.0);
        for (value, words) in [
            (7e4, "65504"),
            (f32::NAN, "sound weights"),
            (f32::INFINITY, "sound weights"),
        ] {
            let NotF16(refused, reason) = to_f16(&[1.0, value]).unwrap_err();
            assert!(refused.to_bits() == value.to_bits() && reason.contains(words));
        }
    }
}
