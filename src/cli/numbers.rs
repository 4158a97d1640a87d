//! Numbers on the command line: parsers with bounds, whose messages are those of the configuration.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::config::MAX_GUIDANCE;

/// Greatest number of processes that share the shards.
pub(super) const MAX_WORLD: usize = 1 << 20;

/// Greatest factor of a LoRA's change of weights; its negative is the least.
const MAX_LORA_SCALE: f64 = 100.0;

/// A parser of whole numbers in `range`.
pub(super) fn whole<T>(
    range: RangeInclusive<T>,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| {
        let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(format!(
                "must be a whole number, {} to {}",
                range.start(),
                range.end()
            ));
        }
        match text.parse::<T>() {
            Ok(number) if range.contains(&number) => Ok(number),
            Ok(number) if number < *range.start() => Err(at_least(range.start())),
            Err(_) if text.starts_with('-') => Err(at_least(range.start())),
            _ => Err(format!("must be at most {}", range.end())),
        }
    }
}

/// Parses a guidance scale.
pub(super) fn guidance(text: &str) -> Result<f64, String> {
    real(text, 0.0, MAX_GUIDANCE)
}

/// Parses a number from 0 to 1.
pub(super) fn fraction(text: &str) -> Result<f64, String> {
    real(text, 0.0, 1.0)
}

/// Parses a factor of a LoRA's change of weights.
pub(super) fn lora_scale(text: &str) -> Result<f64, String> {
    real(text, -MAX_LORA_SCALE, MAX_LORA_SCALE)
}

/// Parses a number from `least` to `most`.
fn real(text: &str, least: f64, most: f64) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if !number.is_finite() => Err("must be a finite number".to_owned()),
        Ok(number) if number < least => Err(at_least(&least)),
        Ok(number) if number > most => Err(format!("must be at most {most}")),
        Ok(number) => Ok(number),
        Err(_) => Err(format!("must be a number, {least} to {most}")),
    }
}

fn at_least(number: &impl Display) -> String {
    format!("must be at least {number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_name_their_bound() {
        let steps = whole(1usize..=50);
        assert_eq!(steps("50"), Ok(50));
        let nines = "9".repeat(30);
        for (text, message) in [
            ("0", "must be at least 1"),
            ("-1", "must be at least 1"),
            (&format!("-{nines}"), "must be at least 1"),
            ("51", "must be at most 50"),
            (&nines, "must be at most 50"),
            ("", "must be a whole number, 1 to 50"),
            ("1.5", "must be a whole number, 1 to 50"),
            ("nan", "must be a whole number, 1 to 50"),
        ] {
            assert_eq!(steps(text).unwrap_err(), message, "{text}");
        }
        assert_eq!(whole(0..=u64::MAX)("18446744073709551615"), Ok(u64::MAX));
        for (text, message) in [
            ("nan", "must be a finite number"),
            ("-inf", "must be a finite number"),
            ("1e400", "must be a finite number"),
            ("-0.5", "must be at least 0"),
            ("1e300", "must be at most 1000"),
            ("high", "must be a number, 0 to 1000"),
        ] {
            assert_eq!(guidance(text).unwrap_err(), message, "{text}");
        }
        assert_eq!(lora_scale("-1.5"), Ok(-1.5));
        assert_eq!(lora_scale("-101").unwrap_err(), "must be at least -100");
    }
}
