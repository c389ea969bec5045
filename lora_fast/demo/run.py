"""The demo from its arguments to its exit status."""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

import lora_fast
from lora_fast import backend, decisions
from lora_fast.commands import BadInputError, device_named, first_line, writable_folder
from lora_fast.demo import causal_lm, compare, gpt, text
from lora_fast.demo.report import Report
from lora_fast.demo.training import Run, fine_tune, pretrain

BATCH = 8
CYCLES = 100
# Two orders of the same sums: what a hundred steps may make of fp32's rounding.
SAME_LOSS = 0.02
# With masks of their own the runs differ as two seeds of dropout do, in parts of the first loss:
# 0.003 with p = 0.1, 0.007 with p = 0.5 (this demo on a Xeon of family 6 model 207, 2026-11-29).
DROPOUT_NOISE = 0.03


@dataclass(frozen=True)
class Task:
    """What is fine-tuned, and on what."""

    title: str
    corpus: text.Corpus
    context: int
    base: Callable[[], nn.Module]
    adapt: Callable[[ModuleType, nn.Module], nn.Module]


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; see `lora_fast.cli.main` for the exit status.

    Raises:
        BadInputError: an argument cannot be used. Nothing was written.
    """
    loralib = _required("loralib")
    _required("matplotlib")
    device = device_named(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_backend(device)
    task = _causal_lm(arguments, device) if arguments.model else _small_gpt(arguments, device)
    report = Report(task.title, _facts(arguments, device))
    writable_folder(arguments.out, "--out")
    try:
        _train(task, loralib, arguments, report)
        _compare(task, loralib, report)
    except KeyboardInterrupt:
        report.interrupted = True
        if not report.rows:
            _training_rows(report)
    try:
        files, problems = _written(report, loralib, arguments.out)
    finally:
        print("\n" + report.table() + "\n")
    print("written:", ", ".join(map(str, files)) or "nothing")
    if problems:
        raise BadInputError(f"--out: not all could be written: {'; '.join(problems)}")
    if report.interrupted:
        return 130
    return 0 if report.passed else 1


def _required(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInputError(f"{name} is missing: pip install 'lora_fast[demo]'") from error


def _check_backend(device: torch.device) -> None:
    try:
        call = next(decisions.representative_calls("lora_merged_linear", str(device)))
        backend.choose("lora_merged_linear", *call.tensors)
    except RuntimeError as error:
        raise BadInputError(f"LORA_FAST_BACKEND: {error}") from error


def _adapter(arguments: argparse.Namespace) -> gpt.Adapter:
    return gpt.Adapter(lora_dropout=arguments.dropout)


def _small_gpt(arguments: argparse.Namespace, device: torch.device) -> Task:
    size, adapter = gpt.Size(), _adapter(arguments)
    data = text.from_path(arguments.data) if arguments.data else text.code()
    corpus = text.corpus(text.byte_ids(data), size.context)

    def base() -> nn.Module:
        torch.manual_seed(arguments.seed)
        model = gpt.GPT(lora_fast, size, None).to(device)
        prose = text.corpus(text.byte_ids(text.prose()), size.context)
        steps = arguments.pretrain_steps
        pretrain(model, prose, size.context, BATCH, steps, arguments.seed)
        return model

    def adapt(library: ModuleType, base: nn.Module) -> nn.Module:
        assert isinstance(base, gpt.GPT)
        return gpt.adapted(library, base, size, adapter, arguments.seed).to(device)

    source = str(arguments.data) if arguments.data else "the standard library's code"
    title = f"Byte-level GPT ({size.layers} x {size.width}), adapters on q and v, tuned on {source}"
    return Task(title, corpus, size.context, base, adapt)


def _causal_lm(arguments: argparse.Namespace, device: torch.device) -> Task:
    adapter = _adapter(arguments)
    model = causal_lm.load(arguments.model).to(device)
    causal_lm.adapted(lora_fast, model, adapter, arguments.seed)  # fails before anything is done
    data = text.from_path(arguments.data) if arguments.data else text.code()
    ids = causal_lm.encode(arguments.model, data, model.model.config.vocab_size)
    context = min(128, getattr(model.model.config, "max_position_embeddings", 128))
    corpus = text.corpus(ids, context)

    def adapt(library: ModuleType, base: nn.Module) -> nn.Module:
        assert isinstance(base, causal_lm.CausalLM)
        return causal_lm.adapted(library, base, adapter, arguments.seed)

    return Task(f"{arguments.model}, adapters on q and v", corpus, context, lambda: model, adapt)


def _facts(arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lora_fast": lora_fast.__version__,
        "steps": arguments.steps,
        "dropout": arguments.dropout,
        "seed": arguments.seed,
    }


def _train(task: Task, loralib: ModuleType, arguments: argparse.Namespace, report: Report) -> None:
    base = task.base()
    for library in (loralib, lora_fast):
        run = Run(library.__name__, task.adapt(library, base))
        run.base = {k: v.clone() for k, v in compare.base_weights(run.model).items()}
        report.runs.append(run)
    fine_tune(
        report.runs, task.corpus, task.context, BATCH, arguments.steps, seed=arguments.seed + 1
    )


def _compare(task: Task, loralib: ModuleType, report: Report) -> None:
    _training_rows(report)
    theirs, ours = report.runs
    device = next(ours.model.parameters()).device
    ids = task.corpus.validation(2, task.context)[:, :-1].to(device)
    _merge_rows(report, ids)
    there = compare.exchanged_difference(ours.model, lora_fast, theirs.model, ids)
    back = compare.exchanged_difference(theirs.model, loralib, ours.model, ids)
    report.add(
        "adapter of the other: logits differ by",
        (f"{there:.1e}", f"{back:.1e}"),
        "saved by one, loaded by the other",
        passed=max(there, back) < 1e-3,
    )


def _training_rows(report: Report) -> None:
    if not all(run.losses for run in report.runs) or not report.runs:
        return
    theirs, ours = report.runs
    pairs = list(zip(theirs.losses, ours.losses, strict=False))
    largest = max(abs(a - b) for a, b in pairs)
    fused = ours.model.training and next(ours.model.parameters()).is_cuda
    own_mask = fused and report.facts["dropout"] > 0
    kind = "own dropout masks: equal within sampling noise" if own_mask else "same draws"
    allowed = DROPOUT_NOISE * theirs.losses[0] if own_mask else SAME_LOSS
    report.add("training loss, first step", (f"{run.losses[0]:.4f}" for run in report.runs))
    report.add(
        "training loss, last step",
        (f"{loss:.4f}" for loss in pairs[-1]),
        f"{kind}; largest difference of a step {largest:.1e}",
        passed=largest < allowed,
    )
    if ours.valid_after is not None:
        for what, values in (
            ("before", (theirs.valid_before, ours.valid_before)),
            ("after", (theirs.valid_after, ours.valid_after)),
        ):
            report.add(f"validation loss {what}", (f"{value:.4f}" for value in values))
    seconds = [run.step_seconds() or 0.0 for run in report.runs]
    ratio = seconds[0] / seconds[1]
    milliseconds = (f"{s * 1e3:.1f}" for s in seconds)
    report.add("step time (ms, median)", milliseconds, f"lora_fast is {ratio:.2f} times as fast")
    if ours.memory is not None:
        cuda = next(ours.model.parameters()).is_cuda
        what = "peak memory of a step (MiB)" if cuda else "activations saved by a step (MiB)"
        report.add(what, (f"{(run.memory or 0) / 2**20:.1f}" for run in report.runs))
    counts = [sum(p.numel() for p in run.trainable()) for run in report.runs]
    report.add("trainable parameters", (f"{n:,}" for n in counts), passed=counts[0] == counts[1])


def _merge_rows(report: Report, ids: torch.Tensor) -> None:
    differences = [compare.merged_difference(run.model, ids) for run in report.runs]
    report.add(
        "merged against unmerged logits",
        (f"{difference:.1e}" for difference, _ in differences),
        f"of {differences[1][1]:.1f}",
        passed=differences[1][0] < 1e-3 * max(1.0, differences[1][1]),
    )
    for dtype in (torch.float32, torch.bfloat16):
        drifts = [compare.drift(run.model, run.base, dtype, CYCLES) for run in report.runs]
        cells = ("0, exact" if d.changed == 0.0 else f"{d.largest:.1e}" for d in drifts)
        report.add(
            f"base weight lost, {CYCLES} cycles, {str(dtype).removeprefix('torch.')}",
            cells,
            f"loralib changed {drifts[0].changed:.0%} of the weights",
            passed=drifts[1].changed == 0.0,
        )


def _written(report: Report, loralib: ModuleType, out: Path) -> tuple[list[Path], list[str]]:
    """Write what there is room for, first what took the longest; return the files, and failures.

    What fails costs its own file alone.
    """
    files: list[Path] = []
    problems: list[str] = []

    def write(name: str, writer: Callable[..., None], *arguments: object) -> None:
        try:
            writer(*arguments, out / name)
        except Exception as error:  # torch's writer and matplotlib have errors of their own
            problems.append(f"{name}: {first_line(error)}")
        else:
            files.append(out / name)

    if report.runs and all(run.losses for run in report.runs):
        adapters = ("adapter-loralib.pt", "adapter.safetensors")
        for run, library, name in zip(report.runs, (loralib, lora_fast), adapters, strict=True):
            write(name, compare.save_adapter, run.model, library)
        if not problems:
            sizes = ((out / name).stat().st_size for name in adapters)
            report.add("adapter on disk (KiB)", (f"{size / 1024:.1f}" for size in sizes))
    write("metrics.json", report.write_metrics)
    if any(run.losses for run in report.runs):
        write("loss.png", report.write_picture)
    return files, problems
