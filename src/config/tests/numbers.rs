//! Every numeric key, at and beyond its bounds.

use std::ops::RangeInclusive;

use super::*;
use crate::config::bounds::{self, Bounds};

/// A configuration with every table, so that any key can be set alone.
const TABLES: &str = "[data]\nshards = \"a.tar\"\n[validation]\nprompts = [\"a\"]\n[latents]\noutput = \"a\"\n[audit]\ndir = \"a\"\n";

/// The keys that a number needs beside it.
fn beside(key: &str) -> &'static [&'static str] {
    match key {
        "data.lanes" => &["train.gradient_accumulation=4096"],
        "optimizer.warmup_steps" => &["optimizer.schedule=linear"],
        "distill.w_max" => &["distill.w_min=0"],
        "distill.w_min" => &["distill.w_max=1000"],
        "distill.tcd_gamma" => &["distill.objective=tcd"],
        "distill.phases" => &["distill.objective=pcm", "distill.num_ddim_timesteps=1000"],
        _ => &[],
    }
}

fn set(key: &str, value: &str) -> Result<Config, ConfigError> {
    let argument = format!("{key}={value}");
    parse(TABLES, &[beside(key), &[argument.as_str()]].concat())
}

/// The keys that take numbers, found by what their refusal of a string needs.
fn numeric_keys() -> Vec<String> {
    let numeric = |key: &String| match set(key, "\"word\"") {
        Err(ConfigError::WrongType { needs, .. }) => needs.contains("number"),
        _ => false,
    };
    known_keys().into_iter().filter(numeric).collect()
}

fn bounds_of(key: &str) -> &'static Bounds {
    let found = bounds::all().find(|bounds| bounds.key == key);
    found.unwrap_or_else(|| panic!("{key} is a number without bounds in src/config"))
}

fn range_of(key: &str) -> RangeInclusive<f64> {
    let bounds = bounds_of(key);
    bounds.least().parse().unwrap()..=bounds.most().parse().unwrap()
}

#[test]
fn every_numeric_key_has_bounds() {
    let keys = numeric_keys();
    assert!(keys.len() > 40, "{keys:?}");
    let mut listed: Vec<_> = bounds::all().map(|bounds| bounds.key.to_owned()).collect();
    for key in &keys {
        bounds_of(key);
    }
    listed.retain(|key| !keys.contains(key));
    assert!(listed.is_empty(), "bounds of unknown keys: {listed:?}");
}

#[test]
fn numbers_load_or_are_refused_with_their_bound() {
    const VALUES: [&str; 15] = [
        "0",
        "1",
        "-1",
        "2147483648",
        "4611686018427387904",
        "99999999999999999999",
        "-99999999999999999999",
        "0xffffffffffffffffff",
        "1e300",
        "-1e300",
        "1e400",
        "-1e400",
        "nan",
        "inf",
        "-inf",
    ];
    for key in numeric_keys() {
        let (least, most) = (bounds_of(&key).least(), bounds_of(&key).most());
        for value in VALUES {
            let Err(error) = set(&key, value) else {
                let number = value.parse().unwrap();
                assert!(
                    range_of(&key).contains(&number),
                    "{key} = {value} is accepted"
                );
                continue;
            };
            let message = error.to_string();
            if ["0", "1"].contains(&value) && range_of(&key).contains(&value.parse().unwrap()) {
                // Another rule, as "must be a multiple of 8".
                continue;
            }
            assert!(
                message.starts_with(&format!("-s {key}={value}: key {key} = ")),
                "{message}"
            );
            let below = value.starts_with('-')
                || value
                    .parse::<f64>()
                    .is_ok_and(|number| number < *range_of(&key).start());
            let ends = match error {
                // A fraction for a whole number.
                ConfigError::WrongType { .. } => "a whole number, 0 or more".to_owned(),
                _ if value.ends_with("nan") || value.ends_with("inf") => {
                    format!("must be a finite number, {least} to {most}")
                }
                _ if below => format!("must be at least {least}"),
                _ => format!("must be at most {most}"),
            };
            assert!(message.ends_with(&ends), "{message}\nnot: {ends}");
        }
    }
}

#[test]
fn bounds_themselves_are_accepted() {
    for bounds in bounds::all() {
        for bound in [bounds.least(), bounds.most()] {
            if let Err(error) = set(bounds.key, &bound.to_string()) {
                panic!("{error}");
            }
        }
    }
}

#[test]
fn numbers_beyond_toml_are_refused_where_they_are_written() {
    let message = |text: &str| parse(text, &[]).unwrap_err().to_string();
    assert_eq!(
        message("[data]\nshards = \"a.tar\"\n[train]\nbatch_size = 99_999_999_999_999_999_999\n"),
        "a.toml:4: key train.batch_size = 99999999999999999999: must be at most 65536"
    );
    assert_eq!(
        message("[data]\nshards = \"a.tar\"\ntrain = { seed = -99999999999999999999 }\n"),
        "a.toml:3: key data.train.seed = -99999999999999999999: number too small: at least -9223372036854775808"
    );
    assert_eq!(
        message("[distill]\nw_max = 1e999\n"),
        "a.toml:2: key distill.w_max = 1e999: must be at most 1000"
    );
    let error = parse(MINIMAL, &["s3={ max_attempts = 99999999999999999999 }"]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "-s s3={ max_attempts = 99999999999999999999 }: key s3.max_attempts = 99999999999999999999: must be at most 1000000"
    );
}

#[test]
fn documentation_has_the_bounds() {
    let page = include_str!("../../../docs/configuration.md");
    for bounds in bounds::all() {
        let row = page
            .lines()
            .find(|line| line.starts_with(&format!("| `{}` |", bounds.key)));
        let row =
            row.unwrap_or_else(|| panic!("docs/configuration.md has no row for {}", bounds.key));
        assert!(
            row.contains(&bounds.words()),
            "docs/configuration.md: {} is {}: {row}",
            bounds.key,
            bounds.words()
        );
    }
}
