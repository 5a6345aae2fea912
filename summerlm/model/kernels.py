"""Attention kernels: how the values that each query may read are averaged.

Flow: `transformer.Positions` makes one `Frame` a pass, of the kind that its kernel needs;
`attention.Attention` gives it queries, keys and values. Which kernel a run takes is decided once,
by `parallel.attention`; what each can do stands in `obstacle`.

    sdpa      torch's `scaled_dot_product_attention`, whichever kernel it picks: works everywhere
    flash     its flash attention: no score matrix; on CPUs without dropout
    cudnn     its cuDNN kernel: bf16 on NVIDIA GPUs
    flash3    its flash attention, replaced by FlashAttention 3 (package flash_attn_3, Hopper), as
              `install` does for the whole process
    plain     products of matrices and a softmax, for a few queries at once: on CPUs two to three
              times as fast as flash attention (LOG.md), but it keeps the probabilities

Shapes: B rows, T positions, S positions read (T and those remembered), H query heads,
K key/value heads (K divides H), C channels a head, E = C + 8 with the bias channels.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from summerlm.model.bias import CHANNELS, alibi_slopes
from summerlm.model.plain import plain_attention

KERNELS = ("sdpa", "flash", "cudnn", "flash3", "plain")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Memory:
    """What a layer remembers of earlier positions: nothing; `generate.cache` remembers all."""

    length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put what is remembered before new keys and values.

        Args:
            k: Keys with their channels, (B, K, T, E).
            v: Values, (B, K, T, E).

        Returns:
            All keys and values that the new positions may read, (B, K, S, E) each.
        """
        return k, v


class Branches(NamedTuple):
    """Rows that branch: beginnings of several texts stand once, followed by all their ends.

    The tokens of a row are the nodes of a tree, each after its parent and each subtree in one
    piece. A token reads those on its way from the root. Padding is a token at the row's end that
    reads itself alone. Everything stands after what the cache remembers, if there is one.
    """

    positions: Tensor  # (B, T), int64: where each token stands along its way
    ends: Tensor  # (B, T), int64: index along the row of the first later token that doesn't read it

    def readable(self, before: int) -> Tensor:
        """Say who reads whom.

        Args:
            before: Positions remembered, P - T; all tokens read them.

        Returns:
            (B, 1, T, P), bool.

        Example:
            >>> places = torch.tensor([[0, 1, 1]])  # one trunk, two branches of one token each
            >>> Branches(places, torch.tensor([[3, 2, 3]])).readable(0).int()[0, 0].tolist()
            [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
        """
        T = self.ends.shape[1]
        place = torch.arange(T, device=self.ends.device)
        later = place[:, None] >= place  # (T, T)
        inside = place[:, None] < self.ends[:, None]  # (B, T, T)
        return F.pad((later & inside)[:, None], (before, 0), value=True)


@dataclass(frozen=True)
class Frame(ABC):
    """What all layers of one pass share: where its T tokens stand and what separates them."""

    cos: Tensor  # (T, C/2), float32; (B, T, C/2) where rows branch
    sin: Tensor  # the same

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, memory: Memory, dropout: float) -> Tensor:
        """Average the values that each query may read.

        Args:
            q: Queries, (B, T, H, C).
            k: Keys, (B, T, K, C).
            v: Values, (B, T, K, C).
            memory: Earlier positions of the same rows.
            dropout: Share of the probabilities dropped.

        Returns:
            The averages, (B, T, H, C).
        """


@dataclass(frozen=True)
class Channelled(Frame):
    """Biases as channels, for kernels that take no mask and keep no scores.

    With T = S (training, a whole prompt) and T = 1 (one more token) there is no mask tensor;
    otherwise torch gets one, and picks a kernel that takes it.
    """

    query_channels: Tensor  # (H, 8)
    key_channels: Tensor  # (B, T, 8)
    kernel: str = "sdpa"
    readable: Tensor | None = None  # (B, 1, T, S), bool, where rows branch

    def attend(self, q: Tensor, k: Tensor, v: Tensor, memory: Memory, dropout: float) -> Tensor:
        """Average by one of torch's kernels; see `Frame`."""
        C, T = q.shape[-1], q.shape[1]
        q = append(q, self.query_channels)  # (B, T, H, E)
        k = append(k, self.key_channels.unsqueeze(2))  # (B, T, K, E)
        v = F.pad(v, (0, CHANNELS))  # (B, T, K, E): kernels want values as wide as keys
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # heads first
        k, v = memory.extend(k, v)  # (B, K, S, E)
        S, mask, causal = k.shape[2], self.readable, False
        if mask is None and T == S:
            causal = True
        elif mask is None and T > 1:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        with _only(self.kernel):
            y = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=causal, scale=C**-0.5, enable_gqa=True
            )
        return y.transpose(1, 2)[..., :C]


