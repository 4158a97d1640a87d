"""Loading images from S3: `coffey bench` against other loaders, on this machine, in one run.

    python benches/loader_vs_peers.py --corpus DIR --server s3s-fs [--coffey target/release/coffey] [--only NAME,...]
        [--rounds 3] [--samples N] [--out FILE.json] [-s KEY=VALUE ...] [--lock FILE]

`benches/README.md` lists what to install. DIR has shards of JPEG, text and json in LAION's layout. They are uploaded to
an S3 server on loopback (s3s-fs, no credentials), which shares the machine's cores with the loader. All loaders do the
same work with the same shards:

    S3 or HTTP -> JPEG decoding -> shorter side 512, antialiased bilinear -> random 512 x 512 crop -> -1..1
    -> batches of 16, [16, 3, 512, 512] in f32

    coffey         `coffey bench`, shards drawn with replacement, shuffle buffer of 1,000; every JPEG at full size
    coffey-scaled  the same with `image.scaled_decode`: large JPEGs are decoded at 1/2, 1/4 or 1/8
    webdataset     the loader of diffusers' `train_lcm_distill_sd_wds.py`: the same stages with the same settings, 2
                   workers, Pillow and torchvision; `pipe:curl` in place of its slower `pipe:aws s3 cp`
    streaming      MosaicML Streaming: the same photographs as MDS shards, made beforehand and served from the same
                   server; 2 workers, the same Pillow code, an empty local cache each time
    datago         Photoroom's datago over HTTP; its only resize is Lanczos, its only crop the centre; no shuffle buffer
    spdl           Meta's SPDL over HTTP, FFmpeg's decoder and `scale` filter (bilinear); no shuffle buffer

The loaders alternate (`--rounds` times), each in a new process. Each run measures:

    images/s       all samples except those of the first batch, divided by the time from the first batch to the last
    first batch    seconds from the construction of the loader (after the import of modules) to the first batch
    CPU            milliseconds an image of the loader with its child processes, and of the server, from the construction
                   of the loader to the last batch
    RSS, PSS       MiB: the largest sum over the loader's processes; RSS (every 0.1 s) counts a shared page once for each
                   process, PSS (every second) once in total. Imported modules are included

The table has the medians of the rounds, the file all rounds.
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from loader_peers import BATCH, BUFFER, MDS_BUCKET, PEERS, SIDE

HERE = Path(__file__).resolve().parent
TICK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
BUCKET = "shards"
COFFEY = {"coffey": "false", "coffey-scaled": "true"}  # image.scaled_decode
PACKAGES = {
    "webdataset": ("webdataset", "torch", "torchvision", "pillow"),
    "streaming": ("mosaicml-streaming", "torch", "torchvision", "pillow"),
    "datago": ("datago", "torch"),
    "spdl": ("spdl", "torch"),
}

# ---- measuring -------------------------------------------------------------------------------------------------------


def tree(pid):
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return found


def cpu_seconds(pid):
    """CPU seconds of a process and its descendants, including ended ones."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))
    return total / TICK


def resident(pid, shared_once):
    """Memory of a process and its descendants in bytes: RSS, or PSS, which counts shared pages once in total."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            if shared_once:
                lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            else:
                total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * PAGE
    return total


class Peak:
    """Context manager that samples the memory of a process tree."""

    def __init__(self, pid):
        self.pid, self.rss, self.pss, self.ended = pid, 0, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        turn = 0
        while not self.ended.wait(0.1):
            self.rss = max(self.rss, resident(self.pid, False))
            turn += 1
            if turn % 10 == 0:
                self.pss = max(self.pss, resident(self.pid, True))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def mib(self):
        return {"peak_rss_mib": self.rss / 2**20, "peak_pss_mib": self.pss / 2**20}


def end(process):
    """Ends a process group."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def speed(measured, samples):
    rest = measured["elapsed_seconds"] - measured["first_batch_seconds"]
    return measured | {"samples": samples, "images_per_second": (samples - BATCH) / rest}


def peer_run(name, job, server, log):
    """Runs a peer in a process of its own."""
    command = [sys.executable, str(HERE / "loader_peers.py"), name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True, **pipes)

    def say(line):
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def hear():
        for line in process.stdout:
            if line.rstrip() in ("ready", "done") or line.startswith('{"first_batch'):
                return line
        raise SystemExit(f"{name} ended early:\n{log.read_text()[-3000:]}")

    try:
        say(json.dumps(job))
        hear()
        before, server_before = cpu_seconds(process.pid), cpu_seconds(server)
        imports = resident(process.pid, False)
        with Peak(process.pid) as peak:
            say("go")
            hear()
            used, served = cpu_seconds(process.pid) - before, cpu_seconds(server) - server_before
        say("tell")
        result = json.loads(hear())
    finally:
        process.stdin.close()
        end(process)
    result |= {"cpu_ms": used * 1e3 / job["samples"], "server_cpu_ms": served * 1e3 / job["samples"]}
    return speed(result, job["samples"]) | peak.mib() | {"imports_rss_mib": imports / 2**20}


