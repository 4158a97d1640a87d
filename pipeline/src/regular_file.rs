//! Opening of regular files. A named pipe would block until it has a writer, and a device may have no end.

use std::fs::{self, File, FileType};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::open_files;

/// Opens a regular file, or a link to one, for reading.
///
/// # Errors
/// The error of the system; for a folder, named pipe, socket or device one that says so.
pub fn open(path: &Path) -> io::Result<File> {
    match other_kind(fs::metadata(path)?.file_type()) {
        None => open_files::retry(|| File::open(path)),
        Some((kind, what)) => Err(io::Error::new(kind, format!("it is a {what}, not a file"))),
    }
}

/// Refuses what is neither a regular file nor a folder: opening it could wait without end. What is not there is no fault.
///
/// # Errors
/// One that says what it is.
pub fn check_file_or_folder(path: &Path) -> io::Result<()> {
    let Ok(found) = fs::metadata(path) else {
        return Ok(());
    };
    match other_kind(found.file_type()) {
        Some((kind, what)) if !found.is_dir() => {
            Err(io::Error::new(kind, format!("it is a {what}, not a file")))
        }
        _ => Ok(()),
    }
}

fn other_kind(found: FileType) -> Option<(ErrorKind, &'static str)> {
    if found.is_file() {
        return None;
    }
    Some(if found.is_dir() {
        (ErrorKind::IsADirectory, "folder")
    } else if found.is_fifo() {
        (ErrorKind::InvalidInput, "named pipe")
    } else if found.is_socket() {
        (ErrorKind::InvalidInput, "socket")
    } else {
        (ErrorKind::InvalidInput, "device")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_file_refuses_folders_pipes_and_devices() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), rustix::fs::Mode::RWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        fs::write(at("file"), "text").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        std::os::unix::fs::symlink("pipe", at("link-to-pipe")).unwrap();
        for (path, what) in [
            (folder.path().to_owned(), "folder"),
            (at("pipe"), "named pipe"),
            (at("link-to-pipe"), "named pipe"),
            (at("socket"), "socket"),
            ("/dev/zero".into(), "device"),
        ] {
            let error = open(&path).unwrap_err().to_string();
            assert_eq!(error, format!("it is a {what}, not a file"));
        }
        let text = std::io::read_to_string(open(&at("link")).unwrap()).unwrap();
        assert_eq!(text, "text");
        assert_eq!(open(&at("none")).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
