"""SummerLM's side of the benchmark `evaluation.py`.

The job in the first argument makes the model. Each line read is a JSON object: `file`, contexts and
continuations, and `batch`, positions of a pass; the answer is a line: seconds, and log-likelihood
and whether it is greedy of each.
"""

import json
import sys
import time
from pathlib import Path

import torch
from evaluation_models import make_model

from summerlm.core.runtime import keep_freed_memory
from summerlm.eval.encoding import encode_pairs
from summerlm.eval.likelihood import answer


def main() -> None:
    keep_freed_memory()
    lm = make_model(json.loads(sys.argv[1]))
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        pairs = [(a, b) for a, b in json.loads(Path(question["file"]).read_text())]
        began = time.perf_counter()
        asks = encode_pairs(lm.tokenizer, pairs)
        found = answer(lm.model, asks, batch_tokens=question["batch"])
        seconds = time.perf_counter() - began
        answers = [(one.logprob, one.greedy) for one in found]
        print(json.dumps({"seconds": seconds, "answers": answers}), flush=True)


if __name__ == "__main__":
    main()
