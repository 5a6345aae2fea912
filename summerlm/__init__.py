"""SummerLM: pretrain your own language model from scratch.

The front door of the library: `load` a run and complete text with it. Everything heavy is
imported on first use, so that `import summerlm` is quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from summerlm.generate.engine import LanguageModel

__version__ = "0.1.0"


def load(path: str | Path, device: str = "auto") -> "LanguageModel":
    """Load a trained model.

    Args:
        path: A run folder, of which the newest good checkpoint is taken, or a checkpoint folder.
        device: "auto", "cpu" or "cuda".

    Returns:
        The model with its tokenizer: `.generate`, `.stream`, `.logits`, `.tokenizer`, `.model`,
        `.config`.

    Raises:
        SummerError: If the path holds no trustworthy model; the message says what to do.
    """
    from summerlm.checkpoint.load import load as load_checkpoint
    from summerlm.core.hardware import pick_device
    from summerlm.generate.engine import LanguageModel

    loaded = load_checkpoint(Path(path), pick_device(device))
    return LanguageModel(loaded.model, loaded.tokenizer)
