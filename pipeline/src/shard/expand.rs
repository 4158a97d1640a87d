//! Patterns to URLs: `::`, braces, and the `pipe:` commands of older scripts. Purely text.

use super::mistakes;
use super::pipe::unwrap_pipe;
use super::url::{ShardUrl, UrlError, invalid};

/// Most shards of one pattern: a pattern with more is a mistake.
const MAX_EXPANSION: usize = if cfg!(any(test, feature = "fuzzing")) {
    // Larger patterns would take all of a fuzzer's time.
    10_000
} else {
    10_000_000
};

fn too_many(pattern: &str) -> UrlError {
    invalid(
        pattern,
        format!("stands for more than {MAX_EXPANSION} shards"),
    )
}

/// Expands braces in every pattern and reads the URLs, in order.
///
/// `{00000..01210}` counts (keeping the zeros), `{a..f}` too, `{a,b}` lists; they nest and repeat, as
/// in a shell. `::` separates patterns, as in webdataset. Lists of shards (`@file.txt`) are for
/// [`Sources::shards`](crate::Sources::shards).
///
/// # Errors
/// [`UrlError`] for braces that don't match, for what isn't a URL, and when nothing is given.
pub fn expand(patterns: &[String]) -> Result<Vec<ShardUrl>, UrlError> {
    let mut urls = Vec::new();
    for pattern in patterns.iter().flat_map(|pattern| split(pattern)) {
        urls.append(&mut expand_one(pattern)?);
    }
    if urls.is_empty() {
        return Err(UrlError::Empty);
    }
    Ok(urls)
}

/// Splits at `::`, except inside the brackets of an IPv6 address.
pub(crate) fn split(patterns: &str) -> Vec<&str> {
    let bytes = patterns.as_bytes();
    let (mut parts, mut start, mut in_brackets) = (Vec::new(), 0, false);
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'[' => in_brackets = true,
            b']' => in_brackets = false,
            b':' if !in_brackets && bytes.get(at + 1) == Some(&b':') => {
                parts.push(&patterns[start..at]);
                start = at + 2;
                at = start;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    parts.push(&patterns[start..]);
    parts
}

/// Expands one pattern without `::`.
pub(crate) fn expand_one(pattern: &str) -> Result<Vec<ShardUrl>, UrlError> {
    let pattern = unwrap_pipe(pattern.trim())?;
    mistakes::refuse(&pattern)?;
    let urls = expand_braces(&pattern)?;
    urls.iter().map(|url| url.parse()).collect()
}

fn expand_braces(pattern: &str) -> Result<Vec<String>, UrlError> {
    let Some(open) = pattern.find('{') else {
        if pattern.contains('}') {
            return Err(invalid(pattern, "has a '}' without a '{'"));
        }
        return Ok(vec![pattern.to_owned()]);
    };
    let (before, rest) = (&pattern[..open], &pattern[open + 1..]);
    if before.contains('}') {
        return Err(invalid(pattern, "has a '}' without a '{'"));
    }
    let mut depth = 1_usize;
    let mut commas = Vec::new();
    let close = rest
        .bytes()
        .position(|byte| {
            match byte {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            depth == 0
        })
        .ok_or_else(|| invalid(pattern, "has a '{' without a '}'"))?;
    let (inside, after) = (&rest[..close], &rest[close + 1..]);
    let mut depth = 0_usize;
    for (at, byte) in inside.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            b',' if depth == 0 => commas.push(at),
            _ => {}
        }
    }
    let middles = if commas.is_empty() {
        match sequence(pattern, inside)? {
            Some(sequence) => sequence,
            // As in a shell: braces that list nothing are kept.
            None => match mistakes::braces(inside) {
                Some(reason) => return Err(invalid(pattern, reason)),
                None => expand_braces(inside)?
                    .into_iter()
                    .map(|text| format!("{{{text}}}"))
                    .collect(),
            },
        }
    } else {
        let mut parts = Vec::new();
        let mut start = 0;
        for end in commas.into_iter().chain([inside.len()]) {
            parts.extend(expand_braces(&inside[start..end])?);
            if parts.len() > MAX_EXPANSION {
                return Err(too_many(pattern));
            }
            start = end + 1;
        }
        parts
    };
    let tails = expand_braces(after)?;
    if middles.len().saturating_mul(tails.len()) > MAX_EXPANSION {
        return Err(too_many(pattern));
    }
    let mut expanded = Vec::with_capacity(middles.len() * tails.len());
    for middle in &middles {
        for tail in &tails {
            expanded.push(format!("{before}{middle}{tail}"));
        }
    }
    Ok(expanded)
}

