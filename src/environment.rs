//! What the environment says: variables, and where caches belong.

use std::path::PathBuf;

/// A variable of the environment; an empty one counts as unset.
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// `$XDG_CACHE_HOME` or `~/.cache`, if either is known.
pub(crate) fn caches(variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let home = || Some(PathBuf::from(variable("HOME")?).join(".cache"));
    variable("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)
}
