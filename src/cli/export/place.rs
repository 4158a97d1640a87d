//! The output of `coffey export`: one file or one folder, written atomically where nothing was.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

/// Prefix of the names of files and folders that are being written.
const UNFINISHED: &str = ".export-";

/// A file or folder that does not exist and can be written.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    /// The folder that it is in, which may not exist either.
    parent: PathBuf,
}

impl Place {
    /// Checks that `path` is free and can be written, as a folder or as a `.safetensors` file. Leaves nothing behind.
    ///
    /// # Errors
    /// A message about `--out`.
    pub(super) fn check(path: &Path, is_folder: bool) -> Result<Self, String> {
        let shown = path.display();
        if path.to_string_lossy().contains("://") {
            return Err(format!(
                "--out {shown}: --out takes a local path, not a URL"
            ));
        }
        if path.symlink_metadata().is_ok() {
            return Err(format!(
                "--out {shown}: exists, and nothing is overwritten; name another place"
            ));
        }
        let is_weights = |extension: &OsStr| extension == "safetensors";
        let has_ending = path.extension().is_some_and(is_weights);
        if is_folder && has_ending {
            return Err(format!(
                "--out {shown}: names a file, and this is written as a folder"
            ));
        }
        if !is_folder && !has_ending {
            return Err(format!("--out {shown}: must be a .safetensors file"));
        }
        let unwritable = |folder: &Path, error: io::Error| {
            format!(
                "--out {shown} can't be written: {}: {error}",
                folder.display()
            )
        };
        let absolute = std::path::absolute(path).map_err(|error| unwritable(path, error))?;
        let parent = absolute.parent().unwrap_or(&absolute).to_owned();
        // Missing folders are created in the first that is there.
        let there = parent.ancestors().find(|folder| folder.exists());
        let there = there.unwrap_or(&parent);
        tempfile::tempfile_in(there).map_err(|error| unwritable(there, error))?;
        Ok(Self {
            path: absolute,
            parent,
        })
    }

    /// Writes the file with `fill` under a hidden name beside it, flushes it to the disk and renames it.
    ///
    /// # Errors
    /// When it can't be written, or something is there by then.
    pub(super) fn write_file(
        &self,
        fill: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.written(|| {
            let mut builder = tempfile::Builder::new();
            builder.prefix(UNFINISHED);
            // The umask applies to mode 0666. The default of temporary files is 0600.
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
            let file = builder.tempfile_in(&self.parent)?;
            let mut writer = BufWriter::new(file.as_file());
            fill(&mut writer)?;
            writer.flush()?;
            drop(writer);
            file.as_file().sync_all()?;
            file.persist_noclobber(&self.path)?;
            Ok(())
        })
    }

    /// Fills a folder under a hidden name beside it, flushes it to the disk and renames it.
    ///
    /// # Errors
    /// As [`Place::write_file`].
    pub(super) fn write_folder(
        &self,
        fill: impl FnOnce(&Path) -> io::Result<()>,
    ) -> io::Result<()> {
        self.written(|| {
            let unfinished = tempfile::Builder::new()
                .prefix(UNFINISHED)
                .tempdir_in(&self.parent)?;
            let content = unfinished.path().join("content");
            std::fs::create_dir(&content)?;
            fill(&content)?;
            for entry in content.read_dir()? {
                File::open(entry?.path())?.sync_all()?;
            }
            File::open(&content)?.sync_all()?;
            renameat_with(CWD, &content, CWD, &self.path, RenameFlags::NOREPLACE)?;
            Ok(())
        })
    }

    /// Creates missing folders, writes, and flushes the folder's entry; errors name the output.
    fn written(&self, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let written = std::fs::create_dir_all(&self.parent)
            .and_then(|()| write())
            .and_then(|()| File::open(&self.parent)?.sync_all());
        written.map_err(|error| {
            let message = format!("--out {} can't be written: {error}", self.path.display());
            io::Error::new(error.kind(), message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_overwritten_and_nothing_stays_of_a_failure() {
        let root = tempfile::tempdir().unwrap();
        let names = || {
            let entries = root.path().read_dir().unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.collect();
            names.sort();
            names
        };
        let file = root.path().join("a.safetensors");
        let place = Place::check(&file, false).unwrap();
        assert!(names().is_empty());
        let full = || Err(io::Error::other("full"));
        let error = place.write_file(|_| full()).unwrap_err().to_string();
        assert!(
            error.contains("a.safetensors") && error.contains("full"),
            "{error}"
        );
        assert!(names().is_empty());
        place.write_file(|file| file.write_all(b"x")).unwrap();
        place.write_file(|file| file.write_all(b"y")).unwrap_err();
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
        let folder = root.path().join("b/unet");
        let place = Place::check(&folder, true).unwrap();
        place.write_folder(|_| full()).unwrap_err();
        let fill = |text: &'static str| move |at: &Path| std::fs::write(at.join("c"), text);
        place.write_folder(fill("x")).unwrap();
        place.write_folder(fill("y")).unwrap_err();
        assert_eq!(std::fs::read(folder.join("c")).unwrap(), b"x");
        assert_eq!(names(), ["a.safetensors", "b"]);
        for (path, is_folder, word) in [
            (&file, false, "exists"),
            (&folder, true, "exists"),
            (&root.path().join("c"), false, ".safetensors file"),
            (&root.path().join("c.safetensors"), true, "as a folder"),
            (&file.join("c.safetensors"), false, "can't be written"),
            (&"s3://a/b.safetensors".into(), false, "not a URL"),
        ] {
            let error = Place::check(path, is_folder).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
