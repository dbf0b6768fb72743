"""The causal language models: the code model of examples/code_lm, and any model of transformers in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.subjects import corpus
from benchmarks.accuracy.subjects.base import half_precision
from benchmarks.accuracy.subjects.language import LanguageModel, Sample
from examples.code_lm import data
from examples.code_lm.checkpoint import WEIGHTS, load_pretrained
from examples.code_lm.model import CodeLM, KVCache

# To judge what it writes: long enough for statements after a docstring.
WRITING = Sample(windows=16, prompts=64, greedy=16, count=128)


class CodeModel(LanguageModel):
    """The byte-level model of examples/code_lm, shipped or trained by its train.py, on source or prose that it never saw."""

    model: CodeLM

    def __init__(self, text: str = "code", path: Path = WEIGHTS, sample: Sample | None = None) -> None:
        model = half_precision(load_pretrained(path))
        split = data.load_split()
        calibrate_prose, prose = corpus.split_prose()
        documents = {"code": split.held_out, "prose": prose}[text]
        own, other = "own", "other"
        if text == "prose":
            own, other = other, own
        kinds = {own: lambda: _pieces(split.train), other: lambda: calibrate_prose, "noise": corpus.noise}
        super().__init__(
            *(
                f"{path.parent.name if path == WEIGHTS else path.stem} on {text}",
                model,
                256,
                documents,
                kinds,
                list,
                bytes,
                sample or Sample(),
            )
        )

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        return {"tokens": tokens}

    def begin(self, tokens: Tensor, count: int) -> tuple[Tensor, Any]:
        cache = KVCache.allocate(self.model.config, len(tokens), tokens.shape[1] + count)
        position = torch.arange(tokens.shape[1])
        return self.model(tokens, cache, position)[:, -1], (cache, position[-1:])

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache, position = state[0], state[1] + 1
        return self.model(tokens, cache, position)[:, -1], (cache, position)


class CausalModel(LanguageModel):
    """A causal language model of transformers in the folder `path`, and the text file `text`."""

    def __init__(
        self,
        path: Path,
        text: Path,
        calibrate: Path | None = None,
        sample: Sample | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        how: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(path, **how)
        config = AutoConfig.from_pretrained(path, **how)
        model = half_precision(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **how))
        calibrate = calibrate or text
        kinds = {"own": lambda: _chapters(calibrate.read_bytes()), "noise": corpus.noise}
        super().__init__(
            path.name,
            model,
            config.vocab_size,
            _chapters(text.read_bytes()),
            kinds,
            lambda text: tokenizer(text.decode(errors="replace"))["input_ids"],
            lambda tokens: str(tokenizer.decode(tokens)).encode(),
            sample or Sample(),
        )

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits.float()

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        return {"input_ids": tokens}

    def begin(self, tokens: Tensor, count: int) -> tuple[Tensor, Any]:
        output = self.model(input_ids=tokens, use_cache=True)
        return output.logits[:, -1].float(), output.past_key_values

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = self.model(input_ids=tokens, past_key_values=state, use_cache=True)
        return output.logits[:, -1].float(), output.past_key_values


def _pieces(train: Tensor, size: int = 8192) -> dict[str, bytes]:
    """Training bytes as documents."""
    return {f"{i:05}": bytes(part.tolist()) for i, part in enumerate(train.split(size)[:-1])}


def _chapters(text: bytes, size: int = 8192) -> dict[str, bytes]:
    """A text in pieces, for bootstrapping."""
    return {f"{i:05}": text[start : start + size] for i, start in enumerate(range(0, len(text), size))}
