"""What this machine has, and what is missing: of what is required, and of what is optional."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from nas.versions import NOT_INSTALLED, commit_of, version_of

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "neon", "asimddp")
REQUIRED = {  # package -> the module it brings
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "optuna": "optuna",
    "pandas": "pandas",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "threadpoolctl": "threadpoolctl",
    "torch": "torch",
    "tqdm": "tqdm",
}
OPTIONAL = {  # the same of the extras
    "kornia": "kornia",
    "ethos-u-vela": "ethosu.vela",
    "psycopg": "psycopg",
    "grpcio": "grpc",
}
NEEDED_FOR = {
    "kornia": "random erasing, mixup and cutmix; pip install 'fitnest[augment]'",
    "ethos-u-vela": "latencies of an Ethos-U; pip install 'fitnest[npu]'",
    "psycopg": "a search on PostgreSQL; pip install 'fitnest[postgresql]'",
    "grpcio": "a search behind the proxy of Optuna; pip install 'fitnest[grpc]'",
}


@dataclass(frozen=True)
class Findings:
    """What a machine has; a problem says what to do, and those of `optional` keep nothing else from working."""

    facts: dict[str, str]
    required: list[str]
    optional: list[str]


def doctor() -> Findings:
    """Versions and problems; where nothing required is missing, the machine too."""
    required = [
        f"{name} {why}; {_remedy(name)}" for name, module in REQUIRED.items() if (why := _problem(name, module))
    ]
    optional = [
        f"{name} {why}; it is for {NEEDED_FOR[name]}"
        for name, module in OPTIONAL.items()
        if (why := _problem(name, module))
    ]
    commit = commit_of(Path(__file__).parent)
    facts = {
        "python": platform.python_version(),
        "fitnest": version_of("fitnest") + (f", commit {commit}" if commit else ""),
        **{name: version_of(name) for name in (*REQUIRED, *OPTIONAL)},
    }
    return Findings(facts if required else facts | _machine(), required, optional)


def _problem(package: str, module: str) -> str:
    """What is wrong with a package; empty where it can be used."""
    found = version_of(package)
    try:
        import_module(module)
    except Exception as error:  # a broken package may raise anything
        if found == NOT_INSTALLED:
            return "is not installed"
        return f"{found} cannot be imported ({' '.join(f'{type(error).__name__}: {error}'.split())})"
    too_old = package == "optuna" and found != NOT_INSTALLED and int(found.split(".")[0]) < 5
    return f"{found} is too old" if too_old else ""


def _remedy(package: str) -> str:
    wanted = "'optuna>=5,<6'" if package == "optuna" else package
    return f"pip install {'' if version_of(package) == NOT_INSTALLED else '--force-reinstall '}{wanted}"


def _machine() -> dict[str, str]:
    import torch

    from hardware_profiles import device_names
    from hardware_profiles.machine import int8_weight_limit, this_machine
    from nas.profile import anchor_record

    machine = this_machine()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    has = [name for name in INSTRUCTION_SETS if name in machine.flags]
    limit = int8_weight_limit()
    return {
        "processor": machine.cpu,
        "cores": f"{machine.physical_cores} physical, {machine.logical_cores} logical",
        "usable cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "instruction sets": ", ".join(has) or "none of " + ", ".join(INSTRUCTION_SETS),
        "int8 weights": f"-{limit}..{limit}" + (" (no VNNI: pairs of products would saturate)" if limit < 127 else ""),
        "GPU": ", ".join(gpus) or "none (nothing needs one)",
        "devices": ", ".join(device_names()),
        "anchor record": str(anchor_record()) + ("" if anchor_record().exists() else " (nothing measured yet)"),
    }
