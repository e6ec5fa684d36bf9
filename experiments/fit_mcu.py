"""Fit the microcontroller profiles to the measurements of TinyEngine and of MLPerf Tiny.

    python experiments/fit_mcu.py DATA_DIR [--write]

DATA_DIR holds mcu_stm32h743.csv and mcunet/*.json (published with TinyEngine and MCUNet's model zoo, MIT), and
mcu_mlperf_tiny.csv and mlperf_tiny_models/*.tflite (MLPerf Tiny, Apache-2.0). Prints what it found as JSON and writes
it to experiments/results/fit_mcu.json; --write also writes the fitted part of the device files. Errors by board, and
beside other models, are in experiments/benchmarks/mcu_latency.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fitted import fit_command, provenance, rounded
from mcu_data import H743_BOARDS, H743_TABLE, MLPERF_TABLE, Run, boards_of, read_runs
from mcu_models import (
    FORMS,
    covered,
    energy_left_out_uj,
    fit_power_mw,
    fit_shared,
    macs_left_out_ms,
    predict_left_out_ms,
)

from hardware_profiles.memory import (
    INPLACE_DEPTHWISE,
    LIVENESS,
    TFLM_GREEDY,
    flash_bytes,
    peak_sram_bytes,
    persistent_sram_bytes,
)
from predictors.regression import relative_interval, scores
from search_spaces import Network

COMMAND = "python experiments/fit_mcu.py DATA_DIR"
H743_MHZ, F746_MHZ = 480, 216

# device file -> board whose runs it is fitted to
DEVICES = {
    "stm32h743": "stm32h743 TinyEngine",
    "stm32h743-tflm": "stm32h743 TFLM",
    "stm32h743-tflm-cmsis": "stm32h743 TFLM with CMSIS-NN",
    "stm32h743-xcubeai": "stm32h743 X-CUBE-AI 7.3",
    "stm32h7a3-xcubeai": "stm32h7a3 X-CUBE-AI 7.3.0",
    "stm32l4r5-cmsisnn": "stm32l4r5 microTVM with CMSIS-NN",
    "stm32l4r5-xcubeai": "stm32l4r5 X-CUBE-AI 7.3.0",
    "nrf5340-cmsisnn": "nrf5340 microTVM with CMSIS-NN",
    "stm32u575-xcubeai": "stm32u575 X-CUBE-AI 7.3.0",
}
DERIVED = "stm32f746"  # from the first of them
KERNEL_NAMES = {
    "tflm-reference": "TFLM's reference kernels",
    "tinyengine": "TinyEngine",
    "cmsis-nn": "CMSIS-NN",
    "x-cube-ai-7": "X-CUBE-AI 7.1 and 7.3",
}


@dataclass(frozen=True, slots=True)
class MemoryRule:
    """How the memory of a runtime is modelled: a planner, and what comes on top, as a share of the plan or in bytes."""

    planner: str
    overhead: str
    explicit_padding: str = "never"
    storage: str = "c_arrays"

    def sram_bytes(self, network: Network) -> float:
        """What is planned, without the overhead."""
        peak = peak_sram_bytes(network, self.planner, explicit_padding=self.explicit_padding)
        return float(peak + persistent_sram_bytes(network, self.storage))

    @property
    def section(self) -> dict[str, Any]:
        """As a device file holds it."""
        return {"planner": self.planner, "explicit_padding": self.explicit_padding, "storage": self.storage}


# The planner that comes nearest on the STM32H743, where the memory of four libraries was published.
MEMORY_RULES = {
    "tinyengine": MemoryRule(INPLACE_DEPTHWISE, "sram_overhead"),
    "x-cube-ai-7": MemoryRule(INPLACE_DEPTHWISE, "sram_overhead_bytes"),
    # its networks came from PyTorch, whose padding is an operator of its own in TensorFlow Lite
    "tflm-reference": MemoryRule(TFLM_GREEDY, "sram_overhead_bytes", "always", "tflite"),
    "cmsis-nn": MemoryRule(TFLM_GREEDY, "sram_overhead_bytes", "always", "tflite"),
}
NO_MEMORY = MemoryRule(LIVENESS, "sram_overhead_bytes")  # of a runtime whose memory nobody measured
UNKNOWN_MEMORY = "no memory of microTVM was measured: the tensors or parameters alone, which is a lower bound"


def fit_memory(runs: Sequence[Run], rule: MemoryRule) -> dict[str, Any]:
    """What the runtime needs beyond the planned tensors and the stored parameters, and the errors with it left out."""
    networks = [run.network for run in runs if run.network is not None]
    planned = np.array([rule.sram_bytes(network) for network in networks])
    sram = np.array([float(run.sram_bytes or 0) for run in runs])
    parameters = np.array([float(flash_bytes(network, 0, rule.storage)) for network in networks])
    flash = np.array([float(run.flash_bytes or 0) for run in runs])
    share = rule.overhead == "sram_overhead"
    return {
        **rule.section,
        "networks": len(runs),
        rule.overhead: _overhead(planned, sram, share=share),
        "sram_mape_without": rounded(np.abs(planned / sram - 1).mean()),
        "flash_overhead_bytes": _overhead(parameters, flash, share=False),
    }


def _overhead(known: np.ndarray, measured: np.ndarray, *, share: bool) -> dict[str, float]:
    """The mean share over networks, or the median of the bytes, since one size does not fit all of them."""
    beyond = measured / known - 1 if share else measured - known
    middle = np.mean if share else np.median
    left_out = np.array([middle(np.delete(beyond, index)) for index in range(len(beyond))])
    error = (known * (1 + left_out) if share else known + left_out) / measured - 1
    numbers = {"value": middle(beyond), "smallest": beyond.min(), "largest": beyond.max()}
    found = {name: rounded(number) if share else round(float(number)) for name, number in numbers.items()}
    return found | {
        "held_out_mape": rounded(np.abs(error).mean()),
        "held_out_max_error": rounded(np.abs(error).max()),
    }


def clock_scaling(runs: Sequence[Run]) -> dict[str, Any]:
    """How far latencies scale with the clock alone: one runtime on two Cortex-M4 chips.

    MLPerf Tiny has no TinyEngine on an STM32F746, only another vendor's engine, so nothing checks the derived profile.
    """
    boards = boards_of(runs)
    slow, fast = (
        {run.name: run.latency_ms for run in boards[f"{chip} Plumerai v1.0"]} for chip in ("stm32l4r5", "psoc62")
    )
    return {
        "pair": "Cortex-M4, Plumerai Inference Engine: 120 MHz scaled to 150 MHz, error of the scaled latency",
        "errors": {task: rounded(slow[task] * 120 / 150 / fast[task] - 1) for task in sorted(slow)},
    }


def fit_kernels(runs: Sequence[Run], kernels: str) -> dict[str, Any]:
    """The model that the boards of some kernels share, its errors on architectures left out, and its memory."""
    here = [run for run in runs if run.kernels == kernels]
    form = FORMS[kernels]
    model = fit_shared(here, form)
    measured = np.array([run.latency_ms for run in here])
    left_out, macs_only = predict_left_out_ms(here, form), macs_left_out_ms(here)
    width, nominal = relative_interval(left_out, measured)
    on_h743 = [run for run in here if run.board in H743_BOARDS.values()]
    boards = {}
    for board, own in boards_of(here).items():
        index = [number for number, run in enumerate(here) if run.board == board]
        boards[board] = {
            "macs": [int(run.macs) for run in own],
            "coefficients_ms": {name: rounded(price) for name, price in model.coefficients_ms(board).items()},
            "held_out": {
                "networks": len(own),
                "folds": len({run.architecture for run in here}),
                **_rounded(scores(left_out[index], measured[index])),
                "macs_only_mape": rounded(scores(macs_only[index], measured[index])["mape"]),
                "macs_only_spearman": rounded(scores(macs_only[index], measured[index])["spearman"]),
            },
        }
    return {
        "measurements": len(here),
        "ratios": [rounded(ratio) for ratio in model.ratios],
        "relative_error": rounded(width),
        "nominal_coverage": rounded(nominal),
        "measured_coverage": rounded(np.mean(covered(here, left_out, measured))),
        "boards": boards,
        "memory": fit_memory(on_h743, MEMORY_RULES[kernels]),
        "energy": fit_energy(here, left_out, macs_only),
    }


def fit_energy(runs: Sequence[Run], latency_ms: np.ndarray, macs_only_ms: np.ndarray) -> dict[str, Any]:
    """Power of each board whose energy was measured, and the errors of power times the left-out latency (n,)."""
    index = [number for number, run in enumerate(runs) if run.energy_uj]
    if not index:
        return {}
    here = [runs[number] for number in index]
    measured = np.array([float(run.energy_uj or 0.0) for run in here])
    left_out = energy_left_out_uj(here, latency_ms[index])
    macs_only = energy_left_out_uj(here, macs_only_ms[index])
    known_latency = energy_left_out_uj(here, np.array([run.latency_ms for run in here]))
    boards = {}
    for board, own in boards_of(here).items():
        at = [number for number, run in enumerate(here) if run.board == board]
        boards[board] = {
            "power_mw": rounded(fit_power_mw(own)),
            "power_of_each_mw": [rounded(float(run.energy_uj or 0.0) / run.latency_ms) for run in own],
            "held_out": {
                "networks": len(own),
                **_rounded(scores(left_out[at], measured[at])),
                "measured_latency_mape": rounded(scores(known_latency[at], measured[at])["mape"]),
                "macs_only_mape": rounded(scores(macs_only[at], measured[at])["mape"]),
            },
        }
    width, nominal = relative_interval(left_out, measured)
    return {
        "measurements": len(here),
        "relative_error": rounded(width),
        "nominal_coverage": rounded(nominal),
        "measured_coverage": rounded(np.mean(covered(here, left_out, measured))),
        "boards": boards,
    }


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: rounded(number) for name, number in numbers.items()}


def fit(data: Path) -> dict[str, Any]:
    runs = read_runs(data)
    return {
        **provenance(COMMAND),
        "seed": None,
        "without_structure": ["mcunet-vww0", "mcunet-vww1", "mcunet-vww2"],
        "kernels": {kernels: fit_kernels(runs, kernels) for kernels in KERNEL_NAMES},
        "clock_scaling": clock_scaling(runs),
    }


def device_sections(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The written part of a device file; the derived device has the first one's model at its own clock."""
    board = DEVICES[name] if name != DERIVED else next(iter(DEVICES.values()))
    kernels, found = next((k, found) for k, found in result["kernels"].items() if board in found["boards"])
    sections = {"memory": _memory_section(found["memory"], kernels, board)}
    if name == DERIVED:
        return sections | {"latency": _derived_latency(found["boards"][board], result["clock_scaling"])}
    sections["latency"] = _latency_section(found, kernels, board)
    if board in found["energy"].get("boards", {}):
        sections["energy"] = _energy_section(found["energy"], board)
    return sections