def coffey_run(args, name, job, server, log):
    """Runs `coffey bench`; the result includes its stages."""
    config = log.with_suffix(".toml")
    config.touch()
    settings = {
        "data.shards": json.dumps([f"s3://{BUCKET}/{url.rpartition('/')[2]}" for url in job["urls"]]),
        "data.resample_shards": "true",
        "data.shuffle_buffer": BUFFER,
        "s3.endpoint_url": job["endpoint"],
        "s3.region": "us-east-1",
        "s3.path_style": "true",
        "s3.anonymous": "true",
        "image.resolution": SIDE,
        "image.interpolation": "bilinear",
        "image.crop": "random",
        "image.scaled_decode": COFFEY[name],
        "train.batch_size": BATCH,
        "train.seed": job["seed"],
    }
    words = [f"{key}={value}" for key, value in settings.items()] + args.set
    command = [args.coffey, "bench", "-c", config, "--json", "--samples", job["samples"]]
    command = [str(word) for word in command] + [part for word in words for part in ("-s", word)]
    server_before = cpu_seconds(server)
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        with Peak(process.pid) as peak:
            said = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # already reaped: Popen must not wait
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{log.read_text()[-3000:]}")
    told, served = json.loads(said), cpu_seconds(server) - server_before
    result = {key: told[key] for key in ("first_batch_seconds", "elapsed_seconds")}
    result |= {"cpu_ms": (usage.ru_utime + usage.ru_stime) * 1e3 / told["samples"]}
    result |= {"server_cpu_ms": served * 1e3 / told["samples"]}
    return speed(result, told["samples"]) | peak.mib() | {"bench": told}


# ---- server and shards -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(binary, root, log):
    """Starts the S3 server on a free loopback port; yields its process id and address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("w") as output:
        command = [str(binary), "--host", "127.0.0.1", "--port", str(port), str(root)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None:
                break
            time.sleep(0.1)
        if process.poll() is not None:
            raise SystemExit(f"{binary} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        yield process.pid, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def upload(files, bucket, root, endpoint):
    """Uploads files to a bucket over HTTP: s3s-fs stores the ETag of an uploaded file; for any other file it computes
    the MD5 again for every request."""
    (root / bucket).mkdir()
    for file in files:
        request = urllib.request.Request(f"{endpoint}/{bucket}/{file.name}", file.read_bytes(), method="PUT")
        urllib.request.urlopen(request).close()


def samples_of(shard):
    """JPEG and caption of each sample."""
    sample = {}
    with tarfile.open(shard) as members:
        for member in members:
            key, _, extension = member.name.rpartition(".")
            if sample and sample["key"] != key:
                yield sample
                sample = {}
            sample |= {"key": key, extension: members.extractfile(member).read()}
    if sample:
        yield sample


def write_mds(shards, folder):
    """Writes the corpus as MosaicML's shards, with the sizes of the tars."""
    from streaming import MDSWriter

    limit = statistics.mean(shard.stat().st_size for shard in shards)
    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "txt": "str"}, size_limit=int(limit)) as writer:
        for shard in shards:
            for sample in samples_of(shard):
                writer.write({"jpg": sample["jpg"], "txt": sample["txt"].decode()})


# ---- the report ------------------------------------------------------------------------------------------------------

COLUMNS = {
    "images/s": ("images_per_second", 1),
    "first batch s": ("first_batch_seconds", 2),
    "CPU ms": ("cpu_ms", 1),
    "server ms": ("server_cpu_ms", 1),
    "RSS MiB": ("peak_rss_mib", 0),
    "PSS MiB": ("peak_pss_mib", 0),
}


def machine():
    """CPU, cores, memory and kernel."""
    name = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PHYS_PAGES") * PAGE / 2**30
    cores = len(os.sched_getaffinity(0))
    return {"cpu": name, "cores": cores, "memory_gib": round(memory, 1), "kernel": platform.release()}


def table(report):
    """Medians, and coffey's speed divided by that of each loader."""
    names = list(report["loaders"])
    multiples = [name for name in names if name in COFFEY]
    heads = [*COLUMNS, *(f"{name} / it" for name in multiples)]
    lines = [f"{'':15}" + "".join(f"{head:>{len(head) + 2}}" for head in heads)]
    for name in names:
        row = report["loaders"][name]["median"]
        cells = [f"{row[key]:.{digits}f}" for key, digits in COLUMNS.values()]
        for ours in multiples:
            fast = report["loaders"][ours]["median"]["images_per_second"]
            cells.append(f"{fast / row['images_per_second']:.2f}")
        lines.append(
            f"{name:15}" + "".join(f"{cell:>{len(head) + 2}}" for head, cell in zip(heads, cells, strict=True))
        )
    return "\n".join(lines)


