//! Reused work space.

/// The first `bytes` bytes of `buffer`. A buffer that is too small is replaced by zeros; otherwise the bytes
/// keep their values.
pub(super) fn grow_to(buffer: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if buffer.len() < bytes {
        // `resize` would copy the old values, which no caller needs.
        *buffer = vec![0; bytes];
    }
    &mut buffer[..bytes]
}
