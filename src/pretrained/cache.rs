//! Folders that keep what was fetched, and the lock that makes processes take turns.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::{PretrainedError, io};
use crate::environment;

/// `$XDG_CACHE_HOME` or `~/.cache`; `set` names the variable that makes it unnecessary.
pub(super) fn home(
    set: &'static str,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<PathBuf, PretrainedError> {
    environment::caches(variable).ok_or(PretrainedError::NoHome { set })
}

/// Waits until no other process fetches into what the lock file stands for, and keeps others out until it is dropped.
pub(super) fn lock(path: &Path, model: &str) -> Result<File, PretrainedError> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(io(folder))?;
    }
    let file = File::create(path).map_err(io(path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            errln!("waiting for another process that fetches {model}");
            file.lock().map_err(io(path))?;
        }
        Err(TryLockError::Error(error)) => return Err(io(path)(error)),
    }
    Ok(file)
}

/// Writes a small file so that it is there whole or not there.
pub(super) fn write(path: &Path, text: &str) -> Result<(), PretrainedError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(io(folder))?;
    let aside = tempfile::NamedTempFile::new_in(folder).map_err(io(folder))?;
    fs::write(aside.path(), text).map_err(io(path))?;
    aside
        .persist(path)
        .map_err(|error| io(path)(error.error))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_environment_says() {
        let with = |pairs: &'static [(&str, &str)]| {
            home("X", |name| {
                let found = pairs.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let path = |pairs| with(pairs).unwrap();
        assert_eq!(path(&[("HOME", "/h")]), Path::new("/h/.cache"));
        assert_eq!(
            path(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]),
            Path::new("/c")
        );
        assert!(with(&[]).unwrap_err().is_config());
    }

    #[test]
    fn a_lock_is_held_by_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/.lock");
        let held = lock(&path, "a/b").unwrap();
        let other = File::open(&path).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        other.try_lock().unwrap();
    }
}
