//! Identity of an offline run: the name of its folder, `offline-run-YYYYMMDD_HHMMSS-ID` in UTC.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

use crate::track::{TrackError, io};

/// Start of the name of an offline run's folder, for `wandb sync`.
const PREFIX: &str = "offline-run-";
/// Start and ID of a run, in the name of its folder.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Identity {
    /// Seconds since 1970.
    pub(super) start: u64,
    pub(super) id: String,
}

impl Identity {
    /// Identity of a run that starts now in `folder`.
    pub(super) fn new(folder: &Path) -> Self {
        let start = since_1970();
        let seed = format!("{start:?} {} {}", std::process::id(), folder.display());
        const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
        let letter = |byte: &u8| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]);
        Self {
            start: start.as_secs(),
            id: Sha256::digest(seed).iter().take(8).map(letter).collect(),
        }
    }

    /// Reads `offline-run-YYYYMMDD_HHMMSS-ID`.
    fn parse(folder: &str) -> Option<Self> {
        let (time, id) = folder.strip_prefix(PREFIX)?.split_once('-')?;
        let (date, clock) = time.split_once('_')?;
        let part = |text: &str, range: std::ops::Range<usize>| -> Option<u8> {
            text.get(range)?.parse().ok()
        };
        let month = part(date, 4..6)?.try_into().ok()?;
        let date =
            time::Date::from_calendar_date(date.get(..4)?.parse().ok()?, month, part(date, 6..8)?);
        let clock =
            time::Time::from_hms(part(clock, 0..2)?, part(clock, 2..4)?, part(clock, 4..6)?);
        let start = OffsetDateTime::new_utc(date.ok()?, clock.ok()?).unix_timestamp();
        let plain = !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric());
        Some(Self {
            start: u64::try_from(start).ok()?,
            id: plain.then(|| id.to_owned())?,
        })
    }

    /// Name of the folder.
    pub(super) fn folder(&self) -> String {
        let start = i64::try_from(self.start).unwrap_or_default();
        let start =
            OffsetDateTime::from_unix_timestamp(start).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let (year, month, day) = start.to_calendar_date();
        let (hour, minute, second) = start.to_hms();
        let month = u8::from(month);
        format!(
            "{PREFIX}{year:04}{month:02}{day:02}_{hour:02}{minute:02}{second:02}-{}",
            self.id
        )
    }

    /// Path of the log in the folder `wandb`.
    pub(super) fn log(&self) -> PathBuf {
        Path::new(&self.folder()).join(format!("run-{}.wandb", self.id))
    }
}

/// Time of the clock.
pub(super) fn since_1970() -> Duration {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default()
}

/// The newest offline run in a folder, by its name.
pub(super) fn newest(folder: &Path) -> Result<Option<Identity>, TrackError> {
    let entries = match folder.read_dir() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(io(folder))?,
    };
    let mut newest: Option<Identity> = None;
    for entry in entries {
        let name = entry.map_err(io(folder))?.file_name();
        if let Some(run) = name.to_str().and_then(Identity::parse)
            && newest
                .as_ref()
                .is_none_or(|newest| newest.start < run.start)
        {
            newest = Some(run);
        }
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_is_read_from_the_folders_name() {
        let identity = Identity {
            start: 1_795_745_778,
            id: "tm413ed4".to_owned(),
        };
        assert_eq!(identity.folder(), "offline-run-20261127_021618-tm413ed4");
        assert_eq!(Identity::parse(&identity.folder()), Some(identity));
        for other in [
            "offline-run-",
            "offline-run-20261327_021618-a",
            "offline-run-é-a",
            "run-1-2",
        ] {
            assert_eq!(Identity::parse(other), None);
        }
    }
}
