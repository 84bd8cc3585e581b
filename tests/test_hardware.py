"""What the machine is told to do."""

import ctypes
import subprocess
import sys

import pytest

from mimlet.hardware import keep_freed_memory

CHECK = """
import torch
from mimlet.hardware import keep_freed_memory

def heap():
    line = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
    return [int(address, 16) for address in line.split()[0].split("-")]

def tensor_and_heap():
    address = torch.ones(2**24).data_ptr()  # 64 MiB, freed at once
    return address, heap()

address, (start, end) = tensor_and_heap()
assert not start <= address < end, "mapped by itself, when nobody asks for more"
keep_freed_memory()
address, (start, end) = tensor_and_heap()
assert start <= address and end >= address + 2**26, "in the heap, which keeps the memory"
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for glibc")
def test_the_memory_of_large_tensors_stays_with_the_process() -> None:
    subprocess.run([sys.executable, "-c", CHECK], check=True)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    keep_freed_memory()
