//! One sample's members: arrays as npy, the json with the sample's crop.

use coffey_pipeline::SampleMeta;
use coffey_pipeline::image::CropWindow;
use npyz::half::f16;
use npyz::{WriteOptions, WriterBuilder};
use serde_json::{Map, Value, json};

/// A number that f16 can't hold, and why.
#[derive(Clone, Copy, Debug)]
pub(super) struct NotF16(pub(super) f32, pub(super) &'static str);

/// `values` as f16, if all of them have one.
pub(super) fn to_f16(values: &[f32]) -> Result<Vec<f16>, NotF16> {
    values
        .iter()
        .map(|&value| match f16::from_f32(value) {
            half if half.is_finite() => Ok(half),
            _ if value.is_finite() => Err(NotF16(value, "more than f16 can hold (65504)")),
            _ => Err(NotF16(
                value,
                "which no finite input makes of sound weights",
            )),
        })
        .collect()
}

/// An array as an npy file, C order.
pub(super) fn npy(shape: &[usize], values: Vec<f16>) -> std::io::Result<Vec<u8>> {
    let shape: Vec<u64> = shape.iter().map(|&size| size as u64).collect();
    let mut bytes = Vec::with_capacity(128 + 2 * values.len());
    let mut writer = WriteOptions::new()
        .default_dtype()
        .shape(&shape)
        .writer(&mut bytes)
        .begin_nd()?;
    writer.extend(values)?;
    writer.finish()?;
    Ok(bytes)
}

/// The sample's json with what was done to its image. With several crops, what belongs to a crop is a list.
pub(super) fn json_with_crop(sample: &SampleMeta, side: u32) -> Value {
    let of_crop = |value: fn(&CropWindow) -> Value| match sample.crops.as_slice() {
        [crop] => value(crop),
        crops => crops.iter().map(value).collect(),
    };
    let mut object = match &sample.json {
        Some(Value::Object(object)) => object.clone(),
        Some(other) => Map::from_iter([("json".to_owned(), other.clone())]),
        None => Map::new(),
    };
    // Not `insert` alone: a key of this name in the input would keep its place among the others.
    object.shift_remove("coffey");
    object.insert(
        "coffey".to_owned(),
        json!({
            "original_width": sample.original.0,
            "original_height": sample.original.1,
            "resized_width": sample.resized.0,
            "resized_height": sample.resized.1,
            "crop_top": of_crop(|crop| crop.top.into()),
            "crop_left": of_crop(|crop| crop.left.into()),
            "flipped": of_crop(|crop| crop.flipped.into()),
            "target_width": side,
            "target_height": side,
        }),
    );
    Value::Object(object)
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

    #[test]
    fn json_keeps_the_input_and_adds_the_crop() {
        let mut sample = SampleMeta {
            key: "a/b".into(),
            shard: 0,
            position: 0,
            epoch: 0,
            caption: "c".to_owned(),
            json: Some(json!({"width": 9, "coffey": 1, "z": 0.25})),
            original: (90, 60),
            resized: (96, 64),
            crops: vec![CropWindow {
                top: 0,
                left: 16,
                flipped: true,
            }],
        };
        assert_eq!(
            json_with_crop(&sample, 64).to_string(),
            "{\"width\":9,\"z\":0.25,\"coffey\":{\"original_width\":90,\"original_height\":60,\"resized_width\":96,\
             \"resized_height\":64,\"crop_top\":0,\"crop_left\":16,\"flipped\":true,\"target_width\":64,\"target_height\":64}}"
        );
        sample.crops.push(CropWindow {
            top: 0,
            left: 3,
            flipped: false,
        });
        let two = &json_with_crop(&sample, 64)["coffey"];
        assert_eq!(two["crop_left"], json!([16, 3]));
        assert_eq!(two["flipped"], json!([true, false]));
        assert_eq!(two["target_width"], 64);
        sample.json = Some(json!([1]));
        assert_eq!(json_with_crop(&sample, 64)["json"], json!([1]));
        sample.json = None;
        assert_eq!(json_with_crop(&sample, 64).as_object().unwrap().len(), 1);
    }
}
