//! Headers of the tars that coffey writes.

/// The header of a member of `size` bytes: equal members give equal bytes on any machine.
#[must_use]
pub fn member_header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}