def add(loader, made):
    """Adds a run of a loader and updates its medians."""
    loader["runs"].append(made)
    loader["median"] = {key: statistics.median(run[key] for run in loader["runs"]) for key, _ in COLUMNS.values()}


def compare(args, chosen, shards, scratch):
    """Runs all loaders; returns the report for `--out`."""
    count = 0
    for shard in shards:
        with tarfile.open(shard) as members:
            count += sum(name.endswith(".jpg") for name in members.getnames())
    samples = (args.samples or count) // BATCH * BATCH
    if not 2 * BATCH <= samples <= count:
        raise SystemExit(f"--samples must be from {2 * BATCH} to the corpus's {count}: one pass is measured")
    packages = sorted({package for name in chosen for package in PACKAGES.get(name, ())})
    versions = {package: importlib.metadata.version(package) for package in packages}
    report = {
        "machine": machine() | {"load_at_start": os.getloadavg()[0]},
        "corpus": {
            "shards": len(shards),
            "images": count,
            "mib": sum(shard.stat().st_size for shard in shards) / 2**20,
        },
        "arguments": {"samples": samples, "rounds": args.rounds, "set": args.set},
        "versions": versions | {"python": platform.python_version()},
        "loaders": {},
    }
    for program, binary in (("coffey", args.coffey), ("server", args.server)):
        said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True).stdout
        report["versions"][program] = said.strip()
    root = scratch / "served"
    root.mkdir()
    with serve(args.server, root, scratch / "server.log") as (server, endpoint):
        print("uploading the corpus", file=sys.stderr)
        upload(shards, BUCKET, root, endpoint)
        if "streaming" in chosen:
            mds = scratch / "mds"
            write_mds(shards, mds)
            upload(sorted(mds.iterdir()), MDS_BUCKET, root, endpoint)
            shutil.rmtree(mds)
        urls = [f"{endpoint}/{BUCKET}/{shard.name}" for shard in shards]
        for turn in range(1, args.rounds + 1):
            for name in chosen:
                cache = scratch / "cache"
                job = {"endpoint": endpoint, "urls": urls, "samples": samples, "seed": turn, "cache": str(cache)}
                log = scratch / f"{name}-{turn}.log"
                with contextlib.ExitStack() as stack:
                    if args.lock:
                        fcntl.flock(stack.enter_context(args.lock.open("w")), fcntl.LOCK_EX)
                    if name in COFFEY:
                        made = coffey_run(args, name, job, server, log)
                    else:
                        made = peer_run(name, job | PEERS[name][1], server, log)
                add(report["loaders"].setdefault(name, {"runs": []}), made)
                if args.out:
                    args.out.write_text(json.dumps(report, indent=2) + "\n")
                shutil.rmtree(cache, ignore_errors=True)
                said = f"{made['images_per_second']:.1f} images/s"
                print(f"round {turn} of {args.rounds}: {name}: {said}", file=sys.stderr)
    return report


def main():
    everything = [*COFFEY, *PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder of .tar shards")
    parser.add_argument("--server", type=Path, default=Path("s3s-fs"), help="the S3 server's binary")
    parser.add_argument("--coffey", type=Path, default=Path("target/release/coffey"), help="the release binary")
    parser.add_argument("--only", help=f"some of {','.join(everything)}; unset: all")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each loader")
    parser.add_argument("--samples", type=int, help="images of each run, at most one pass; unset: one pass")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="passed to coffey")
    parser.add_argument("--lock", type=Path, help="a file to lock (flock) during each run, on a shared machine")
    parser.add_argument(
        "--scratch", type=Path, help="folder for the server's files and caches, three times the corpus's size"
    )
    parser.add_argument("--out", type=Path, help="JSON file for all figures, written after each run")
    args = parser.parse_args()
    if not args.corpus or not (shards := sorted(args.corpus.glob("*.tar"))):
        parser.error("--corpus: a folder with .tar shards")
    chosen = args.only.split(",") if args.only else everything
    if unknown := set(chosen) - set(everything):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server and the peers are ended too
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}): the figures are unreliable", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        report = compare(args, chosen, shards, Path(scratch))
    where = report["machine"]
    images = report["arguments"]["samples"]
    print(f"{where['cpu']}, {where['cores']} cores; {images} images, {args.rounds} rounds, medians")
    print(table(report))


if __name__ == "__main__":
    main()
