"""What the records of the fake GPU add up to: counts, and a rough time on an H100.

The time is arithmetic on counts, off by a factor of two either way; it is for comparing two builds and for finding what to make
faster. Nothing here was measured on a card, except that candle's strided kernels spend 45 instructions on a division for each
dimension of each element."""

import re
from collections import defaultdict

GIB = 2**30

# An H100. Bytes a second that kernels reach, f32 and 16-bit; FLOP a second of products and convolutions.
BANDWIDTH, BANDWIDTH_16 = 2.4e12, 1.7e12
INDEX = 2.3e-12  # seconds for a dimension of an element with candle's index arithmetic
ONE_BLOCK = 27e9  # bytes a second of one block
PRODUCT = {"f16": 500e12, "bf16": 500e12, "tf32": 250e12, "f32": 45e12, "f64": 30e12}
CONVOLUTION = {"f16": 400e12, "bf16": 400e12, "tf32": 200e12, "f32": 40e12, "f64": 30e12}
CONVOLUTION_WITHOUT_TENSOR_CORES = 50e12
# Our kernels issue mma.sync and have not been tuned on a card; the best of others reach two to four times as much.
ATTENTION = {"f16": 150e12, "bf16": 150e12, "f32": 15e12}
# Seconds of the CPU for a call.
CALL = {"launch": 4e-6, "allocation": 1.8e-6, "h2d": 6e-6, "d2d": 3e-6, "d2h": 12e-6}

CANDLE = re.compile(
    r"(u?copy\d*d?|const_set|fill|affine|b[a-z]+|u[a-z]+|fast_[a-z]+|cast|where|is|gather|ia|sa|s|im2col\d?d?|conv\w*|col2im\w*|avg_pool\w*|max_pool\w*|upsample_\w+"
    r"|rmsnorm|layernorm|softmax|rope\w*|arange|asort\w*)_(b?f16|f32|f64|u8|u32|i64|i32|i16|f8_e4m3)(_.*)?"
)

# FLOP of kernels of our own that compute more than they load: by the beginning of the name, a function of the launch's arguments
# (numbers, or "p" for an address), grid and block.
COMPUTE = {}


def attention(products):
    """FLOP of `products` matrix products of queries and keys. The last arguments are N, M, heads, d and whether it is causal."""

    def flop(arguments, grid):
        n, m, _, d, causal = arguments[-5:]
        return 2.0 * products * grid[1] * n * m * d / (1 + causal)

    return flop


COMPUTE["attention_forward"] = attention(2)
COMPUTE["attention_backward_q"] = attention(3)
COMPUTE["attention_backward_kv"] = attention(4)


def parse(key):
    """Name, grid, block, shared bytes and arguments of a kernel's record."""
    name, grid, block, shared, *arguments = key.split()
    numbers = lambda text: tuple(map(int, text.split(",")))
    return name, numbers(grid), numbers(block), int(shared), [a if a == "p" or a[0] == "[" else int(a) for a in arguments]


def is_candle(name, arguments):
    return bool(CANDLE.fullmatch(name)) and not name.startswith("attention")


def seconds_of_kernel(name, grid, arguments, calls, bytes):
    """Seconds of all launches of a record, and what limits them."""
    for start, flop in COMPUTE.items():
        if name.startswith(start):
            kind = "bf16" if "bf16" in name else "f16" if "f16" in name else "f32"
            return max(calls * flop(arguments, grid) / ATTENTION[kind], bytes / BANDWIDTH), "arithmetic"
    narrow = is_candle(name, arguments) and "f16" in name and "f32" not in name
    time, why = bytes / (BANDWIDTH_16 if narrow else BANDWIDTH), "bytes"
    if not is_candle(name, arguments):
        return max(time, calls * 2e-6), why
    number = lambda i: arguments[i] if i < len(arguments) and isinstance(arguments[i], int) else 0
    elements = number(0)
    if name.startswith("fast_"):
        blocks = grid[0]
        if blocks == 1:
            time = bytes / ONE_BLOCK
        elif blocks < 132:
            time = max(time, bytes / (blocks * ONE_BLOCK))
        if "sum_f32" not in name and "sum_bf16" not in name:
            time, why = max((time, why), (calls * elements * 3 * INDEX, "index"))
    elif len(arguments) > 2 and arguments[2] == "p" and not name.startswith("copy2d"):
        time, why = max((time, why), (calls * elements * min(number(1), 6) * INDEX, "index"))
    return max(time, calls * 2e-6), why


