//! Descriptions of skipped samples, for the error of a stream that ends because of them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::config::StreamConfig;
use super::skip::SkipReason;
use crate::image::format_of;
use crate::image_folder::file_of;
use crate::json::Document;
use crate::order::ShardPass;
use crate::shard::{HeldMembers, MAX_CAPTION_BYTES, Sample};

/// Most members that a description names.
const NAMED_MEMBERS: usize = 12;
/// Most incomplete samples of an open shard that are remembered.
const REMEMBERED_KEYS: usize = 4096;
/// Keys of a sample's json that hold a caption in known data sets.
const JSON_CAPTIONS: [&str; 6] = ["caption", "text", "txt", "prompt", "CAPTION", "TEXT"];
const SORT: &str =
    "sort its members by name (`tar --sort=name`): the members of a sample must be adjacent";

/// Describes skipped samples by their members and the keys to set.
pub(super) struct Explainer {
    image_keys: Vec<String>,
    caption_keys: Vec<String>,
    held: HeldMembers,
    /// The folders of images that shards are parts of, by shard.
    folders: BTreeMap<usize, PathBuf>,
    scattered: ScatteredMembers,
}

impl Explainer {
    pub(super) fn new(config: &StreamConfig) -> Self {
        let folders = config.shards.iter().enumerate();
        let folders =
            folders.filter_map(|(shard, url)| Some((shard, url.image_folder()?.to_owned())));
        Self {
            image_keys: config.image_keys.clone(),
            caption_keys: config.caption_keys.clone(),
            held: config.held_members(),
            folders: folders.collect(),
            scattered: ScatteredMembers::default(),
        }
    }

    /// Describes a skipped sample of the shard pass `pass`: the first one of its reason, and the first one whose members
    /// are not adjacent. `None` for other samples.
    pub(super) fn explain(
        &mut self,
        pass: ShardPass,
        sample: &Sample,
        reason: &SkipReason,
        first: bool,
    ) -> Option<String> {
        if let Some(folder) = self.folders.get(&pass.shard) {
            return first.then(|| self.describe_in(folder, sample, reason));
        }
        if reason.is_missing_member() && self.scattered.finds(pass.id, &sample.key) {
            return Some(format!(
                "has the {}, and other members elsewhere in the shard: {SORT}",
                members(sample)
            ));
        }
        first.then(|| self.describe(sample, reason))
    }

    /// Forgets the samples of a shard that was read.
    pub(super) fn end_shard(&mut self, pass: u64) {
        self.scattered.incomplete.remove(&pass);
    }

    /// Describes a sample of a folder of images.
    fn describe_in(&self, folder: &Path, sample: &Sample, reason: &SkipReason) -> String {
        match *reason {
            SkipReason::NO_CAPTION => {
                let keys = &self.caption_keys;
                let usual = keys.iter().find(|key| *key == "txt").or(keys.first());
                let file = file_of(folder, &sample.key, usual.map_or("txt", String::as_str));
                format!(
                    "has the {} and none of data.caption_keys = {keys:?}; write its caption to {}, or to metadata.jsonl",
                    members(sample),
                    file.display(),
                )
            }
            SkipReason::NO_IMAGE if image_in(sample).is_none() => format!(
                "has the {} and none of data.image_keys = {:?}; no member is a JPEG, PNG, WebP, GIF or BMP: convert the image",
                members(sample),
                self.image_keys
            ),
            _ => self.describe(sample, reason),
        }
    }

