"""What this machine has, and what is missing."""

from __future__ import annotations

import os

from nas.profile import anchor_record
from nas.versions import PACKAGES, versions

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "neon", "asimddp")


def doctor() -> tuple[dict[str, str], list[str]]:
    """(facts, problems); a problem says what to do."""
    import torch

    from hardware_profiles import device_names
    from hardware_profiles.machine import int8_weight_limit, this_machine

    machine = this_machine()
    found = versions()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    has = [name for name in INSTRUCTION_SETS if name in machine.flags]
    limit = int8_weight_limit()
    facts = {
        **found,
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
    problems = [f"{name} is not installed; pip install fitnest" for name in PACKAGES if found[name] == "not installed"]
    if not problems and int(found["optuna"].split(".")[0]) < 5:
        problems.append(f"optuna {found['optuna']} is too old; pip install 'optuna>=5,<6'")
    return facts, problems