def _memory_section(memory: Mapping[str, Any], kernels: str, board: str) -> dict[str, Any]:
    rule = MEMORY_RULES[kernels]
    if "microTVM" in board:
        nothing = {"value": 0, "source": UNKNOWN_MEMORY}
        return {**NO_MEMORY.section, "sram_overhead_bytes": nothing, "flash_overhead_bytes": dict(nothing)}
    sram, flash = memory[rule.overhead], memory["flash_overhead_bytes"]
    runtime = "TinyEngine" if kernels == "tinyengine" else KERNEL_NAMES[kernels].replace("7.1 and ", "")
    table = f"the {memory['networks']} networks with {runtime} on an STM32H743 whose structure is published"
    share = rule.overhead == "sram_overhead"
    spread = f"{sram['smallest']:.3f} to {sram['largest']:.3f} of the planned peak" if share else _bytes(sram)
    return {
        **rule.section,
        rule.overhead: {
            "value": sram["value"],
            "source": f"{'mean' if share else 'median'} over {table} (a kB taken as 1024 bytes): {spread}; "
            f"held-out error of the SRAM {sram['held_out_mape']:.1%} on average",
        },
        "flash_overhead_bytes": {
            "value": flash["value"],
            "source": f"median over {table}: {_bytes(flash)}; held-out error of the flash "
            f"{flash['held_out_mape']:.1%} on average",
        },
    }


