"""`python -m benchmarks.accuracy`: the study, row by row; a run that was stopped is continued.

    python -m benchmarks.accuracy                              the shipped code model, and the encoder where it is installed
    python -m benchmarks.accuracy --code-model runs/large.safetensors
    python -m benchmarks.accuracy --model FOLDER --text FILE --calibrate FILE     any causal model of transformers

Writes NAME.jsonl (row by row), NAME.json, NAME.csv and NAME.png, where NAME is --out.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.accuracy import report, settings, study
from benchmarks.accuracy.rows import Rows, export
from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.subjects.base import Subject
from benchmarks.accuracy.subjects.causal import WRITING, CausalModel, CodeModel
from benchmarks.accuracy.subjects.encoder import Encoder, find_encoder
from benchmarks.accuracy.subjects.language import Sample
from benchmarks.system.environment import versions
from examples.code_lm.checkpoint import WEIGHTS
from fp6_compile.cli.folder import load, read_config

SUBJECTS = ["code", "encoder", "prose", "writing"]
QUICK = Sample(windows=4, length=128, prompts=4, greedy=2, context=64, count=16, calibration=4, batch=4)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, then print the tables and write the files."""
    arguments = _arguments(argv)
    rows = Rows(arguments.out.with_suffix(".jsonl"), versions())
    for subject, chosen in _subjects(arguments):
        study.run(subject, settings.quick() if arguments.quick else chosen, rows)
    found = {name: report.with_ratios(rows.of(name)) for name in rows.subjects}
    for name, of_subject in found.items():
        print(f"\n{name}\n{'-' * len(name)}")
        print("\n".join(report.table(of_subject, "pipe" if arguments.markdown else "plain")))
    export([row for of_subject in found.values() for row in of_subject], arguments.out)
    report.draw(found, arguments.out.with_suffix(".png"))
    print(f"\nwrote {arguments.out}.json, .csv and, where formats are mixed, .png")


def _subjects(arguments: argparse.Namespace) -> Iterator[tuple[Subject, list[Setting]]]:
    sample = QUICK if arguments.quick else Sample()
    if arguments.model:
        given = arguments.model, arguments.text, arguments.calibrate, sample, arguments.trust_remote_code
        yield CausalModel(*given), settings.full()
        return
    if "code" in arguments.subjects:
        yield CodeModel("code", arguments.code_model, sample), settings.full()
    if "writing" in arguments.subjects:
        yield CodeModel("code", arguments.code_model, sample if arguments.quick else WRITING), settings.writing()
    if "prose" in arguments.subjects:
        yield CodeModel("prose", arguments.code_model, sample), settings.overfit()
    if "encoder" in arguments.subjects:
        with contextlib.suppress(FileNotFoundError):
            yield Encoder(find_encoder(), *((24, 8) if arguments.quick else ())), settings.full()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--code-model", type=Path, default=WEIGHTS, help="weights that examples.code_lm.train wrote")
    parser.add_argument("--model", type=Path, help="folder of a causal model of transformers, instead of the subjects")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the --model folder brings along"
    )
    parser.add_argument("--text", type=Path, help="a text file to measure --model on")
    parser.add_argument("--calibrate", type=Path, help="another one to calibrate on; --text if it is not given")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/accuracy/runs/accuracy"), help="default: %(default)s"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--quick", action="store_true", help="few rows, little text: to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.model and not arguments.text:
        parser.error("--model needs --text, a file to measure it on")
    if arguments.model:
        from transformers import AutoTokenizer

        try:
            read_config(arguments.model, arguments.trust_remote_code)
            load(AutoTokenizer, arguments.model, arguments.trust_remote_code)
        except ValueError as error:
            parser.error(f"--model: {error}")
    return arguments


if __name__ == "__main__":
    main()
