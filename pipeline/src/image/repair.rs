//! Files whose headers contradict their content, corrected so that a strict decoder reads them as Pillow does.
//!
//! Metadata that a WebP announces and does not hold, GIF frames beyond the screen, a PNG without its end.

use std::borrow::Cow;

use image::ImageFormat;

/// The file to be decoded: `bytes`, or a corrected copy.
pub(super) fn repaired(format: ImageFormat, bytes: &[u8]) -> Cow<'_, [u8]> {
    let copy = match format {
        ImageFormat::WebP => webp(bytes),
        ImageFormat::Gif => gif(bytes),
        ImageFormat::Png => png(bytes),
        _ => None,
    };
    copy.map_or(Cow::Borrowed(bytes), Cow::Owned)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_le_bytes(*field))
}

/// Removes flags of metadata, which is not used, and corrects the flag of transparency. The flags may name parts that are not
/// there; transparency of a lossless image needs no flag.
fn webp(bytes: &[u8]) -> Option<Vec<u8>> {
    const FLAGS_AT: usize = 20;
    const ANIMATION: u8 = 0x02;
    const ALPHA: u8 = 0x10;
    if bytes.get(12..16)? != b"VP8X" {
        return None;
    }
    let flags = *bytes.get(FLAGS_AT)?;
    let mut wanted = flags & (ANIMATION | ALPHA);
    if flags & ANIMATION == 0 {
        wanted = if webp_has_alpha(bytes, flags & ALPHA != 0)? {
            ALPHA
        } else {
            0
        };
    }
    (wanted != flags).then(|| {
        let mut copy = bytes.to_vec();
        copy[FLAGS_AT] = wanted;
        copy
    })
}

/// Whether the image of an extended WebP has transparency. `None` if there is no image.
fn webp_has_alpha(bytes: &[u8], is_flagged: bool) -> Option<bool> {
    let mut at = 12;
    let mut has_alpha_chunk = false;
    loop {
        let kind = bytes.get(at..at + 4)?;
        let size = u32::from_le_bytes(*bytes.get(at + 4..)?.first_chunk()?);
        match kind {
            b"ALPH" => has_alpha_chunk = true,
            b"VP8 " => return Some(is_flagged && has_alpha_chunk),
            // After the signature byte: 14 bits each of width and height, then the flag.
            b"VP8L" => return Some(bytes.get(at + 12)? & 0x10 != 0),
            _ => {}
        }
        // Chunks have even sizes.
        let size = usize::try_from(size).ok()?.checked_next_multiple_of(2)?;
        at = at.checked_add(8)?.checked_add(size)?;
    }
}

/// The part of a GIF before its first frame.
struct GifHead {
    /// Offset of the frame's descriptor.
    frame_at: usize,
    has_transparency: bool,
}

const GIF_SCREEN_AT: usize = 6;
const GIF_BLOCKS_AT: usize = 13;
/// Size of a frame's descriptor. Bytes.
const GIF_FRAME: usize = 10;

/// Size of the colour table that a field of flags announces. Bytes.
fn colour_table(flags: u8) -> usize {
    if flags & 0x80 == 0 {
        0
    } else {
        3 * (2 << (flags & 7))
    }
}

impl GifHead {
    fn read(bytes: &[u8]) -> Option<Self> {
        const EXTENSION: u8 = 0x21;
        const GRAPHIC_CONTROL: u8 = 0xF9;
        const FRAME: u8 = 0x2C;
        let mut at = GIF_BLOCKS_AT + colour_table(*bytes.get(10)?);
        let mut has_transparency = false;
        while *bytes.get(at)? == EXTENSION {
            // A label, then blocks up to an empty one.
            if *bytes.get(at + 1)? == GRAPHIC_CONTROL {
                has_transparency = bytes.get(at + 3)? & 1 != 0;
            }
            at += 2;
            loop {
                let block = usize::from(*bytes.get(at)?);
                at += 1 + block;
                if block == 0 {
                    break;
                }
            }
        }
        (*bytes.get(at)? == FRAME).then_some(Self {
            frame_at: at,
            has_transparency,
        })
    }
}

/// The colour of a GIF's pixels outside its first frame: the first one of the frame's colours. `None` for a frame with
/// a transparent colour, and for other formats.
pub(super) fn colour_outside(format: ImageFormat, bytes: &[u8]) -> Option<[u8; 3]> {
    if format != ImageFormat::Gif {
        return None;
    }
    let head = GifHead::read(bytes)?;
    if head.has_transparency {
        return None;
    }
    let flags = *bytes.get(head.frame_at + GIF_FRAME - 1)?;
    let table_at = match colour_table(flags) {
        0 => GIF_BLOCKS_AT,
        _ => head.frame_at + GIF_FRAME,
    };
    bytes.get(table_at..)?.first_chunk().copied()
}

/// Enlarges the screen to the first frame.
fn gif(bytes: &[u8]) -> Option<Vec<u8>> {
    let at = GifHead::read(bytes)?.frame_at;
    let mut copy = None;
    for side in [0, 2] {
        let end = u16_at(bytes, at + 1 + side)?.checked_add(u16_at(bytes, at + 5 + side)?)?;
        if u16_at(bytes, GIF_SCREEN_AT + side)? < end {
            let copy = copy.get_or_insert_with(|| bytes.to_vec());
            copy[GIF_SCREEN_AT + side..][..2].copy_from_slice(&end.to_le_bytes());
        }
    }
    copy
}

/// Completes a PNG that ends after a chunk of image data, or in that chunk's checksum.
fn png(bytes: &[u8]) -> Option<Vec<u8>> {
    const END: [u8; 12] = [0, 0, 0, 0, b'I', b'E', b'N', b'D', 0xAE, 0x42, 0x60, 0x82];
    let mut at = 8;
    let mut last = None;
    // The end of a file may be in the middle of a chunk's header.
    while let Some(header) = bytes.get(at..at + 8) {
        let size = u32::from_be_bytes(*header.first_chunk()?);
        let kind = &header[4..];
        if kind == b"IEND" && bytes.len() >= at + END.len() {
            return None;
        }
        if kind != b"IEND" {
            last = Some((kind, at + 4));
        }
        at = at
            .checked_add(8)?
            .checked_add(usize::try_from(size).ok()?)?;
        if at > bytes.len() {
            return None;
        }
        at += 4;
    }
    let (kind, start) = last?;
    if kind != b"IDAT" {
        return None;
    }
    let data_end = start
        + 4
        + usize::try_from(u32::from_be_bytes(*bytes.get(start - 4..)?.first_chunk()?)).ok()?;
    let data = bytes.get(start..data_end)?;
    let mut sum = flate2::Crc::new();
    sum.update(data);
    let mut copy = bytes[..data_end].to_vec();
    match bytes.get(data_end..data_end + 4) {
        Some(whole) => copy.extend(whole),
        None => copy.extend(sum.sum().to_be_bytes()),
    }
    copy.extend(END);
    Some(copy)
}