def _bytes(overhead: Mapping[str, float]) -> str:
    return f"{overhead['smallest']} to {overhead['largest']} bytes"


def _latency_section(found: Mapping[str, Any], kernels: str, board: str) -> dict[str, Any]:
    own = found["boards"][board]
    boards, networks = len(found["boards"]), len(own["macs"])
    source = f"fitted to {networks} published networks, {_span(own['macs'])}"
    if boards > 1:
        source += (
            f"; the ratios of the costs are those of {KERNEL_NAMES[kernels]} on {boards} boards "
            f"({found['measurements']} measurements), held near the instructions of CMSIS-NN's kernels, and the speed "
            "is this board's own"
        )
    source += (
        f"; of 90 % intervals from the other networks, {found['measured_coverage']:.0%} held the measurement of one "
        "left out"
    )
    return {
        "origin": "fitted",
        "source": source,
        "constant_ms": 0.0,
        "coefficients_ms": own["coefficients_ms"],
        "relative_error": found["relative_error"],
        "held_out": own["held_out"] | {"coverage": found["nominal_coverage"]},
    }


def _span(macs: Sequence[int]) -> str:
    return f"{min(macs) / 1e6:.2g} to {max(macs) / 1e6:.3g} million MACs"


def _derived_latency(own: Mapping[str, Any], clocks: Mapping[str, Any]) -> dict[str, Any]:
    scale = H743_MHZ / F746_MHZ
    worst = max(abs(error) for error in clocks["errors"].values())
    return {
        "origin": "derived",
        "source": f"the model of stm32h743 times {H743_MHZ}/{F746_MHZ}, the ratio of the clocks; no measurement of "
        "this runtime on this device was at hand, so the error is not known. Scaling one runtime between two "
        f"Cortex-M4 chips by their clocks was wrong by up to {worst:.0%} in MLPerf Tiny v1.0",
        "constant_ms": 0.0,
        "coefficients_ms": {name: rounded(price * scale) for name, price in own["coefficients_ms"].items()},
    }


def _energy_section(energy: Mapping[str, Any], board: str) -> dict[str, Any]:
    own = energy["boards"][board]
    powers = own["power_of_each_mw"]
    return {
        "origin": "fitted",
        "source": f"energy over latency of {len(powers)} networks of MLPerf Tiny, {min(powers):.3g} to "
        f"{max(powers):.3g} mW, the two being of separate runs; the energy is this power times the latency, and its "
        f"interval is from {energy['measurements']} measurements on boards of the same kernels",
        "power_mw": own["power_mw"],
        "relative_error": energy["relative_error"],
        "held_out": own["held_out"] | {"coverage": energy["nominal_coverage"]},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    return fit_command(
        arguments,
        about=__doc__,
        name="fit_mcu",
        needed=(H743_TABLE, MLPERF_TABLE),
        fit=fit,
        devices=lambda result: {name: device_sections(result, name) for name in (*DEVICES, DERIVED)},
    )


if __name__ == "__main__":
    sys.exit(main())
