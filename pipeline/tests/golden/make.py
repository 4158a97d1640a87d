"""Makes the golden images: what Pillow, which the reference's loader uses, makes of images and sizes.

Run with Pillow 13.0.0 and numpy 2.4.6 in this folder: python make.py

- source.png and FILTER-SIZE.png: resizing.
- formats/KIND.EXT and formats/KIND.EXT.png: an image and Pillow's `convert("RGB")` of it; where it has
  transparency, that on white. Pillow can't write 4:1:1, 4:4:0, arithmetic coding and luma coarser than
  chroma: the JPEGs in WRITTEN_ELSEWHERE were written with libjpeg-turbo-rs 0.9 and are only read here.
- photo.jpg, photo-64.png: a photograph-like JPEG and what is left of it at a shorter side of 64.
"""

import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 61, 97
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "nearest": Image.Resampling.NEAREST,
}
FORMATS = pathlib.Path("formats")
# "luma-ACROSSxDOWN": how much coarser luma is sampled than chroma; "black-": black than luma; "cyan-": cyan than magenta.
WRITTEN_ELSEWHERE = ["411.jpg", "440.jpg", "arithmetic.jpg", "cyan-2x1.jpg", "black-2x2.jpg"] + [
    f"luma-{coarser}.jpg" for coarser in ("2x1", "1x2", "2x2", "2x2-mixed", "4x1", "2x1-progressive")
]


def source() -> Image.Image:
    """Smooth slopes, hard edges and noise in one image."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    slopes = np.stack([x * 255 / WIDTH, y * 255 / HEIGHT, (x + y) * 255 / (WIDTH + HEIGHT)], axis=-1)
    edges = ((x // 7 + y // 5) % 2 * 255)[..., None]
    noise = rng.integers(0, 256, (HEIGHT, WIDTH, 3))
    third = np.where((y < 40)[..., None], slopes, np.where((y < 65)[..., None], edges, noise))
    return Image.fromarray(third.astype(np.uint8), "RGB")


def resized(image: Image.Image, resolution: int, resampling: Image.Resampling) -> Image.Image:
    """torchvision.transforms.Resize(resolution) on a Pillow image."""
    short, long = sorted(image.size)
    longer = int(resolution * long / short)
    size = (resolution, longer) if image.width <= image.height else (longer, resolution)
    return image.resize(size, resampling)


def soft(width: int, height: int) -> Image.Image:
    """Colours that change slowly, with an edge and a little noise."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:height, 0:width]
    wave = np.stack([127 + 120 * np.sin(x / 5 + y / 9), x * 255 / width, 255 - y * 255 / height], axis=-1)
    wave = np.where(((x - width / 2) ** 2 + (y - height / 2) ** 2 < height * 3)[..., None], [250, 240, 20], wave)
    return Image.fromarray((wave + rng.normal(0, 4, wave.shape)).clip(0, 255).astype(np.uint8), "RGB")


def png(width: int, height: int, depth: int, colour: int, rows, extra: bytes = b"", interlaced: bool = False) -> bytes:
    """A PNG as Pillow can't write it. `rows(xs, ys)`: packed bytes of those pixels, one row at a time."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    data = b""
    for x0, y0, dx, dy in adam7 if interlaced else [(0, 0, 1, 1)]:
        if x0 < width:
            for y in range(y0, height, dy):
                data += b"\0" + rows(slice(x0, None, dx), y)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def rle_bmp(image: Image.Image) -> bytes:
    """A palette image as an RLE8 BMP: runs for equal neighbours, absolute mode for the rest."""
    pixels, palette = np.asarray(image), np.asarray(image.getpalette(), np.uint8).reshape(-1, 3)
    data = b""
    for row in pixels[::-1]:
        at = 0
        while at < len(row):
            run = 1
            while at + run < len(row) and row[at + run] == row[at] and run < 255:
                run += 1
            if run == 1 and at + 4 <= len(row):
                data += bytes([0, 4, *row[at : at + 4]])
                at += 4
            else:
                data += bytes([run, row[at]])
                at += run
        data += b"\0\0"
    data += b"\0\1"
    table = b"".join(bytes([b, g, r, 0]) for r, g, b in palette).ljust(1024, b"\0")
    info = struct.pack("<IiiHHIIiiII", 40, image.width, image.height, 1, 8, 1, len(data), 2835, 2835, 256, 0)
    head = struct.pack("<2sIHHI", b"BM", 14 + 40 + 1024 + len(data), 0, 0, 14 + 40 + 1024)
    return head + info + table + data


def extended_webp(flags: int, chunks: bytes, width: int = 35, height: int = 29) -> bytes:
    """A WebP whose header has these flags, whatever its chunks are."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<II", 10, flags) + sides + chunks
    return b"RIFF" + struct.pack("<I", len(body)) + body


