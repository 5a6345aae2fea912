"""What devices can do and cost, with sources, and which one is here.

Flow: `train` asks whether bf16 pays; `recipes` ask for the device of a run, its peak for the MFU,
and the peak and price of hardware that is only planned for.
"""

import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from summerlm.core.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    Attributes:
        name: The name used on the command line.
        match: Text by which the driver's device name is recognised, lower case.
        peak_flops: Dense bf16 matrix peak, FLOP/s.
        memory_bytes: Memory of one device as its driver counts it: makers' GB are 2^30 bytes.
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
    Accelerator("h200", "h200", 989e12, 140 * GIB, 4.8e12, None, "NVIDIA H200 data sheet"),
    Accelerator(
        "h100", "h100 80gb hbm3", 989e12, 79 * GIB, 3.35e12, None, "NVIDIA H100 SXM data sheet"
    ),
    Accelerator(
        "a100", "a100-sxm4-80gb", 312e12, 79 * GIB, 2.04e12, None, "NVIDIA A100 80GB SXM data sheet"
    ),
    Accelerator(
        "mi300x",
        "mi300x",
        1307e12,
        192 * GIB,
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


def peak_memory(device: torch.device) -> int:
    """Give the most memory this process has used so far.

    Args:
        device: Where it works.

    Returns:
        Bytes: of the allocator on a GPU, of the process elsewhere.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # not getrusage: what it gives begins with the memory of the process that started this one
        return 1024 * _proc_figure("/proc/self/status", "VmHWM")
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory(device: torch.device) -> int | None:
    """Give the memory that this process could still take.

    Args:
        device: Where it works.

    Returns:
        Bytes: of the GPU; elsewhere of the machine, or of the control group where that has less;
        None where the system doesn't say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = 1024 * _proc_figure("/proc/meminfo", "MemAvailable")
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{what}").read_text() for what in ("max", "current"))
    except OSError:
        return free
    return free if limit.strip() == "max" else min(free, max(int(limit) - int(used), 0))


def _proc_figure(path: str, name: str) -> int:
    """Read a figure of a file of lines as "name:  figure kB"."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise OSError(f"{path} doesn't tell {name}")


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
