//! The checks of the folder and the output before packing.

use std::io;
use std::path::{Path, PathBuf};

use super::PackError;
use crate::shard::{Location, ShardUrl};
use crate::source::Sources;

/// Checks that the local folder `out` can be the output of a pack of `folder`.
///
/// # Errors
/// [`PackError::Place`] if it is a file, or is `folder` or in it.
pub fn check_apart(folder: &Path, out: &Path) -> Result<(), PackError> {
    let refused = |cause: String| PackError::Place {
        place: format!("--out {}", out.display()),
        cause,
    };
    if out.is_file() {
        return Err(refused("is a file, not a folder".to_owned()));
    }
    match is_within(out, folder) {
        Ok(false) => Ok(()),
        Ok(true) => Err(refused(
            "is in the folder of images; name a folder that is not in it".to_owned(),
        )),
        Err(error) => Err(refused(error.to_string())),
    }
}

/// Whether the local `place`, which need not be there yet, is `folder` or in it.
///
/// # Errors
/// When a path can't be resolved.
pub fn is_within(place: &Path, folder: &Path) -> io::Result<bool> {
    Ok(resolved(place)?.starts_with(resolved(folder)?))
}

/// The absolute path without links, also of a folder that is not there yet.
fn resolved(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let found = path.ancestors().find_map(|above| {
        let real = above.canonicalize().ok()?;
        let rest = path.strip_prefix(above).ok()?;
        Some(real.join(rest))
    });
    Ok(found.unwrap_or(path))
}

/// Checks that `folder` is a folder with images.
pub(super) async fn images_of(sources: &Sources, folder: &ShardUrl) -> Result<(), PackError> {
    let Location::File(path) = folder.location() else {
        return Ok(());
    };
    if path.is_file() {
        return Err(PackError::Place {
            place: folder.to_string(),
            cause: "is a file; pack takes a folder of images".to_owned(),
        });
    }
    let listed = sources.image_folder(path).await?;
    if listed.len() > 0 {
        return Ok(());
    }
    let cause = match listed.shard_below() {
        Some(shard) => format!(
            "pack takes a folder of images; this one holds shards, such as {}",
            shard.display()
        ),
        None => format!(
            "no images (data.image_keys = {:?} are their extensions), but {}",
            sources.members().images,
            listed.contents()
        ),
    };
    Err(PackError::NoImages {
        folder: folder.to_string(),
        cause,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn output_is_apart_from_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("photos/sub")).unwrap();
        fs::write(at("file"), "").unwrap();
        symlink("photos", at("link")).unwrap();
        let refused = |out: &str| {
            let checked = check_apart(&at("photos"), &at(out));
            checked.map_err(|error| error.to_string()).err()
        };
        for out in [
            "photos",
            "photos/sub",
            "photos/new/er",
            "link/new",
            "out/../photos",
        ] {
            let _ = fs::create_dir(at("out"));
            let error = refused(out).unwrap();
            assert!(error.contains("the folder of images"), "{out}: {error}");
        }
        assert!(
            refused("file")
                .unwrap()
                .ends_with("is a file, not a folder")
        );
        for out in ["photos2", "out", "."] {
            assert_eq!(refused(out), None, "{out}");
        }
    }
}
