"""The command `lora-fast`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import lora_fast


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None for those of the process.

    Returns:
        The exit status: 0, 1 if a check failed, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    from lora_fast.demo.run import run

    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-fast", description=lora_fast.__doc__)
    parser.add_argument("--version", action="version", version=f"lora_fast {lora_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="fine-tune a small GPT with loralib's layers and with ours, and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="file or folder to fine-tune on instead of the code of Python's standard library",
    )
    demo.add_argument(
        "--model",
        metavar="NAME",
        help="folder or hub name of a transformers causal "
        "language model to fine-tune instead of the small GPT",
    )
    demo.add_argument("--device", help="cpu, cuda, cuda:1 ...; a GPU if there is one by default")
    demo.add_argument("--steps", type=_positive, default=150, help="fine-tuning steps")
    demo.add_argument(
        "--pretrain-steps", type=_positive, default=250, help="steps of the small GPT before that"
    )
    demo.add_argument("--dropout", type=_rate, default=0.0, help="lora_dropout, from 0 to below 1")
    demo.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    demo.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="FOLDER", help="where results go"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, got {text}")
    return value