def of_screen(gif: bytes, width: int, height: int, left: int = 0, top: int = 0) -> bytes:
    """A GIF with another screen, and its frame at another place."""
    frame = gif.index(b",", 13 + 3 * (2 << (gif[10] & 7)))
    place = struct.pack("<HH", left, top)
    return gif[:6] + struct.pack("<HH", width, height) + gif[10 : frame + 1] + place + gif[frame + 5 :]


def formats():
    """Pairs of a file name and its content."""
    image = soft(35, 29)
    grey, palette = image.convert("L"), image.quantize(16)
    shade = Image.fromarray((np.mgrid[0:29, 0:35][1] * 255 // 34).astype(np.uint8), "L")
    clear = image.copy()
    clear.putalpha(shade)
    clear_grey = Image.merge("LA", (grey, shade))

    def save(picture: Image.Image, kind: str, **options) -> bytes:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        return file.getvalue()

    for name, options in {
        "444": {"subsampling": 0},
        "422": {"subsampling": 1},
        "420": {"subsampling": 2},
        "progressive": {"progressive": True},
        "restart": {"restart_marker_blocks": 2},
        "rgb": {"keep_rgb": True},
        "profile": {"icc_profile": b"not a profile"},
    }.items():
        yield f"{name}.jpg", save(image, "JPEG", quality=85, **options)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, which the loader does not do
    yield "turned.jpg", save(image, "JPEG", exif=exif)
    yield "grey.jpg", save(grey, "JPEG")
    yield "grey-progressive.jpg", save(grey, "JPEG", progressive=True)
    cmyk = save(Image.merge("CMYK", (*image.split(), shade.point(lambda v: v // 3))), "JPEG", quality=90)
    yield "cmyk.jpg", cmyk
    adobe = cmyk.index(b"Adobe")
    yield "ycck.jpg", cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :]  # the same numbers, read as YCCK
    for width, height in ((1, 1), (1, 40), (40, 1)):
        yield f"{width}x{height}.jpg", save(soft(width, height), "JPEG")

    for depth in (1, 2, 4, 8):
        levels = np.asarray(grey) >> (8 - depth)

        def packed(xs, y, levels=levels, depth=depth):
            bits = "".join(f"{v:0{depth}b}" for v in levels[y, xs])
            return int(bits.ljust(-len(bits) % 8 + len(bits), "0"), 2).to_bytes(-(-len(bits) // 8), "big")

        yield f"grey-{depth}.png", png(35, 29, depth, 0, packed)
        yield f"grey-{depth}-interlaced.png", png(35, 29, depth, 0, packed, interlaced=True)
    deep = np.asarray(image).astype(">u2") * 257 - 100 * (np.asarray(image) > 128)
    yield "rgb-16.png", png(35, 29, 16, 2, lambda xs, y: deep[y, xs].astype(">u2").tobytes())
    yield "rgb-interlaced.png", png(35, 29, 8, 2, lambda xs, y: np.asarray(image)[y, xs].tobytes(), interlaced=True)
    yield "rgb.png", save(image, "PNG")
    yield "palette.png", save(palette, "PNG")
    yield "palette-clear.png", save(palette, "PNG", transparency=bytes([0, 128, 255, 40]))
    yield "clear.png", save(clear, "PNG")
    yield "clear-grey.png", save(clear_grey, "PNG")

    yield "lossy.webp", save(image, "WEBP", quality=90)
    yield "lossless.webp", save(image, "WEBP", lossless=True)
    yield "lossy-clear.webp", save(clear, "WEBP", quality=90)
    yield "lossless-clear.webp", save(clear, "WEBP", lossless=True, exact=True)
    others = [image.rotate(180), grey.convert("RGB")]
    yield "animated.webp", save(image, "WEBP", lossless=True, save_all=True, append_images=others, duration=80)

    # Headers that name metadata (EXIF 8, XMP 4, ICC 32) or transparency (16) that is not there.
    for kind, options in {"lossy": {"quality": 90}, "lossless": {"lossless": True}}.items():
        chunks = save(image, "WEBP", **options)[12:]
        for name, flags in {"exif": 8, "xmp": 4, "icc": 32, "alpha": 16, "all": 60}.items():
            yield f"{kind}-without-{name}.webp", extended_webp(flags, chunks)
        yield f"{kind}-unknown-chunk.webp", extended_webp(8, b"ABCD" + struct.pack("<I", 5) + b"12345\0" + chunks)
    chunks = save(clear, "WEBP", lossless=True, exact=True)
    yield "lossless-clear-unflagged.webp", extended_webp(0, chunks[chunks.index(b"VP8L") :])
    chunks = save(clear, "WEBP", quality=90)
    yield "lossy-opaque.webp", extended_webp(0, chunks[chunks.index(b"ALPH") :])
    chunks = save(image, "WEBP", lossless=True, save_all=True, append_images=others, duration=80)
    yield "animated-without-exif.webp", extended_webp(2 | 8 | 4, chunks[chunks.index(b"ANIM") :])

    still = save(palette, "GIF")
    yield "beyond-screen.gif", of_screen(still, 20, 10)
    yield "no-screen.gif", of_screen(still, 0, 0)
    yield "part-of-screen.gif", of_screen(still, 50, 40, 7, 9)
    yield "partly-beyond-screen.gif", of_screen(still, 20, 20, 7, 9)
    yield "clear-beyond-screen.gif", of_screen(save(palette, "GIF", transparency=3), 20, 20, 3, 2)

    whole = save(image, "PNG")
    yield "without-end.png", whole[:-12]
    yield "without-checksum.png", whole[:-16]
    yield "half-checksum.png", whole[:-14]
    yield "half-end.png", whole[:-7]

    yield "still.gif", save(palette, "GIF")
    yield "interlaced.gif", save(palette, "GIF", interlace=1)
    yield "clear.gif", save(palette, "GIF", transparency=3)
    yield "animated.gif", save(palette, "GIF", save_all=True, append_images=[o.quantize(16) for o in others], duration=80)

    yield "rgb.bmp", save(image, "BMP")
    yield "palette.bmp", save(palette, "BMP")
    yield "grey.bmp", save(grey, "BMP")
    yield "two.bmp", save(grey.convert("1"), "BMP")
    yield "clear.bmp", save(clear, "BMP")
    yield "runs.bmp", rle_bmp(palette)


def on_white(picture: Image.Image) -> Image.Image:
    """Pillow's `convert("RGB")`, and what is transparent on white."""
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return picture.convert("RGB")


image = source()
image.save("source.png", optimize=True)
for name, resampling in FILTERS.items():
    # At 24 a pixel's middle would lie on the border of two new ones, which box alone has to decide.
    for resolution in (25 if name == "box" else 24, 80):
        resized(image, resolution, resampling).save(f"{name}-{resolution}.png", optimize=True)

FORMATS.mkdir(exist_ok=True)
for name, content in formats():
    (FORMATS / name).write_bytes(content)
for name in (*WRITTEN_ELSEWHERE, *(name for name, _ in formats())):
    with Image.open(FORMATS / name) as picture:
        on_white(picture).save(FORMATS / f"{name}.png", optimize=True)

soft(400, 300).save("photo.jpg", quality=90, subsampling=2)
with Image.open("photo.jpg") as photo:
    resized(photo.convert("RGB"), 64, Image.Resampling.BILINEAR).save("photo-64.png", optimize=True)
