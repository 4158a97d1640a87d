//! Cache folders of fetched models, and the lock between processes that fetch the same model.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::{PretrainedError, io};
use crate::process;

/// `$XDG_CACHE_HOME`, else `~/.cache`; `set` is the variable that the error suggests.
pub(super) fn home(
    set: &'static str,
    env_var: impl Fn(&str) -> Option<String>,
) -> Result<PathBuf, PretrainedError> {
    process::cache_dir(env_var).ok_or(PretrainedError::NoHome { set })
}

/// Takes the lock at `path`, waiting for other processes; it is released when the file is dropped.
pub(super) fn lock(path: &Path, model: &str) -> Result<File, PretrainedError> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(io(folder))?;
    }
    let file = File::create(path).map_err(io(path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            errln!("waiting for another process that is fetching {model}");
            file.lock().map_err(io(path))?;
        }
        Err(TryLockError::Error(error)) => return Err(io(path)(error)),
    }
    Ok(file)
}

/// Writes a small file atomically.
pub(super) fn write(path: &Path, text: &str) -> Result<(), PretrainedError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(io(folder))?;
    let file = tempfile::NamedTempFile::new_in(folder).map_err(io(folder))?;
    fs::write(file.path(), text).map_err(io(path))?;
    file.persist(path)
        .map_err(|error| io(path)(error.error))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::env_of;

    #[test]
    fn cache_home_comes_from_the_environment() {
        let path = |variables: &[(&str, &str)]| home("X", env_of(variables)).unwrap();
        assert_eq!(path(&[("HOME", "/h")]), Path::new("/h/.cache"));
        assert_eq!(
            path(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]),
            Path::new("/c")
        );
        assert!(home("X", env_of(&[])).unwrap_err().is_config());
    }

    #[test]
    fn lock_excludes_a_second_holder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/.lock");
        let held = lock(&path, "a/b").unwrap();
        let other = File::open(&path).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        other.try_lock().unwrap();
    }
}
