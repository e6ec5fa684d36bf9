"""The machine we run on: what its processor is called and can do, and which versions of the runtime it has."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
X86 = ("x86_64", "amd64", "i386", "i686", "x86")
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor and the versions of what runs on it.

    `flags` are the instruction sets as the Linux kernel names them; empty where it does not say.
    """

    cpu: str
    architecture: str
    flags: frozenset[str]
    physical_cores: int
    logical_cores: int
    python: str
    onnxruntime: str
    numpy: str

    @property
    def has_vnni(self) -> bool:
        """Whether x86 multiplies unsigned by signed bytes into 32 bits without an intermediate of 16."""
        return bool(VNNI_FLAGS & self.flags)

    @property
    def channel_block(self) -> int | None:
        """How many channels onnxruntime's convolutions compute at once; None where it is not known.

        MLAS lays floats out in blocks of 16 channels with AVX-512 and of 8 on any other x86 (`MlasNchwcGetBlockSize`).
        """
        if self.architecture.lower() not in X86 or not self.flags:
            return None
        return 16 if "avx512f" in self.flags else 8


def this_machine(cpuinfo: Path = CPUINFO) -> Machine:
    """Read the present machine; what the system does not tell is the platform's name for it."""
    import onnxruntime  # its own word: the distribution may be onnxruntime-gpu or another

    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    processors = [_fields(block) for block in text.split("\n\n") if block.strip()]
    first = processors[0] if processors else {}
    logical = os.cpu_count() or 1
    cores = {(p["physical id"], p["core id"]) for p in processors if "physical id" in p and "core id" in p}
    return Machine(
        cpu=first.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        flags=frozenset((first.get("flags") or first.get("Features") or "").split()),
        physical_cores=len(cores) or logical,
        logical_cores=logical,
        python=platform.python_version(),
        onnxruntime=onnxruntime.__version__,
        numpy=version("numpy"),
    )


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def int8_weight_limit(machine: Machine | None = None) -> int:
    """The largest integer weight with which onnxruntime's int8 kernels are exact: 127, or 63 on x86 without VNNI.

    There the kernels for uint8 activations and int8 weights add pairs of products in saturating 16 bits
    (vpmaddubsw): 2 * 255 * 127 = 64,770 does not fit 32,767, but 2 * 255 * 63 = 32,130 does. Seen with
    onnxruntime 1.32 on an AMD EPYC with AVX2 and no VNNI, all activations 255 and all weights at the limit:
    with 127 the sum of 64 products came out as 32.4 instead of 64 from linear layers (QGemm) and from 1x1 and
    3x3 convolutions (QLinearConv), with 63 and 64 it was exact; depthwise convolutions were exact with all three.

    It holds for the machine the model is to run on; a model written for VNNI is wrong on one without it.
    """
    machine = machine or this_machine()
    return 127 if machine.has_vnni or machine.architecture.lower() not in X86 else 63