def difference(later, earlier):
    """What was recorded between two states."""

    def minus(a, b):
        if isinstance(a, dict):
            return {k: minus(v, b.get(k, [0, 0] if isinstance(v, list) else 0)) for k, v in a.items()}
        if isinstance(a, list):
            return [x - y for x, y in zip(a, b)]
        return a - b

    step = minus(later, earlier)
    for whole in ("peak", "threads", "faults", "unsynchronised"):
        step[whole] = later[whole]
    return step


def summary(record):
    """The figures of a record: a step's, by `difference`, or a run's. And the kernels with their times."""
    by_kernel = defaultdict(lambda: [0.0, 0, 0.0, defaultdict(float)])
    kernel_bytes = 0
    shared = 0
    for key, (calls, bytes) in record["kernels"].items():
        if calls <= 0:
            continue
        name, grid, _, dynamic, arguments = parse(key)
        time, why = seconds_of_kernel(name, grid, arguments, calls, bytes)
        row = by_kernel[name]
        row[0] += time
        row[1] += calls
        row[2] += bytes
        row[3][why] += time
        kernel_bytes += bytes
        shared = max(shared, dynamic)
    product_time = product_flop = 0
    for key, (calls, flop) in record["gemms"].items():
        if calls <= 0:
            continue
        kind, compute, *_ = key.split()
        inputs = kind.split("-")[0]
        speed = PRODUCT["tf32" if inputs == "f32" and "tf32" in key else inputs]
        m, n, k, batch = map(int, re.search(r"m(\d+) n(\d+) k(\d+) batch(\d+)", key).groups())
        bytes = calls * batch * (m * n + m * k + n * k) * (2 if "16" in inputs else 4)
        product_time += max(flop / speed, bytes / BANDWIDTH)
        product_flop += flop
    convolution_time = convolution_slow = convolution_flop = 0
    for key, (calls, flop) in record["convolutions"].items():
        if calls <= 0:
            continue
        kind = key.split()[1]
        convolution_time += flop / CONVOLUTION[kind]
        convolution_slow += flop / min(CONVOLUTION_WITHOUT_TENSOR_CORES, CONVOLUTION[kind])
        convolution_flop += flop
    copies = {name: record["copies"].get(name, [0, 0]) for name in ("h2d", "d2h", "d2d", "memset")}
    kernel_time = sum(row[0] for row in by_kernel.values()) + copies["memset"][1] / BANDWIDTH + 2 * copies["d2d"][1] / BANDWIDTH
    calls = record["calls"]
    allocations = sum(calls.get(f"cuMem{name}", 0) for name in ("AllocAsync", "Alloc_v2", "AllocFromPoolAsync"))
    frees = sum(calls.get(f"cuMem{name}", 0) for name in ("FreeAsync", "Free_v2"))
    cpu = record["launches"] * CALL["launch"] + allocations * CALL["allocation"] + sum(copies[c][0] * CALL[c] for c in ("h2d", "d2d", "d2h"))
    figures = {
        "launches": record["launches"],
        "allocations and frees": allocations + frees,
        "uploads up to 256 bytes": record["small_uploads"],
        "waits": record["waits"],
        "kernel GB": (kernel_bytes + copies["memset"][1] + 2 * copies["d2d"][1]) / 1e9,
        "cuBLAS TFLOP": product_flop / 1e12,
        "cuDNN TFLOP": convolution_flop / 1e12,
        "allocated GB": record["allocated"] / 1e9,
        "peak GiB": record["peak"] / GIB,
        "events and waits on them": sum(calls.get(name, 0) for name in ("cuEventRecord", "cuStreamWaitEvent")),
        "to the card MB": copies["h2d"][1] / 1e6,
        "from the card MB": copies["d2h"][1] / 1e6,
        "threads that submit": record["threads"],
        "unsynchronised uses": sum(record["unsynchronised"].values()),
        "faults": sum(record["faults"].values()),
        "products s": product_time,
        "convolutions s": convolution_time,
        "kernels s": kernel_time,
        "GPU s": product_time + convolution_time + kernel_time,
        "GPU s, no tensor cores in cuDNN": product_time + convolution_slow + kernel_time,
        "CPU s": cpu,
    }
    rows = sorted(((row[0], name, row[1], row[2], max(row[3], key=row[3].get)) for name, row in by_kernel.items()), reverse=True)
    return figures, rows
