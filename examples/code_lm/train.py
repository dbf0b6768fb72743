"""Train the byte-level model on the standard library's source, on whatever this machine has.

    python -m examples.code_lm.train                # twenty minutes, then examples/code_lm/weights.safetensors
    python -m examples.code_lm.train --minutes 2    # a taste

How it works. AdamW on FP32 weights with the arithmetic in BF16 (autocast), gradients clipped, and a learning rate
that warms up and then follows a cosine to nothing. The schedule runs on the clock instead of on a number of steps, so
a budget in minutes gives a finished model on slow and fast machines alike; `--steps` makes it run on steps instead,
which is reproducible. A checkpoint is written every minute and at the end, to a temporary name that is then renamed,
so a kill at any moment leaves a whole one. Starting again with the same folder continues where it stopped.

On cores that other processes use too, set OMP_WAIT_POLICY=passive, so that a thread that waits for a preempted one
lends it the core instead of spinning: it made a step several times faster on two busy cores, a sixth slower on idle ones.

What it leaves out: more than one device, sharded or streamed data, search over settings.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .checkpoint import WEIGHTS, export_weights, load_pretrained
from .data import KIB_PER_FILE, Split, bits_per_byte, held_out_windows, load_split, training_batch
from .model import CodeLM, ModelConfig

RUNS = Path(__file__).with_name("runs")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a run; a resumed run must be given the same, or it is another run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    minutes: float = 20.0
    steps: int | None = None
    batch_size: int = 4
    length: int = 512
    lr: float = 2e-3
    warmup: float = 0.03
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


@dataclass
class Progress:
    """What a checkpoint remembers besides tensors; `seconds` excludes compilation."""

    step: int = 0
    seconds: float = 0.0
    loss: float = float("nan")


def learning_rate(done: float, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to a hundredth; `done` is the fraction of the run that is behind us."""
    done = min(done, 1.0)
    if done < config.warmup:
        # Not from zero: on the clock, the very first step sits at `done` = 0 and should still learn.
        return config.lr * (0.02 + 0.98 * done / config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))
    return config.lr * (0.01 + 0.99 * cosine)


class Trainer:
    """A model, its optimizer and its place in the run."""

    def __init__(self, config: TrainConfig, train: Tensor, *, device: str, compiled: bool) -> None:
        torch.manual_seed(config.seed)
        self.config, self.train, self.device = config, train, device
        self.model = CodeLM(config.model).to(device)
        self.forward = torch.compile(self.model) if compiled else self.model
        # Gains of norms are one-dimensional and have no reason to be small.
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        gains = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
        self.progress = Progress()

    @property
    def done(self) -> float:
        """Fraction of the run that is behind us; 1 or more when it is over."""
        if self.config.steps is not None:
            return self.progress.step / self.config.steps
        return self.progress.seconds / (60 * self.config.minutes)

    def step(self) -> float:
        """One optimizer step; the loss of its batch in bits per byte."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, config)
        inputs, targets = training_batch(
            self.train, self.progress.step, seed=config.seed, batch_size=config.batch_size, length=config.length
        )
        with torch.autocast(self.device, dtype=torch.bfloat16):
            logits = self.forward(inputs.to(self.device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(self.device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.loss = loss.item() / math.log(2)
        return self.progress.loss

    def save(self, path: Path) -> None:
        """Write a checkpoint that is either whole or not there."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"progress": asdict(self.progress), "config": asdict(self.config)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: when it is of a run with other settings.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        wanted, found = asdict(self.config), state["config"]
        changed = sorted(name for name in wanted if wanted[name] != found.get(name))
        if changed:
            raise ValueError(f"{path} is of a run with another {', '.join(changed)}: use --no-resume or another --run")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


def run(trainer: Trainer, path: Path, *, stop_after: int | None = None, save_every: float = 60.0) -> Progress:
    """Train until the budget is spent, or for `stop_after` steps of this process; a checkpoint is left at `path`."""
    progress, first = trainer.progress, trainer.progress.step
    last_step = saved = time.monotonic()
    smooth = progress.loss
    with tqdm(
        total=100, initial=min(100, 100 * trainer.done), bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    ) as bar:
        while trainer.done < 1 and (stop_after is None or progress.step - first < stop_after):
            loss = trainer.step()
            now = time.monotonic()
            if progress.step > first + 1:  # the first step of a process pays for compilation, the budget does not
                progress.seconds += now - last_step
            last_step = now
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            bar.set_postfix(step=progress.step, bits_per_byte=f"{smooth:.3f}", refresh=False)
            bar.update(min(100, 100 * trainer.done) - bar.n)
            if now - saved > save_every:
                trainer.save(path)
                saved = last_step = time.monotonic()
    trainer.save(path)
    return progress


def export(trainer: Trainer, split: Split, path: Path) -> dict[str, Any]:
    """Write the weights and, in their header, what they are; the score is that of the file, after rounding to FP16."""
    config, progress = trainer.config, trainer.progress
    provenance: dict[str, Any] = {
        "corpus": "Python standard library source",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": datetime.date.today().isoformat(),
        "parameters": trainer.model.parameter_count(),
        "steps": progress.step,
        "batch_size": config.batch_size,
        "length": config.length,
        "seconds": round(progress.seconds),
        "held_out_kib_per_file": KIB_PER_FILE,
    }
    export_weights(trainer.model, provenance, path)
    windows = held_out_windows(split.held_out, length=config.length)
    score = bits_per_byte(load_pretrained(path, device=trainer.device), windows)
    provenance["held_out_bits_per_byte"] = round(score, 4)
    export_weights(trainer.model, provenance, path)
    return provenance


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; defaults are those of the shipped weights."""
    base = TrainConfig()
    parser = argparse.ArgumentParser(
        prog="python -m examples.code_lm.train",
        description="Train a byte-level Llama on the Python standard library and export it to safetensors. "
        "Run again with the same settings to continue a run that was stopped or killed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    length = parser.add_argument_group("how long")
    length.add_argument("--minutes", type=float, default=base.minutes, help="budget and schedule, without compilation")
    length.add_argument("--steps", type=int, help="budget and schedule in steps instead, which is reproducible")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--batch-size", type=int, default=base.batch_size, help="windows per step")
    recipe.add_argument("--length", type=int, default=base.length, help="bytes per window")
    recipe.add_argument("--lr", type=float, default=base.lr, help="peak learning rate")
    recipe.add_argument("--seed", type=int, default=base.seed, help="of the initial weights and the batches")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device type")
    machine.add_argument("--threads", type=int, help="CPU threads; fewer than cores when others use them too")
    machine.add_argument("--eager", action="store_true", help="do not compile the model")
    files = parser.add_argument_group("files")
    files.add_argument("--run", type=Path, default=RUNS / "default", help="folder of the checkpoint")
    files.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue the run there")
    files.add_argument("--output", type=Path, default=WEIGHTS, help="the exported weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line: train, or go on training, then export."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = TrainConfig(
        minutes=args.minutes,
        steps=args.steps,
        batch_size=args.batch_size,
        length=args.length,
        lr=args.lr,
        seed=args.seed,
    )
    split = load_split()
    trainer = Trainer(config, split.train, device=args.device, compiled=not args.eager)
    checkpoint = args.run / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        trainer.resume(checkpoint)
        print(f"continuing at step {trainer.progress.step}, {100 * trainer.done:.0f} % done")
    held_out = sum(map(len, split.held_out.values()))
    print(f"{trainer.model.parameter_count():,} parameters, {len(split.train):,} bytes to learn, {held_out:,} held out")
    run(trainer, checkpoint)
    for name, value in export(trainer, split, args.output).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
