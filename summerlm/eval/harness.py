"""Our models within lm-eval, EleutherAI's harness: its requests, answered by our code.

Flow:
    1. `harness_tasks.evaluate_with_harness` hands a `HarnessModel` to lm-eval, which makes prompts;
    2. the model encodes by `encode_pairs` or `rolling`, scores by `answer` and writes by
       `LanguageModel.complete`;
    3. lm-eval sums up.
Importing this module registers the model as `summerlm`. lm-eval finds no models of other packages
by itself, so running this module runs lm-eval's own command:
`python -m summerlm.eval.harness --model summerlm --model_args run=runs/demo --tasks arc_easy`.
Needs the extra `eval`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string

from summerlm.checkpoint.load import load
from summerlm.core.errors import UsageError
from summerlm.core.hardware import pick_device
from summerlm.eval.encoding import encode_pairs
from summerlm.eval.likelihood import Ask, answer
from summerlm.eval.windows import rolling
from summerlm.generate.engine import LanguageModel

MAX_TOKENS = 256  # of a completion, where neither task nor user says it: as lm-eval's own models
ITS_OWN = ("batch_size", "max_batch_size")  # its command always gives them; we batch by tokens


@register_model("summerlm")
class HarnessModel(LM):
    """Answer lm-eval's requests: every text begins with BOS, once.

    Args:
        lm: The model with its tokenizer.
    """

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self._lm = lm

    @classmethod
    def from_run(cls, run: str, device: str = "auto") -> Self:
        """Load a run or checkpoint.

        Args:
            run: Its folder.
            device: "auto", "cpu" or "cuda".

        Returns:
            The model.

        Raises:
            UsageError: If the folder is neither, or there is no such device.
            NoCheckpointError: If no checkpoint there can be trusted.
        """
        loaded = load(Path(run), pick_device(device))
        return cls(LanguageModel(loaded.model, loaded.tokenizer))

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Make the model that lm-eval's `model_args` describe.

        Args:
            arg_dict: `run`, and `device` if wanted.
            additional_config: What other options of its command say.

        Returns:
            The model.

        Raises:
            UsageError: If `run` is missing or something else is asked for.
        """
        given = {k: v for k, v in (additional_config or {}).items() if v is not None} | arg_dict
        given = {key: value for key, value in given.items() if key not in ITS_OWN}
        if "run" not in given or (unknown := given.keys() - {"run", "device"}):
            named = ", ".join(sorted(unknown)) if "run" in given else "no run"
            raise UsageError(f"model_args: {named}; give run=FOLDER and, if wanted, device=cpu")
        return cls.from_run(**given)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Do the same from `key=value,key=value`; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts.

        Args:
            requests: Each with a context and a continuation, texts.
            disable_tqdm: Nothing: we show no bar.

        Returns:
            For each request its log-probability in nats and whether every token is the likeliest.
        """
        asks = encode_pairs(self._lm.tokenizer, [request.args for request in requests])
        found = [(one.logprob, one.greedy) for one in answer(self._lm.model, asks)]
        self._remember("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole documents, in windows of the model's context that overlap in no target.

        Args:
            requests: Each with a document.
            disable_tqdm: Nothing: we show no bar.

        Returns:
            The log-probability of each document in nats; BOS is read and not scored.
        """
        tokenizer, context = self._lm.tokenizer, self._lm.config.context
        encoded = tokenizer.encode_batch([request.args[0] for request in requests])
        asks: list[Ask] = []
        owners: list[int] = []  # the document of each ask
        for owner, ids in enumerate(encoded):
            stream = (tokenizer.bos, *ids)
            for start, first, end in rolling(len(stream), context, stride=context):
                asks.append(Ask(stream[start : first + 1], stream[first + 1 : end + 1]))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, one in zip(owners, answer(self._lm.model, asks), strict=True):
            totals[owner] += one.logprob
        self._remember("loglikelihood_rolling", requests, totals)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write on greedily from prompts.

        Args:
            requests: Each with a prompt and its settings: stop strings, most tokens.
            disable_tqdm: Nothing: we show no bar.

        Returns:
            Each completion up to its first stop string. A prompt that leaves no room for the most
            tokens loses its beginning, BOS first.

        Raises:
            UsageError: If draws are asked for, or as many tokens as the model reads at once.
        """
        tokenizer, context = self._lm.tokenizer, self._lm.config.context
        texts: list[str] = [""] * len(requests)
        for settings, members in _by_settings(requests):
            if settings["do_sample"]:
                raise UsageError("lm-eval asks for draws (do_sample); summerlm writes greedily")
            most, stop = settings["max_gen_toks"], [text for text in settings["until"] if text]
            if most >= context:
                raise UsageError(
                    f"the task writes up to {most} tokens, and the model reads {context}, prompt "
                    "included: set max_gen_toks lower in the task's generation_kwargs"
                )
            prompts = tokenizer.encode_batch([requests[i].args[0] for i in members])
            begun = [[tokenizer.bos, *ids] for ids in prompts]
            written = self._lm.complete(begun, max_tokens=most, stop=stop)
            for i, text in zip(members, written, strict=True):
                texts[i] = text
        self._remember("generate_until", requests, texts)
        return texts

    def _remember(self, kind: str, requests: list[Instance], found: Sequence[Any]) -> None:
        """Let lm-eval's own cache, where it has one, take the answers."""
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, one)


def _by_settings(requests: list[Instance]) -> list[tuple[dict[str, Any], list[int]]]:
    """Gather the places of requests that are to be written with the same settings."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for place, request in enumerate(requests):
        settings = normalize_gen_kwargs(request.args[1], MAX_TOKENS)
        key = json.dumps(settings, sort_keys=True, default=str)
        groups.setdefault(key, (dict(settings), []))[1].append(place)
    return list(groups.values())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
