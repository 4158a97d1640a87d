"""The loaders that `loader_vs_peers.py` measures, each in a process of its own: `python benches/loader_peers.py NAME`.

Each is a generator of f32 batches `[16, 3, 512, 512]`, made from a job: `urls` of the shards, number of `samples`, and
settings of the loader. Each runs for at least one pass over the shards.
"""

import io
import itertools
import json
import os
import random
import sys
import time
import urllib.request
from functools import partialmethod

BATCH, SIDE, BUFFER, WORKERS = 16, 512, 1000, 2
MDS_BUCKET = "mds"


def reference_transform(image):
    """The transform of the reference script."""
    import torchvision.transforms.functional as TF
    from torchvision import transforms

    image = TF.resize(image, SIDE, interpolation=transforms.InterpolationMode.BILINEAR)
    top, left, _, _ = transforms.RandomCrop.get_params(image, output_size=(SIDE, SIDE))
    image = TF.to_tensor(TF.crop(image, top, left, SIDE, SIDE))
    return TF.normalize(image, [0.5], [0.5])


class Batches:
    """Converts u8 [B, H, W, C] to f32 [B, C, H, W] in -1..1, in reused buffers: new memory for each batch would double
    the time."""

    def __init__(self, count):
        import torch

        self.buffers = itertools.cycle(torch.empty((BATCH, 3, SIDE, SIDE)) for _ in range(count))

    def __call__(self, images):
        import torch

        batch = next(self.buffers)
        for pixels, image in zip(batch, torch.as_tensor(images), strict=True):
            pixels.copy_(image.permute(2, 0, 1)).mul_(2 / 255).sub_(1)
        return batch


def webdataset_batches(job):
    """The stages of the reference's `SDText2ImageDataset`. Its grouping of members differs from webdataset's own only
    if a shard has a member twice."""
    import webdataset as wds
    from torch.utils.data import default_collate

    def transform(example):
        example["image"] = reference_transform(example["image"])
        return example

    def only_image_and_text(example):
        return {key: value for key, value in example.items() if key in {"image", "text"}}

    dataset = wds.DataPipeline(
        wds.ResampledShards([f"pipe:curl -sSf {url}" for url in job["urls"]]),
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        wds.shuffle(BUFFER),
        wds.decode("pil", handler=wds.ignore_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="text;txt;caption", handler=wds.warn_and_continue),
        wds.map(only_image_and_text),
        wds.map(transform),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False, collation_fn=default_collate),
    ).with_epoch(job["samples"])
    loader = wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=WORKERS, persistent_workers=True)
    for image, _ in loader:
        yield image


def streaming_batches(job):
    """MosaicML Streaming on a first pass; downloads stay in its local cache."""
    import torch
    from PIL import Image
    from streaming import StreamingDataset
    from streaming.base.storage.download import S3Downloader

    class Images(StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            return reference_transform(image), sample["txt"]

    # It signs its requests; a server without credentials refuses signed requests.
    S3Downloader._create_s3_client = partialmethod(S3Downloader._create_s3_client, unsigned=True)
    os.environ |= {"S3_ENDPOINT_URL": job["endpoint"], "AWS_DEFAULT_REGION": "us-east-1"}
    options = {"shuffle": True, "shuffle_block_size": BUFFER, "batch_size": BATCH}
    dataset = Images(remote=f"s3://{MDS_BUCKET}", local=job["cache"], **options)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, drop_last=True)
    for image, _ in loader:
        yield image