/// `00..12`, `0..10..2` or `a..f`; `None` if it isn't a sequence.
fn sequence(pattern: &str, inside: &str) -> Result<Option<Vec<String>>, UrlError> {
    let mut parts = inside.split("..");
    let (Some(first), Some(last), step, None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Ok(None);
    };
    let number = |text: &str| -> Option<u64> {
        text.bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse().ok())?
    };
    let letter = |text: &str| -> Option<u64> {
        match text.as_bytes() {
            [letter] if letter.is_ascii_alphabetic() => Some(u64::from(*letter)),
            _ => None,
        }
    };
    let numbers = number(first).zip(number(last));
    let is_number = numbers.is_some();
    let Some((from, to)) = numbers.or_else(|| letter(first).zip(letter(last))) else {
        return Ok(None);
    };
    let step = match step.map(number) {
        None => 1,
        Some(Some(step)) if step > 0 => step,
        Some(_) => {
            return Err(invalid(
                pattern,
                format!("the step of {{{inside}}} must be a number above 0"),
            ));
        }
    };
    let padded = |text: &str| text.len() > 1 && text.starts_with('0');
    let width = if padded(first) || padded(last) {
        first.len().max(last.len())
    } else {
        0
    };
    if from.abs_diff(to) / step >= MAX_EXPANSION as u64 {
        return Err(too_many(pattern));
    }
    let text = |n: u64| match u8::try_from(n) {
        Ok(letter) if !is_number => char::from(letter).to_string(),
        _ => format!("{n:0width$}"),
    };
    let step_size = usize::try_from(step).unwrap_or(usize::MAX);
    Ok(Some(if from <= to {
        (from..=to).step_by(step_size).map(text).collect()
    } else {
        (to..=from).rev().step_by(step_size).map(text).collect()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(pattern: &str) -> Vec<String> {
        let urls = expand(&[pattern.to_owned()]).unwrap();
        urls.iter().map(ToString::to_string).collect()
    }

    fn refused(pattern: &str) -> String {
        expand(&[pattern.to_owned()]).unwrap_err().to_string()
    }

    #[test]
    fn expand_sequences_keep_their_zeros() {
        let urls = expanded("s3://bucket/data/{00000..01210}.tar");
        assert_eq!(urls.len(), 1211);
        assert_eq!(urls[0], "s3://bucket/data/00000.tar");
        assert_eq!(urls[1210], "s3://bucket/data/01210.tar");
        assert_eq!(expanded("{8..11}"), ["8", "9", "10", "11"]);
        assert_eq!(expanded("{08..11..2}"), ["08", "10"]);
        assert_eq!(expanded("{2..0}"), ["2", "1", "0"]);
        assert_eq!(expanded("{7..7}"), ["7"]);
    }

    #[test]
    fn expand_letters_as_pythons_braceexpand() {
        assert_eq!(expanded("x{a..e..2}"), ["xa", "xc", "xe"]);
        assert_eq!(expanded("{C..A}"), ["C", "B", "A"]);
        assert_eq!(expanded("{a..10}"), ["{a..10}"]);
        assert_eq!(expanded("{aa..cc}"), ["{aa..cc}"]);
    }

    #[test]
    fn expand_lists_nest_and_repeat() {
        assert_eq!(expanded("x{a,b{1..2}}y"), ["xay", "xb1y", "xb2y"]);
        assert_eq!(expanded("{a,b}/{0..1}"), ["a/0", "a/1", "b/0", "b/1"]);
        assert_eq!(expanded("a{,-b}.tar"), ["a.tar", "a-b.tar"]);
        assert_eq!(expanded("{name}.tar"), ["{name}.tar"]);
    }

    #[test]
    fn expand_braces_of_hub_urls() {
        assert_eq!(
            expanded("hf://datasets/u/n@v1/{0..1}.tar"),
            ["hf://datasets/u/n@v1/0.tar", "hf://datasets/u/n@v1/1.tar"]
        );
        assert_eq!(expanded("file:///data/{0..1}*.tar").len(), 2);
    }

    #[test]
    fn expand_splits_at_two_colons() {
        assert_eq!(
            expanded("a{0..1}.tar::pipe:aws s3 cp s3://b/{2..3}.tar -"),
            ["a0.tar", "a1.tar", "s3://b/2.tar", "s3://b/3.tar"]
        );
        assert_eq!(expanded("http://[::1]:80/a.tar"), ["http://[::1]:80/a.tar"]);
        assert_eq!(refused("a.tar::"), "no shard URL was given");
    }

    #[test]
    fn expand_reads_the_old_pipe_form() {
        assert_eq!(
            expanded("pipe:aws s3 cp s3://muse-datasets/laion/{0..1}.tar -"),
            [
                "s3://muse-datasets/laion/0.tar",
                "s3://muse-datasets/laion/1.tar"
            ]
        );
        assert_eq!(
            expanded("pipe:curl -s -L 'https://host/{0..1}.tar'"),
            ["https://host/0.tar", "https://host/1.tar"]
        );
        assert_eq!(expanded("pipe:cat /data/0.tar"), ["/data/0.tar"]);
        let text = refused("pipe:gsutil cat gs://b/{0..1}.tar");
        assert!(text.contains("https://storage.googleapis.com"), "{text}");
        // Without the option, an object of another server would be read.
        let text = refused("pipe:aws --endpoint-url https://minio s3 cp s3://b/0.tar -");
        assert!(text.contains("set [s3] endpoint_url"), "{text}");
    }

    #[test]
    fn expand_errors_name_the_fault() {
        assert!(refused("a{0..1").contains("'{' without a '}'"));
        assert!(refused("a0..1}").contains("'}' without a '{'"));
        assert!(refused("{0..99999999999}").contains("more than"));
        assert!(refused("{0..999}{0..999}").contains("more than"));
        assert!(refused("{{0..6000},{0..6000}}").contains("more than"));
        assert!(refused("{0..9..0}").contains("step"));
        assert!(refused("a{00000-00003}.tar").contains("{00000..00003}"));
        assert!(refused("s3://b/*.tar::c.tar").contains("s3://b/ for every .tar"));
        assert!(refused("a/{0..1}.tar b/{0..1}.tar").contains("A::B"));
        assert!(refused("@list.txt").contains("names a list"));
        assert_eq!(expand(&[]).unwrap_err(), UrlError::Empty);
        assert_eq!(expand(&[" ".to_owned()]).unwrap_err(), UrlError::Empty);
    }

    #[test]
    fn expand_never_panics() {
        let alphabet = [
            "{", "}", ",", "..", "0", "9", "é", "s3://", "/", "pipe:", " ", "a", "::", "[", "-",
            "@", "*", "$", "hf://", "file:///",
        ];
        let mut generator = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let length = generator.usize(0..9);
            let text: String = (0..length)
                .map(|_| alphabet[generator.usize(0..alphabet.len())])
                .collect();
            if let Ok(urls) = expand(std::slice::from_ref(&text)) {
                for url in urls {
                    let again: ShardUrl = url.whole().parse().unwrap();
                    assert_eq!(again.is_folder(), url.is_folder(), "{text}");
                }
            }
        }
    }
}
