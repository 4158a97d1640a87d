"""Makes the golden images: Pillow's resizing, which the pipeline's must equal within one grey level.

Run with Pillow 13.0.0 and numpy 2.4.6 in this folder: python make.py
"""

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 61, 97
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


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


image = source()
image.save("source.png", optimize=True)
for name, resampling in FILTERS.items():
    for resolution in (24, 80):
        resized(image, resolution, resampling).save(f"{name}-{resolution}.png", optimize=True)
