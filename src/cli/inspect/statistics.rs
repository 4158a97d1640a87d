//! `coffey inspect --stats`: distributions as text and as a picture.

use std::fmt::Write as _;
use std::path::Path;

use coffey_pipeline::inspect::{Histogram, Statistics, TokenCounter};

use crate::cli::Failure;
use crate::cli::resources::DataAccess;
use crate::config::Config;
use crate::draw::{Bars, histograms, save_png};
use crate::models::ClipTokenizer;
use crate::pretrained::Components;

/// Longest bar of the text. Characters.
const BAR: u64 = 40;

/// Counter of captions' tokens, with the tokenizer of the configured teacher; `None` if no teacher is configured.
pub(super) fn token_counter(
    config: &Config,
    data: &DataAccess,
) -> Result<Option<TokenCounter>, Failure> {
    let Some(teacher) = &config.model.teacher else {
        return Ok(None);
    };
    let folder = data.model(teacher, &config.model.revision, &Components::tokenizer())?;
    let tokenizer = ClipTokenizer::load(&folder.join("tokenizer"))?;
    // Counts a caption that can't be tokenized, which none should be, as empty.
    let count = move |caption: &str| {
        let ids = tokenizer.encode(caption);
        ids.map_or((0, false), |ids| (ids.tokens, ids.truncated))
    };
    Ok(Some(TokenCounter::new(count)))
}

/// Text of the distributions, one bar a line.
pub(super) fn describe(statistics: &Statistics) -> String {
    let mut text = String::from("statistics\n");
    for histogram in statistics.histograms() {
        describe_histogram(&mut text, histogram);
    }
    if let Some(cut) = statistics.captions_cut {
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "  captions with more tokens than the text encoder takes: {cut}"
        );
    }
    text
}

fn describe_histogram(text: &mut String, histogram: &Histogram) {
    let Histogram {
        quantity,
        count,
        missing,
        ..
    } = histogram;
    let range = match (histogram.min, histogram.max, histogram.mean) {
        (Some(min), Some(max), Some(mean)) => {
            let [min, max, mean] = [min, max, mean].map(short);
            format!("{count} values, {min} to {max}, mean {mean}")
        }
        _ => "no values".to_owned(),
    };
    let missing = match missing {
        0 => String::new(),
        missing => format!("; {missing} samples without"),
    };
    let _ = writeln!(text, "  {quantity}: {range}{missing}");
    let most = histogram.buckets.iter().max().copied().unwrap_or(1).max(1);
    for (label, count) in histogram.rows() {
        let bar = "#".repeat((count * BAR).div_ceil(most) as usize);
        let bar = if bar.is_empty() {
            bar
        } else {
            format!(" {bar}")
        };
        let _ = writeln!(text, "    {label:>16}  {count:>9}{bar}");
    }
}

/// Draws the distributions into a PNG file.
pub(super) fn save(statistics: &Statistics, path: &Path) -> Result<(), Failure> {
    let bars: Vec<Bars> = statistics
        .histograms()
        .map(|histogram| Bars {
            title: histogram.quantity.to_owned(),
            bars: histogram.rows().collect(),
        })
        .collect();
    Ok(save_png(&histograms(&bars), path)?)
}

/// A number with up to four decimals.
fn short(number: f64) -> String {
    let text = format!("{number:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