@dataclass(frozen=True)
class Masked(Frame):
    """Biases as a matrix that is added to the scores, for the plain kernel."""

    bias: Tensor  # (B, 1, T, S), with ALiBi (B, H, T, S); -inf where nothing may be read

    def attend(self, q: Tensor, k: Tensor, v: Tensor, memory: Memory, dropout: float) -> Tensor:
        """Average by products of matrices; see `Frame`."""
        # heads first; a compiler makes the copies as it rotates, and the backward pass makes none
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        k, v = memory.extend(k, v)  # (B, K, S, C)
        y: Tensor = plain_attention(q, k, v, self.bias, dropout)[0]
        return y


def append(x: Tensor, channels: Tensor) -> Tensor:
    """Append bias channels, (..., 8) that broadcast, to x (B, T, heads, C) in its own dtype."""
    return torch.cat((x, channels.to(x.dtype).expand(*x.shape[:3], CHANNELS)), -1)


def bias_matrix(documents: Tensor, heads: int, alibi: bool, dtype: torch.dtype) -> Tensor:
    """Make what is added to scores.

    Args:
        documents: Which document of its row each token belongs to, (B, T), int64.
        heads: Query heads, H.
        alibi: Whether keys lose slope * distance.
        dtype: The scores' dtype.

    Returns:
        (B, 1, T, T), or (B, H, T, T) with ALiBi, in `dtype`: 0 or -slope * distance, and -inf for
        keys that come later or are another document's.

    Example:
        >>> bias_matrix(torch.tensor([[0, 1, 1]]), 2, False, torch.float32)[0, 0].tolist()
        [[0.0, -inf, -inf], [-inf, 0.0, -inf], [-inf, 0.0, 0.0]]
    """
    T = documents.shape[1]
    readable = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # (B, 1, T, T)
    place = torch.arange(T, device=documents.device)
    bias = _distance_bias(place, place, heads) if alibi else place.new_zeros((), dtype=torch.float)
    return torch.where(readable, bias, -torch.inf).to(dtype)


def branching_bias_matrix(
    branches: Branches, before: int, heads: int, alibi: bool, dtype: torch.dtype
) -> Tensor:
    """Make what is added to scores of rows that branch.

    Args:
        branches: Where tokens stand and who reads them.
        before: Positions remembered, from 0, P - T.
        heads: Query heads, H.
        alibi: Whether keys lose slope * distance.
        dtype: The scores' dtype.

    Returns:
        (B, 1, T, P), or (B, H, T, P) with ALiBi, in `dtype`; see `bias_matrix`.
    """
    place = branches.positions
    bias = place.new_zeros((), dtype=torch.float)
    if alibi:
        first = torch.arange(before, device=place.device).expand(len(place), -1)
        bias = _distance_bias(place, torch.cat((first, place), 1), heads)  # (B, H, T, P)
    return torch.where(branches.readable(before), bias, -torch.inf).to(dtype)


def _distance_bias(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Give what each head's keys lose, (..., H, T, S), of positions (..., T) and (..., S)."""
    slopes = alibi_slopes(heads).to(keys.device, torch.float32)
    distance = keys[..., None, :] - queries[..., None]  # (..., T, S)
    return slopes[:, None, None] * distance.unsqueeze(-3)


def obstacle(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> str | None:
    """Say why a kernel can't train here.

    Args:
        name: One of `KERNELS`.
        device: Where the model runs.
        dtype: Dtype of queries, keys and values.
        dropout: Share of the probabilities dropped.

    Returns:
        What is missing, or None where nothing is.
    """
    gpu = device.type == "cuda"
    if name in ("cudnn", "flash3") and (not gpu or torch.version.hip is not None):
        return f"{name} needs an NVIDIA GPU, and this is {device.type}"
    if gpu and name in BACKENDS and dtype == torch.float32:
        return f"{name} multiplies bfloat16 alone on GPUs, and train.precision is float32"
    if name == "flash" and not gpu and dropout:
        return "flash takes no dropout on CPUs, and model.dropout is set"
    if name == "flash3":
        if dropout:
            return "flash3 takes no dropout, and model.dropout is set"
        if torch.cuda.get_device_capability(device) != (9, 0):
            return "flash3 needs a Hopper GPU"
        if find_spec("flash_attn_interface") is None:
            return "flash3 needs the package flash_attn_3 (module flash_attn_interface)"
        if not hasattr(attention, "current_flash_attention_impl"):
            return f"flash3 needs a newer torch than {torch.__version__}"
    return None


def install(kernel: str) -> None:
    """Make torch's flash attention what a kernel's name says; every process calls this.

    FlashAttention 3 takes the place of torch's own in all that runs afterwards, until another
    kernel is installed.

    Args:
        kernel: One of `KERNELS`.
    """
    if not hasattr(attention, "current_flash_attention_impl"):
        return  # a torch that has none but its own; `obstacle` refuses flash3 there
    if kernel == "flash3":
        attention.activate_flash_attention_impl("FA3")
    elif attention.current_flash_attention_impl() is not None:
        attention.restore_flash_attention_impl()


def _only(kernel: str) -> AbstractContextManager[Any]:
    """Let torch take this kernel and no other; it fails where the kernel can't do it."""
    return sdpa_kernel(BACKENDS[kernel]) if kernel in BACKENDS else nullcontext()
