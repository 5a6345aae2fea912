"""What a plan is made for, and what its days and dollars rest on.

Flow: `cli_plan` makes `Terms`; `room` and `planning` ask them for the hardware, `budgeting` for
`Devices`; `planning` shows their `basis`.
"""

import math
from dataclasses import dataclass
from typing import Any

from summerlm.core.errors import UsageError
from summerlm.core.hardware import Accelerator, describe, find_accelerator, pick_device
from summerlm.plan.cost import FAILURE_HOURS, Devices
from summerlm.recipes.settings import Settings

BYTES_PER_TOKEN = 4.0  # UTF-8 bytes of English text to a token of Mistral v3; code has about 3
COUNT = 8
MFU = 0.4
WITHOUT_FLOAT8 = ("a100",)  # compute capability 8.0: fp8 products come with 8.9
HOPPER = ("h100", "h200")


@dataclass(frozen=True)
class Terms:
    """What a plan is made for.

    Attributes:
        hardware: Name in the table of accelerators; None = the device of the settings, here.
        count: How many of them; None = `COUNT`.
        mfu: Share of their dense bf16 peak that is reached, above 0 and at most 1; None = `MFU`.
        price: Dollars a device-hour; None = the table's, where it has one.
        mtbf_hours: Mean hours between two failures of one device.
        bytes_per_token: UTF-8 bytes of text to a token.
    """

    hardware: str | None = None
    count: int | None = None
    mfu: float | None = None
    price: float | None = None
    mtbf_hours: float = FAILURE_HOURS
    bytes_per_token: float = BYTES_PER_TOKEN

    def check(self, *, probing: bool = False) -> None:
        """Refuse what can't be, and what nothing would read.

        Args:
            probing: Whether steps are measured here.

        Raises:
            UsageError: If a figure makes no sense or has no effect, or the hardware is unknown.
        """
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise UsageError(f"--mfu {self.mfu:g}: should be above 0 and at most 1")
        for name in ("count", "price", "mtbf_hours", "bytes_per_token"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                wish = "finite" if value == math.inf else "above 0"
                free = "; leave it out to see no dollars" if (name, value) == ("price", 0) else ""
                raise UsageError(f"--{name.replace('_', '-')} {value:g}: should be {wish}{free}")
        self.find()
        if self.mfu is not None and probing:
            raise UsageError("--mfu and --probe: take one; --probe measures what --mfu states")
        if self.hardware is None:
            for name in ("count", "mfu"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name} needs --hardware: nothing would read it")
            if self.price is not None and not probing:
                raise UsageError("--price needs --hardware or --probe: without days no dollars")

    def find(self) -> Accelerator | None:
        """Look the hardware up; None where none is named."""
        return None if self.hardware is None else find_accelerator(self.hardware)

    @property
    def world(self) -> int:
        """How many devices train: 1 where no hardware is named."""
        if self.hardware is None:
            return 1
        return COUNT if self.count is None else self.count

    def devices(self, measured: float | None = None) -> Devices | None:
        """Tell what trains, and how fast: as it was stated, or as it was measured.

        Args:
            measured: FLOP/s that a device was seen to reach, or None.

        Returns:
            The devices; None where neither hardware is named nor anything measured.
        """
        row = self.find()
        price = self.price if row is None or self.price is not None else row.price
        if measured is None and row is not None:
            measured = (MFU if self.mfu is None else self.mfu) * row.peak_flops
        return None if measured is None else Devices(self.world, measured, price)

    def basis(self, settings: Settings, measured: float | None) -> dict[str, Any] | None:
        """Say what days and dollars rest on.

        Args:
            settings: The run's settings.
            measured: FLOP/s that a device was seen to reach, or None.

        Returns:
            Plain values; None where there are no days. Peak and MFU are None where the peak of
            what is here isn't known, the price where nobody said.
        """
        devices, row = self.devices(measured), self.find()
        if devices is None:
            return None
        peak = None if row is None else row.peak_flops
        here = describe(pick_device(settings.run.device)) if row is None else {}
        stated = "default" if self.mfu is None else "stated"
        listed = "table" if row is not None and row.price is not None else None
        return {
            "hardware": here.get("accelerator", here.get("processor")) if row is None else row.name,
            "count": devices.count,
            "peak_flops_per_second": peak,
            "mfu": None if peak is None else devices.flops / peak,
            "mfu_from": stated if measured is None else "measured",
            "flops_per_second": devices.flops,
            "price": devices.price,
            "price_from": listed if self.price is None else "stated",
            "source": None if row is None else row.source,
        }


def check_hardware(settings: Settings, row: Accelerator) -> None:
    """Refuse settings that named hardware can't follow, as a run on it would.

    Args:
        settings: The run's settings.
        row: The hardware.

    Raises:
        UsageError: If it has no fp8 products, or not the attention kernel that is asked for.
    """
    parallel = settings.parallel
    if parallel.float8 and row.name in WITHOUT_FLOAT8:
        raise UsageError(f"parallel.float8 = true: {row.name} has no fp8 products")
    if parallel.float8 and settings.train.precision == "float32":
        raise UsageError("parallel.float8 = true contradicts train.precision = 'float32'")
    lacks = (parallel.attention == "cudnn" and row.name == "mi300x") or (
        parallel.attention == "flash3" and row.name not in HOPPER
    )
    if lacks:
        raise UsageError(f"parallel.attention = {parallel.attention!r}: {row.name} has no such one")
