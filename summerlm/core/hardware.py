"""What devices can do and cost, with sources, and which one is here.

Flow: `train` asks whether bf16 pays; `recipes` ask for the device of a run, its peak for the MFU,
and the peak and price of hardware that is only planned for.
"""

import platform
from dataclasses import dataclass

import torch

from summerlm.core.errors import UsageError


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    Attributes:
        name: The name used on the command line.
        match: Text by which the driver's device name is recognised, lower case.
        peak_flops: Dense bf16 matrix peak, FLOP/s.
        memory_bytes: Memory of one device.
        bandwidth: Memory bandwidth, bytes/s.
        price: Dollars a device-hour, or None where the user must state one.
        source: Where the figures are from.
    """

    name: str
    match: str
    peak_flops: float
    memory_bytes: float
    bandwidth: float
    price: float | None
    source: str


ACCELERATORS = (
    Accelerator("h200", "h200", 989e12, 141e9, 4.8e12, None, "NVIDIA H200 data sheet"),
    Accelerator(
        "h100", "h100 80gb hbm3", 989e12, 80e9, 3.35e12, None, "NVIDIA H100 SXM data sheet"
    ),
    Accelerator(
        "a100", "a100-sxm4-80gb", 312e12, 80e9, 2.04e12, None, "NVIDIA A100 80GB SXM data sheet"
    ),
    Accelerator(
        "mi300x",
        "mi300x",
        1307e12,
        192e9,
        5.3e12,
        2.31,
        "AMD MI300X data sheet; price implied by SummerLM-4B's 1,728 hours for about $4000",
    ),
)


def find_accelerator(name: str) -> Accelerator:
    """Look an accelerator up by its command-line name.

    Args:
        name: For instance "h200".

    Returns:
        Its row of the table.

    Raises:
        UsageError: If the table has no such row; the message lists the names.
    """
    for row in ACCELERATORS:
        if row.name == name.lower():
            return row
    known = ", ".join(row.name for row in ACCELERATORS)
    raise UsageError(f"no hardware {name!r}; known: {known}")


def device_type(name: str) -> str:
    """Turn the setting `run.device` into a kind of device that is here.

    Args:
        name: "auto", "cpu" or "cuda" (which ROCm builds call their devices too).

    Returns:
        "cuda" or "cpu".

    Raises:
        UsageError: If CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("run.device = 'cuda': torch sees no GPU here; use 'cpu' or 'auto'")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def pick_device(name: str) -> torch.device:
    """Turn the setting `run.device` into this process's device, which its rank has chosen.

    Args:
        name: "auto", "cpu" or "cuda".

    Returns:
        The device.

    Raises:
        UsageError: If CUDA is asked for and there is none.
    """
    if device_type(name) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def supports_bf16(device: torch.device) -> bool:
    """Tell whether bf16 matrix products run faster than float32 ones on a device.

    On a CPU this is so where the processor has AVX-512 BF16 or AMX; elsewhere oneDNN converts, and
    bf16 is slower than float32.

    Args:
        device: Where the products would run.

    Returns:
        True where the hardware multiplies bf16 itself.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def peak_flops(device: torch.device) -> float | None:
    """Give a device's dense bf16 peak.

    Args:
        device: The device in use.

    Returns:
        FLOP/s, or None where the table has no figure, in which case no MFU is printed.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((row.peak_flops for row in ACCELERATORS if row.match in name), None)


def describe(device: torch.device) -> dict[str, object]:
    """Collect what a reader of figures must know of this machine.

    Args:
        device: The device in use.

    Returns:
        Plain values: device name, memory, cores, threads, versions.
    """
    found: dict[str, object] = {
        "device": str(device),
        "processor": _processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"accelerator": properties.name, "memory_bytes": properties.total_memory}
    return found


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform's own word has to do
    return platform.processor() or platform.machine()