    fn describe(&self, sample: &Sample, reason: &SkipReason) -> String {
        let members = members(sample);
        match *reason {
            SkipReason::NO_IMAGE => format!(
                "has the {members} and none of data.image_keys = {:?}; {}",
                self.image_keys,
                images(sample)
            ),
            SkipReason::NO_CAPTION => format!(
                "has the {members} and none of data.caption_keys = {:?}; {}",
                self.caption_keys,
                captions(sample)
            ),
            SkipReason::NO_LATENT | SkipReason::NO_EMBEDS => {
                format!("has the {members}; is the shard one of `coffey precompute`?")
            }
            SkipReason::DUPLICATE_MEMBER => format!(
                "has only the {members} between two members of the same name; each file name may be in a shard once"
            ),
            SkipReason::TOO_LARGE => match sample.excess {
                Some(excess) => excess.to_string(),
                None => self.oversized(sample),
            },
            SkipReason::CAPTION_TOO_LONG => {
                format!("has a caption of more than {MAX_CAPTION_BYTES} bytes")
            }
            SkipReason::BAD_JSON => "has a json that does not parse".to_owned(),
            // Decoding finds formats that are not read: no sample comes here with them.
            SkipReason::Broken(_)
            | SkipReason::UnreadFormat(_)
            | SkipReason::Duplicate(_)
            | SkipReason::Filtered(_) => String::new(),
        }
    }

    /// Names the members that are too large.
    fn oversized(&self, sample: &Sample) -> String {
        let large = sample.oversized.iter().map(|(extension, bytes)| {
            let most = self.held.limit(extension).unwrap_or(0);
            format!("the member {extension} of {bytes} bytes; at most {most} are read")
        });
        format!("has {}", large.collect::<Vec<_>>().join(", "))
    }
}

/// The extensions of a sample's members, as "member jpg" or "members jpg, txt".
fn members(sample: &Sample) -> String {
    let mut all: Vec<&str> = sample.extensions().collect();
    all.sort_unstable();
    let named = all[..all.len().min(NAMED_MEMBERS)].join(", ");
    match all.len() {
        1 => format!("member {named}"),
        count if count > NAMED_MEMBERS => {
            format!("members {named} and {} more", count - NAMED_MEMBERS)
        }
        _ => format!("members {named}"),
    }
}

/// The members' contents by extension, or their starts.
fn contents(sample: &Sample) -> impl Iterator<Item = (&String, &Bytes)> {
    sample.members.iter().chain(&sample.others)
}

/// The extension and the format of a member that is an image.
fn image_in(sample: &Sample) -> Option<(&String, &'static str)> {
    contents(sample).find_map(|(extension, content)| Some((extension, format_of(content)?)))
}

/// The remedy for a sample without an image.
fn images(sample: &Sample) -> String {
    match image_in(sample) {
        Some((extension, format)) => format!(
            "{extension} is a {}: add {extension:?} to data.image_keys{}",
            format.to_uppercase(),
            dotted(extension)
        ),
        None => format!(
            "no member is a JPEG, PNG, WebP, GIF or BMP; if the shard has the image elsewhere, {SORT}"
        ),
    }
}

