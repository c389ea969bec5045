"""The command `lora-fast`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import lora_fast
from lora_fast.commands import more_than_zero, not_empty, number, path, positive, share, status_of

# What runs each command; imported when it is called, so that `--help` needs nothing.
_MODULES = {
    "demo": "lora_fast.demo.run",
    "doctor": "lora_fast.doctor",
    "tune": "lora_fast.tune.run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None for those of the process.

    Returns:
        The exit status: 0, 1 if a check failed, or one of `lora_fast.commands.status_of`.
    """
    arguments = _parser().parse_args(argv)

    def command() -> int:
        status: int = importlib.import_module(_MODULES[arguments.command]).run(arguments)
        return status

    return status_of(f"lora-fast {arguments.command}", command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-fast", description=lora_fast.__doc__)
    parser.add_argument("--version", action="version", version=f"lora_fast {lora_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_doctor(commands)
    _add_tune(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="fine-tune a small GPT with loralib's layers and with ours, and compare",
    )
    demo.add_argument(
        "--data",
        type=path,
        metavar="PATH",
        help="file or folder to fine-tune on instead of the code of Python's standard library",
    )
    demo.add_argument(
        "--model",
        type=not_empty,
        metavar="NAME",
        help="folder or hub name of a transformers causal "
        "language model to fine-tune instead of the small GPT",
    )
    demo.add_argument(
        "--device", type=not_empty, help="cpu, cuda, cuda:1 ...; a GPU if there is one by default"
    )
    demo.add_argument("--steps", type=positive, default=150, help="fine-tuning steps; default 150")
    demo.add_argument(
        "--pretrain-steps",
        type=positive,
        default=250,
        help="steps of the small GPT before that; default 250",
    )
    demo.add_argument(
        "--dropout",
        type=share,
        default=0.0,
        help="lora_dropout, from 0 to below 1; default 0",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="seed of all random numbers; default 0")
    demo.add_argument(
        "--out",
        type=path,
        default=Path("demo-out"),
        metavar="FOLDER",
        help="where results go; default demo-out",
    )


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    commands.add_parser(
        "doctor",
        help="what is installed, what runs where and why, and whether every op computes the right "
        "thing here; exit status 1 if one does not",
    )


def _add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tune = commands.add_parser(
        "tune",
        help="measure on this GPU which kernels serve your layers best, and use them from now on",
        description="Measures the kernels and tiles that can serve your layers, and keeps what "
        "beats the default in your cache folder, where lora_fast finds it.",
    )
    what = tune.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help="M,K,N,r of a linear layer: rows (batch x tokens), in_features, out_features, rank; "
        "embedding:M,num,D,r of an embedding: tokens, num_embeddings, embedding_dim, rank; "
        "conv2d:C_in,C_out,k,r[,groups] of a convolution, or conv1d or conv3d: channels in and "
        "out, kernel size, rank; several may be given",
    )
    what.add_argument(
        "--model",
        type=not_empty,
        metavar="NAME",
        help="folder or hub name of a transformers model, for the shapes of its linear "
        "layers, embeddings and convolutions",
    )
    what.add_argument("--show", action="store_true", help="print the tables in force, and stop")
    what.add_argument("--reset", action="store_true", help="delete your tables, and stop")
    tune.add_argument(
        "--rows",
        type=positive,
        nargs="+",
        default=[8192, 1],
        metavar="M",
        help="with --model: rows (batch x tokens) of a call of a linear layer or an embedding; "
        "default 8192 1",
    )
    tune.add_argument(
        "--rank", type=positive, nargs="+", default=[16], metavar="r",
        help="with --model: rank of the adapters; default 16",
    )  # fmt: skip
    _add_tune_options(tune)


def _add_tune_options(tune: argparse.ArgumentParser) -> None:
    tune.add_argument(
        "--dropout",
        action="store_true",
        help="measure calls of linear layers with dropout as well as without",
    )
    tune.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="default bfloat16",
    )
    tune.add_argument(
        "--minutes", type=more_than_zero, default=5.0, help="time after which it stops; default 5"
    )
    tune.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="how many compile side by side before anything is measured; one for each core, up to "
        "16, by default",
    )
    tune.add_argument(
        "--device", type=not_empty, default="cuda", help="cuda, cuda:1 ...; default cuda"
    )
    tune.add_argument(
        "--out",
        type=path,
        metavar="FILE",
        help="write the table there, in the form of those that ship with the package, and not "
        "into your cache folder",
    )


def _seed(text: str) -> int:
    value = number(int, text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 2^63, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
