//! Files of a folder that are in no sample.

use std::fmt::Display;
use std::path::PathBuf;

use super::names::MemberKeys;
use crate::plural::counted;

/// A number of things, and the first of them.
#[derive(Debug)]
pub(super) struct Count<T> {
    count: usize,
    first: Option<T>,
}

impl<T> Default for Count<T> {
    fn default() -> Self {
        Self {
            count: 0,
            first: None,
        }
    }
}

impl<T> Count<T> {
    pub(super) fn add<U: Into<T>>(&mut self, what: impl FnOnce() -> U) {
        self.count += 1;
        if self.first.is_none() {
            self.first = Some(what().into());
        }
    }
}

/// Files that are in no sample although their names look so.
#[derive(Debug, Default)]
pub(super) struct PassedOver {
    /// Captions without an image.
    pub(super) captions: Count<PathBuf>,
    /// Images beside another one of the same name.
    pub(super) images: Count<PathBuf>,
    /// Links to nothing, and links to a folder that contains the link.
    pub(super) links: Count<PathBuf>,
    /// Rows of metadata files for images that are not there.
    pub(super) rows: Count<String>,
    /// A metadata file in Parquet.
    pub(super) parquet: Option<PathBuf>,
    /// A shard in the folder or below it.
    pub(super) shard: Option<PathBuf>,
    /// Other files.
    pub(super) others: Count<PathBuf>,
}

impl PassedOver {
    /// Describes each kind.
    pub(super) fn describe(&self, keys: &MemberKeys) -> Vec<String> {
        let mut all = Vec::new();
        if let Some(first) = &self.captions.first {
            let example = keys.images.first().map_or("jpg", String::as_str);
            all.push(format!(
                "{} passed over: no image with the name of the file; the first is {}, whose image would be {}",
                counted(self.captions.count, "caption"),
                first.display(),
                first.with_extension(example).display()
            ));
        }
        if let Some(first) = &self.images.first {
            all.push(format!(
                "{} passed over: another image has the same name and is read; the first is {}",
                counted(self.images.count, "image"),
                first.display()
            ));
        }
        if let Some(first) = &self.links.first {
            all.push(format!(
                "{} passed over: to nothing, or to a folder that contains the link; the first is {}",
                counted(self.links.count, "link"),
                first.display()
            ));
        }
        if let Some(first) = &self.rows.first {
            all.push(format!(
                "{} passed over: no such image; the first is {first}",
                counted(self.rows.count, "row"),
            ));
        }
        if let Some(file) = &self.parquet {
            all.push(format!(
                "{} is not read: write metadata.jsonl or metadata.csv",
                file.display()
            ));
        }
        all
    }

    /// The files of a folder without images.
    pub(super) fn contents(&self) -> String {
        let kinds = [(&self.captions, "caption"), (&self.others, "other file")];
        let kinds: Vec<String> = kinds
            .into_iter()
            .filter_map(|(files, noun)| {
                let first = files.first.as_ref()?.display();
                let files = counted(files.count, noun);
                Some(format!("{files} (the first is {first})"))
            })
            .collect();
        match kinds.is_empty() {
            true => "no files".to_owned(),
            false => kinds.join(" and "),
        }
    }
}

/// A number of files that can't be read, with the first.
#[derive(Debug, Default)]
pub(super) struct UnreadFiles(Count<String>);

impl UnreadFiles {
    pub(super) fn add(&mut self, file: impl Display, cause: impl Display) {
        self.0.add(|| format!("{file}: {cause}"));
    }

    /// The message; `None` if every file was read.
    pub(super) fn describe(&self) -> Option<String> {
        let first = self.0.first.as_ref()?;
        let files = counted(self.0.count, "file");
        Some(format!("{files} can't be read; the first is {first}"))
    }
}
