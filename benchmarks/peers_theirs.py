"""Training steps of other codebases, made as their own training scripts make them.

Flow: `peers_side` makes one of `NanoGPT`, `Original`, `Llama` of a job and calls `step`.

Models and optimizers are the peers' own, imported from a checkout or an installed package. What
surrounds them in their scripts and is no function to call is written here after the script named
at each class, with what differs told there. All of them may accumulate over micro-batches.

Shapes: B rows, T positions.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peers_shape import FILES, Shape, peer_hidden
from torch import Tensor, nn

LOOK_EVERY = 10  # steps between two looks at nanoGPT's loss: config/train_gpt2.py


def load_model(job: dict[str, Any]) -> ModuleType:
    """Import the file of a peer's checkout that has its model.

    Args:
        job: What `peers_side` was started with.

    Returns:
        The module.
    """
    path = Path(job["repo"]) / FILES[job["side"]]
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch.jit look themselves up
    spec.loader.exec_module(module)
    return module


class Theirs:
    """What all peers have in common.

    Args:
        job: What `peers_side` was started with.
        build: Makes the model, in training mode and float32; called with the default device set.
    """

    def __init__(self, job: dict[str, Any], build: Callable[[], nn.Module]) -> None:
        self.device = torch.device(job["device"])
        with self.device:
            self.model = build().to(self.device).train()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.run = torch.compile(self.model) if job["compiled"] else self.model
        self._dtype = getattr(torch, job["dtype"])
        self._micro_rows = job["micro_rows"]

    def autocast(self) -> AbstractContextManager[Any]:
        """Give the context of a forward pass."""
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def split(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Cut rows into micro-batches."""
        return list(zip(*(tensor.split(self._micro_rows) for tensor in tensors), strict=True))


class NanoGPT(Theirs):
    """nanoGPT: `model.py`, `configure_optimizers`, and what `train.py` does in a step.

    `train.py` has no autocast on CPUs; here it may have, as one of the modes. Its GradScaler does
    nothing outside float16 and is left out.

    Args:
        job: What `peers_side` was started with.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        shape, module = Shape(**job["shape"]), load_model(job)
        config = module.GPTConfig(
            block_size=shape.context,
            vocab_size=-(-shape.vocabulary // 64) * 64,  # as its comment on vocab_size advises
            n_layer=shape.layers,
            n_head=shape.heads,
            n_embd=shape.width,
            dropout=0.0,
            bias=False,
        )
        super().__init__(job, lambda: module.GPT(config))
        self._optimizer = self.model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), self.device.type)
        self._steps = 0

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Make one step on (B, T) each; gives the mean loss, ()."""
        micros = self.split(tokens, targets)
        mean = torch.zeros((), device=self.device)
        for x, y in micros:
            with self.autocast():
                _, loss = self.run(x, y)
                loss = loss / len(micros)
            loss.backward()
            mean += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        if self._steps % LOOK_EVERY == 0:
            mean.item()
        return mean


class Original(Theirs):
    """The original SummerLM: `nmdl.py`, and the step of `main_distributed.py`.

    With its GradScaler, its plain AdamW, its schedule's call and its four waits for the device a
    batch. Left out, in its favour: the DistributedDataParallel wrapper and the all-reduce of one
    rank; added: accumulation, for it has none.

    Args:
        job: What `peers_side` was started with.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        shape, module = Shape(**job["shape"]), load_model(job)
        super().__init__(
            job,
            lambda: module.TransformerLM(
                vocab_size=shape.vocabulary,
                dim=shape.width,
                n_heads=shape.heads,
                n_layers=shape.layers,
                mlp_expansion=(peer_hidden("original", shape) + 0.5) / shape.width,  # it cuts
                dropout=0.1,
                max_seq_len=shape.context,
                use_rotary=True,
                use_alibi=True,
                ignore_index=-100,
            ),
        )
        self._scaler = torch.amp.GradScaler(self.device.type)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, weight_decay=0.01, betas=(0.9, 0.95)
        )
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda _: 1.0)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Make one step on (B, T) each; gives the mean loss, (). Targets are made of `tokens`."""
        self._optimizer.zero_grad()
        micros = self.split(tokens, tokens)
        nats = 0.0
        for text, label in micros:
            with self.autocast():
                _, loss = self.run(idx=text, targets=label)
            is_finite = torch.tensor(float(torch.isfinite(loss)), device=self.device)
            if is_finite.item() == 0.0:
                raise SystemExit("the original's loss is not finite")
            counted = (label != -1).sum().item()
            nats += loss.item() * counted
            self._scaler.scale(loss / len(micros)).backward()
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._scheduler.step()
        return torch.tensor(nats / tokens.numel())


class Llama(Theirs):
    """Hugging Face's Llama with random weights, its own loss, and a fused AdamW.

    Args:
        job: What `peers_side` was started with.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = Shape(**job["shape"])
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=peer_hidden("llama", shape),
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.context,
            use_cache=False,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
        super().__init__(job, lambda: LlamaForCausalLM(config))
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True
        )

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Make one step on (B, T) each; gives the mean loss, ()."""
        micros = self.split(tokens)
        mean = torch.zeros((), device=self.device)
        for (x,) in micros:
            with self.autocast():
                loss = self.run(input_ids=x, labels=x).loss / len(micros)
            loss.backward()
            mean += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return mean
