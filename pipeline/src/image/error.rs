//! Why an image is not used.

/// Why an image can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not an image, or of a format that is not recognised.
    #[error("is not an image of a known format (JPEG, PNG, WebP, GIF, BMP)")]
    UnknownFormat,
    /// An image of a format that is not read; its name, in lower case.
    #[error("is {0}, which is not read; JPEG, PNG, WebP, GIF and BMP are")]
    UnreadFormat(&'static str),
    /// Larger than allowed.
    #[error("is {width}x{height} pixels; at most {max_pixels} are allowed")]
    TooLarge {
        /// Pixels across.
        width: u32,
        /// Pixels down.
        height: u32,
        /// The limit.
        max_pixels: u64,
    },
    /// Damaged, cut off or of a kind the decoder lacks.
    #[error("can't be decoded: {0}")]
    Damaged(String),
}