def datago_batches(job):
    """datago with its own crop and resize to one aspect ratio, and its raw buffers."""
    import numpy
    from datago import DatagoClient

    folder, names = job["urls"][0].rpartition("/")[0], [url.rpartition("/")[2] for url in job["urls"]]
    config = {
        "source_type": "webdataset",
        "source_config": {
            "url": f"{folder}/{{{','.join(names)}}}",
            "random_sampling": True,
            "concurrent_downloads": job["downloads"],
        },
        "image_config": {
            "crop_and_resize": True,
            "default_image_size": SIDE,
            "downsampling_ratio": 8,
            "min_aspect_ratio": 1.0,
            "max_aspect_ratio": 1.0,
            "image_to_rgb8": True,
        },
        "samples_buffer_size": 64,
        "limit": job["samples"],
    }
    client = DatagoClient(json.dumps(config))
    client.start()
    images, batch = numpy.empty((BATCH, SIDE, SIDE, 3), numpy.uint8), Batches(2)
    while True:
        for image in images:
            payload = client.get_sample().image.get_payload()
            image[:] = numpy.frombuffer(payload.data, numpy.uint8).reshape(image.shape)
        yield batch(images)


def spdl_batches(job):
    """SPDL's pipeline: whole shards in memory, decoding in threads."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    def jpegs(url):
        with urllib.request.urlopen(url) as reply:
            shard = reply.read()
        for name, data in spdl.io.iter_tarfile(shard):
            if name.endswith(".jpg"):
                yield data

    def decode(jpeg):
        x, y = random.random(), random.random()
        filters = (
            f"scale={SIDE}:{SIDE}:flags=bilinear:force_original_aspect_ratio=increase,"
            f"crop={SIDE}:{SIDE}:x=(iw-ow)*{x:.6f}:y=(ih-oh)*{y:.6f},format=pix_fmts=rgb24"
        )
        return spdl.io.decode_packets(spdl.io.demux_image(jpeg), filter_desc=filters)

    batches = Batches(6)  # one is filled, 2 wait in each of two queues, one is with the consumer

    def batch(frames):
        return batches(spdl.io.to_numpy(spdl.io.convert_frames(frames)))

    pipeline = (
        PipelineBuilder()
        .add_source(random.sample(job["urls"], len(job["urls"])))
        .pipe(jpegs, concurrency=job["downloads"])
        .pipe(decode, concurrency=job["threads"])
        .aggregate(BATCH, drop_last=True)
        .pipe(batch)
        .add_sink(2)
        .build(num_threads=job["downloads"] + job["threads"] + 1, max_failures=0)
    )
    with pipeline.auto_stop():
        yield from pipeline


PEERS = {
    "webdataset": (webdataset_batches, {}),
    "streaming": (streaming_batches, {}),
    "datago": (datago_batches, {"downloads": 4}),
    "spdl": (spdl_batches, {"downloads": 2, "threads": 2}),
}
MODULES = {
    "webdataset": "webdataset",
    "streaming": "streaming",
    "datago": "datago",
    "spdl": "spdl.io",
}


def main(name):
    """Runs a loader; prints to its parent "ready", "done" and the result, one line each."""
    import torch
    import torchvision.transforms.functional  # noqa: F401

    __import__(MODULES[name])
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)  # for the arithmetic on batches: more threads would take the decoders' cores
    print("ready", flush=True)
    sys.stdin.readline()
    batches, wanted = PEERS[name][0](job), job["samples"] // BATCH
    start = time.perf_counter()
    first = last = next(batches)
    begun = time.perf_counter()
    for _ in range(wanted - 1):
        last = next(batches)
    ended = time.perf_counter()
    print("done", flush=True)
    sys.stdin.readline()
    for batch in (first, last):
        fine = batch.shape == (BATCH, 3, SIDE, SIDE) and batch.dtype == torch.float32 and batch.is_contiguous()
        if not fine or batch.min() < -1 or batch.max() > 1 or batch.std() < 0.1:
            raise SystemExit(f"{name}: unexpected batch: {batch.shape} {batch.dtype}")
    result = {"first_batch_seconds": begun - start, "elapsed_seconds": ended - start}
    print(json.dumps(result), flush=True)
    batches.close()


if __name__ == "__main__":
    main(sys.argv[1])
