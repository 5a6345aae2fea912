"""lm-eval's `hf` model class as a side of the benchmark `evaluation.py`.

`evaluation.py` starts this file with an interpreter that has `lm_eval` and `transformers`; it uses
nothing of SummerLM. The first argument is the model's folder. Each line read is a JSON object:
`file`, contexts and continuations, and `batch`, requests a batch; the answer is a line: seconds,
and log-likelihood and whether it is greedy of each.
"""

import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def main() -> None:
    logging.disable(logging.WARNING)  # a line for each request that is cut
    model = HFLM(
        pretrained=sys.argv[1],
        device="cpu",
        dtype="float32",
        batch_size=1,
        add_bos_token=True,
    )
    packages = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    print(json.dumps({**packages, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        model.batch_size_per_gpu = question["batch"]
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=(context, text), idx=0)
            for context, text in json.loads(Path(question["file"]).read_text())
        ]
        began = time.perf_counter()
        answers = model.loglikelihood(requests, disable_tqdm=True)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "answers": answers}), flush=True)


if __name__ == "__main__":
    main()
