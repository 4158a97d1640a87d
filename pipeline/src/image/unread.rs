//! Image formats that are recognised, but not read.

/// The name of the format of `bytes`, in lower case: `avif`, `heic`, `jpeg2000`, `jxl`, `tiff` …
pub(super) fn unread_format(bytes: &[u8]) -> Option<&'static str> {
    const MAGIC: &[(&[u8], &str)] = &[
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
        (b"II+\0", "tiff"),
        (b"MM\0+", "tiff"),
        (b"\0\0\0\x0CjP  \r\n\x87\n", "jpeg2000"),
        (b"\xFF\x4F\xFF\x51", "jpeg2000"),
        (b"\0\0\0\x0CJXL \r\n\x87\n", "jxl"),
        (b"\xFF\x0A", "jxl"),
        (b"\0\0\x01\0", "ico"),
        (b"8BPS", "psd"),
        (b"qoif", "qoi"),
        (b"DDS ", "dds"),
    ];
    if bytes.get(4..8) == Some(b"ftyp") {
        return iso_media(bytes);
    }
    let found = MAGIC.iter().find(|(magic, _)| bytes.starts_with(magic));
    found.map(|(_, name)| *name)
}

/// The format of an ISO media file, by its brands: the major one and, after a version, the compatible ones.
fn iso_media(bytes: &[u8]) -> Option<&'static str> {
    let size = u32::from_be_bytes(*bytes.first_chunk()?);
    let end = usize::try_from(size).ok()?.min(bytes.len());
    let (brands, _) = bytes.get(8..end)?.as_chunks::<4>();
    let has = |wanted: &[&[u8; 4]]| brands.iter().any(|brand| wanted.contains(&brand));
    if has(&[b"avif", b"avis"]) {
        Some("avif")
    } else if has(&[
        b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1",
    ]) {
        Some("heic")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unread_formats_are_named_by_content() {
        for (bytes, name) in [
            (
                b"\0\0\0\x1Cftypavif\0\0\0\0mif1miafavif".as_slice(),
                Some("avif"),
            ),
            (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", Some("avif")),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", Some("heic")),
            (b"\0\0\0\x14ftypmp42\0\0\0\0isom", None),
            (b"MM\0*\0\0\0\x08", Some("tiff")),
            (b"\xFF\x0A\xFA\x01", Some("jxl")),
            (b"\xFF\x4F\xFF\x51\0", Some("jpeg2000")),
            (b"\xFF\xD8\xFF", None),
            (b"", None),
            (b"\0\0\0\x02ftyp", None),
        ] {
            assert_eq!(unread_format(bytes), name, "{bytes:?}");
        }
    }
}