/// The remedy for a sample without a caption.
fn captions(sample: &Sample) -> String {
    let is_text = |content: &[u8]| {
        let text = match std::str::from_utf8(content) {
            Ok(text) => text,
            // The start of a member may end in a character.
            Err(error) if error.error_len().is_none() => {
                std::str::from_utf8(&content[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(_) => return false,
        };
        format_of(content).is_none() && !text.trim().is_empty() && !text.contains('\0')
    };
    let text = contents(sample).find(|(extension, content)| {
        !extension.ends_with("json") && !extension.ends_with("npy") && is_text(content)
    });
    if let Some((extension, _)) = text {
        return format!(
            "{extension} is text: add {extension:?} to data.caption_keys if it is the caption{}",
            dotted(extension)
        );
    }
    let json = sample.members.get("json");
    let json = json.and_then(|raw| Document::parse(raw).ok());
    let key = json.as_ref().and_then(|json| {
        let is_caption =
            |key: &&str| matches!(json.get(key), Some(serde_json::Value::String(text)) if !text.is_empty());
        JSON_CAPTIONS.into_iter().find(is_caption)
    });
    match key {
        Some(key) => format!(
            "its json has the key {key:?}, but a caption is read from a member of its own: write it to {}.txt",
            sample.key
        ),
        None => format!("no member is text; if the shard has the caption elsewhere, {SORT}"),
    }
}

/// The rule for names with several dots.
fn dotted(extension: &str) -> &'static str {
    if extension.contains('.') {
        " (the key of a sample ends at the first dot of the file name)"
    } else {
        ""
    }
}

/// Finds a sample whose members are not adjacent: two incomplete samples of one shard with the same key.
#[derive(Default)]
struct ScatteredMembers {
    /// Keys of incomplete samples, by the passes of open shards.
    incomplete: BTreeMap<u64, HashSet<Arc<str>>>,
    found: bool,
}

impl ScatteredMembers {
    /// Records an incomplete sample. Returns whether it is the first one whose key came before.
    fn finds(&mut self, pass: u64, key: &Arc<str>) -> bool {
        if self.found {
            return false;
        }
        let keys = self.incomplete.entry(pass).or_default();
        self.found = keys.contains(key);
        if self.found {
            self.incomplete.clear();
        } else if keys.len() < REMEMBERED_KEYS {
            keys.insert(Arc::clone(key));
        }
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JPEG: &[u8] = &[0xff, 0xd8, 0xff, 0xe0, 0, 16, b'J', b'F', b'I', b'F'];

    fn sample(members: &[(&str, &'static [u8])]) -> Sample {
        let mut sample = Sample::new(b"k");
        for (extension, content) in members {
            let content = Bytes::from_static(content);
            sample.members.insert((*extension).to_owned(), content);
        }
        sample
    }

    fn pass(id: u64) -> ShardPass {
        ShardPass {
            id,
            shard: 0,
            epoch: 0,
        }
    }

    fn explain(sample: &Sample, reason: &SkipReason) -> String {
        let mut explainer = Explainer::new(&StreamConfig::default());
        let text = explainer.explain(pass(0), sample, reason, true).unwrap();
        assert_eq!(explainer.explain(pass(1), sample, reason, false), None);
        text
    }

    #[test]
    fn explanation_names_members_and_key_to_set() {
        let named = sample(&[("input.jpg", JPEG), ("outputs.txt", b"a class")]);
        assert_eq!(
            explain(&named, &SkipReason::NO_IMAGE),
            "has the members input.jpg, outputs.txt and none of data.image_keys = [\"jpg\", \"png\", \"jpeg\", \"webp\"]; \
             input.jpg is a JPEG: add \"input.jpg\" to data.image_keys (the key of a sample ends at the first dot of the \
             file name)"
        );
        let text = explain(&named, &SkipReason::NO_CAPTION);
        assert!(
            text.contains("add \"outputs.txt\" to data.caption_keys"),
            "{text}"
        );
        let odd = explain(&sample(&[("jfif", JPEG)]), &SkipReason::NO_IMAGE);
        assert!(
            odd.starts_with("has the member jfif and")
                && odd.ends_with("\"jfif\" to data.image_keys"),
            "{odd}"
        );
    }

    #[test]
    fn explanation_says_where_a_caption_must_be() {
        let json = sample(&[("jpg", JPEG), ("json", b"{\"caption\": \"a cat\"}")]);
        let text = explain(&json, &SkipReason::NO_CAPTION);
        assert!(
            text.contains("json has the key \"caption\"") && text.ends_with("write it to k.txt"),
            "{text}"
        );
        for lonely in [
            sample(&[("jpg", JPEG)]),
            sample(&[("jpg", JPEG), ("txt2", b" ")]),
        ] {
            let text = explain(&lonely, &SkipReason::NO_CAPTION);
            assert!(text.contains("tar --sort=name"), "{text}");
        }
    }

    #[test]
    fn explanation_finds_members_that_are_not_adjacent() {
        let mut explainer = Explainer::new(&StreamConfig::default());
        let (image, text) = (sample(&[("jpg", JPEG)]), sample(&[("txt", b"t")]));
        let mut explain =
            |id, sample, reason, first| explainer.explain(pass(id), sample, &reason, first);
        assert!(explain(0, &image, SkipReason::NO_CAPTION, true).is_some());
        // The same key in another shard is another sample.
        assert_eq!(explain(1, &text, SkipReason::NO_IMAGE, false), None);
        let found = explain(0, &text, SkipReason::NO_IMAGE, false).unwrap();
        assert!(
            found.starts_with("has the member txt, and other members elsewhere"),
            "{found}"
        );
        assert_eq!(explain(1, &image, SkipReason::NO_CAPTION, false), None);
    }
}
