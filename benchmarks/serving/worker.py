"""One vLLM engine and 32 requests at once: `python -m benchmarks.serving.worker FOLDER SETTINGS FILE`.

SETTINGS are arguments of vllm.LLM as JSON. FILE gets the tokens, the tokens of a second round, whose prompts are in the
prefix cache, and the number of prompt tokens that came from there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# One process where one is enough, and no process bound to a core that others use.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
REQUESTS, PREFIX, TOKENS = 32, 140, 16  # the prefix is longer than a block of the cache, which is 128 on a CPU


def prompts(vocabulary: int) -> list[dict[str, list[int]]]:
    """Requests of different lengths with a common beginning."""
    prefix = [2 + i * 7 % (vocabulary - 2) for i in range(PREFIX)]
    own = ([2 + (i * 31 + j * 13) % (vocabulary - 2) for j in range(1 + i)] for i in range(REQUESTS))
    return [{"prompt_token_ids": prefix + each} for each in own]


def engine(folder: str, **settings: Any) -> Any:
    """vllm.LLM, for a moderate machine."""
    from vllm import LLM

    if not {"tensor_parallel_size", "pipeline_parallel_size"} & settings.keys():
        settings["distributed_executor_backend"] = "uni"
    return LLM(folder, **{"max_model_len": 256, "max_num_seqs": REQUESTS, "disable_log_stats": False, **settings})


def generate(llm: Any, vocabulary: int) -> list[list[int]]:
    """The most likely tokens of all requests, which are sent at once."""
    from vllm import SamplingParams

    how = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return [list(each.outputs[0].token_ids) for each in llm.generate(prompts(vocabulary), how, use_tqdm=False)]


def cached(llm: Any) -> int:
    """Prompt tokens that were taken from the prefix cache."""
    return sum(int(each.value) for each in llm.get_metrics() if each.name == "vllm:prefix_cache_hits")


def main() -> None:
    """Write FILE."""
    folder, settings, file = sys.argv[1:]
    os.environ.update(ENVIRONMENT)
    start = time.perf_counter()
    llm = engine(folder, **json.loads(settings))
    ready = time.perf_counter()
    vocabulary = llm.get_tokenizer().vocab_size
    first = generate(llm, vocabulary)
    done = time.perf_counter()
    found = {"tokens": first, "again": generate(llm, vocabulary), "cached": cached(llm)}
    found |= {"start_s": round(ready - start, 1), "generate_s": round(done - ready, 1)}
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
