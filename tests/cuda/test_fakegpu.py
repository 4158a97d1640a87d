#!/usr/bin/env python3
"""Does the fake GPU see what it is for?

    tests/cuda/test_fakegpu.py FAKE      # FAKE: a folder made by build_fakegpu"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

PTX = b"""
.visible .entry add_one(.param .u64 add_one_param_0, .param .u64 .ptr .global .align 4 add_one_param_1, .param .u32 add_one_param_2)
.maxntid 256, 1, 1
{
  ld.param.u64 %rd1, [add_one_param_0];
  ld.param.u64 %rd2, [add_one_param_1];
  ld.param.u32 %r1, [add_one_param_2];
  cvta.to.global.u64 %rd3, %rd1;
  cvta.to.global.u64 %rd4, %rd2;
$L__BB0_1:
  mul.wide.s32 %rd5, %r2, 4; // bytes
  add.s64 %rd6, %rd3, %rd5;
  ld.global.v2.f32 {%f1, %f2}, [%rd6];
  add.s64 %rd7, %rd4, %rd5;
  @%p1 st.global.f32 [%rd7+4], %f1;
  ret;
}
"""
STREAMS = 2


class Card:
    def __init__(self, folder):
        self.cuda = ctypes.CDLL(f"{folder}/libcuda.so.1")
        self.streams = [c_void_p() for _ in range(STREAMS)]
        for stream in self.streams:
            assert self.cuda.cuStreamCreate(byref(stream), 1) == 0
        self.module, self.kernel = c_void_p(), c_void_p()
        assert self.cuda.cuModuleLoadData(byref(self.module), PTX) == 0
        assert self.cuda.cuModuleGetFunction(byref(self.kernel), self.module, b"add_one") == 0

    def memory(self, stream=0, size=4096):
        address = c_uint64()
        assert self.cuda.cuMemAllocAsync(byref(address), c_size_t(size), self.streams[stream]) == 0
        return address

    def free(self, address, stream=0):
        return self.cuda.cuMemFreeAsync(address, self.streams[stream])

    def run(self, source, to, stream=0, block=256, grid=4, shared=0):
        values = (c_void_p * 3)(*(ctypes.cast(byref(v), c_void_p) for v in (source, to, c_int(1024))))
        u = c_uint
        return self.cuda.cuLaunchKernel(self.kernel, u(grid), u(1), u(1), u(block), u(1), u(1), u(shared), self.streams[stream], values, None)

    def upload(self, to, size, stream=0):
        return self.cuda.cuMemcpyHtoDAsync_v2(to, bytes(size), c_size_t(size), self.streams[stream])

    def download(self, source, size=4, stream=0):
        return self.cuda.cuMemcpyDtoHAsync_v2(ctypes.create_string_buffer(size), source, c_size_t(size), self.streams[stream])

    def order(self, first, then):
        event = c_void_p()
        self.cuda.cuEventCreate(byref(event), 0)
        self.cuda.cuEventRecord(event, self.streams[first])
        self.cuda.cuStreamWaitEvent(self.streams[then], event, 0)


def two_streams(card):
    a, b = card.memory(), card.memory()
    card.run(a, b, 0)
    card.run(b, card.memory(1), 1)
    return {"unsynchronised": 1}


def two_streams_with_an_event(card):
    a, b, c = card.memory(), card.memory(), card.memory(1)
    card.run(a, b, 0)
    card.order(0, 1)
    card.run(b, c, 1)
    return {}


def an_event_before_the_work_does_not_order_it(card):
    a, b, c = card.memory(), card.memory(), card.memory(1)
    card.order(0, 1)
    card.run(a, b, 0)
    card.run(b, c, 1)
    return {"unsynchronised": 1}


def two_streams_with_a_wait(card):
    a, b, c = card.memory(), card.memory(), card.memory(1)
    card.run(a, b, 0)
    card.cuda.cuStreamSynchronize(card.streams[0])
    card.run(b, c, 1)
    return {"waits": 1}


def two_readers(card):
    a, b, c = card.memory(), card.memory(), card.memory(1)
    card.order(0, 1)
    card.run(a, b, 0)
    card.run(a, c, 1)
    return {}


def a_reader_that_only_waits_for_another_reader(card):
    """b is written on 0 and read on 1 in order; what is read on 0 again needs nothing; a write on 1 has to wait for that."""
    a, b, c, d = card.memory(), card.memory(), card.memory(1), card.memory()
    card.run(a, b, 0)
    card.order(0, 1)
    card.run(b, c, 1)
    card.run(b, d, 0)
    card.upload(b, 4, 1)
    return {"unsynchronised": 1}


def a_free_on_another_stream(card):
    a, b = card.memory(), card.memory()
    card.run(a, b, 0)
    card.free(b, 1)
    return {"unsynchronised": 1}


def a_download_waits(card):
    a, b = card.memory(), card.memory()
    card.run(a, b)
    card.download(b)
    card.cuda.cuStreamSynchronize(card.streams[0])
    return {"waits": 1}


def use_after_free(card):
    a, b = card.memory(), card.memory()
    card.free(b)
    card.run(a, b)
    return {"faults": 1}


def past_the_end(card):
    card.upload(card.memory(), 8192)
    return {"faults": 1}


def more_threads_than_the_kernel_allows(card):
    assert card.run(card.memory(), card.memory(), block=512) == 1
    return {"faults": 1}


def more_shared_memory_than_asked_for(card):
    a, b = card.memory(), card.memory()
    assert card.run(a, b, shared=65536) == 1
    assert card.cuda.cuFuncSetAttribute(card.kernel, 8, 65536) == 0
    assert card.run(a, b, shared=65536) == 0
    return {"faults": 1}


def a_table_of_addresses(card):
    """The kernel is given the address of addresses: what they point to is used as well."""
    a, b, table = card.memory(), card.memory(1), card.memory()
    card.order(0, 1)
    card.upload(b, 8, 1)
    card.cuda.cuMemcpyHtoDAsync_v2(table, bytes(b), c_size_t(8), card.streams[0])
    card.run(table, a, 0)
    return {"unsynchronised": 1}


CASES = [value for name, value in list(globals().items()) if callable(value) and getattr(value, "__code__", None) and value.__code__.co_varnames[:1] == ("card",)]


def main():
    if len(sys.argv) == 3:
        print(json.dumps(globals()[sys.argv[2]](Card(sys.argv[1]))))
        return
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            out = Path(folder) / case.__name__
            run = subprocess.run([sys.executable, __file__, sys.argv[1], case.__name__], env=os.environ | {"FAKEGPU_OUT": str(out)}, capture_output=True, text=True)
            if run.returncode:
                print(f"{case.__name__}: {run.stderr}")
                failed += 1
                continue
            record = json.loads(Path(f"{out}.json").read_text())
            found = {"unsynchronised": sum(record["unsynchronised"].values()), "faults": sum(record["faults"].values()), "waits": record["waits"]}
            expected = dict.fromkeys(found, 0) | json.loads(run.stdout)
            if found != expected:
                print(f"{case.__name__}: {found}, not {expected}: {record['unsynchronised']} {record['faults']}")
                failed += 1
    print(f"the fake GPU: {len(CASES) - failed} of {len(CASES)} cases as expected")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
