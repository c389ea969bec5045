"""The demo's results: a table, metrics.json and a picture of the loss curves."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_fast.demo.training import Run
from lora_fast.files import written_whole


@dataclass
class Row:
    """A line of the table: what, both libraries' values, and whether it is as it should be."""

    what: str
    loralib: str
    lora_fast: str
    verdict: str = ""
    passed: bool = True


@dataclass
class Report:
    """What the demo found out, as far as it got."""

    title: str
    facts: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    def add(
        self, what: str, values: Iterable[str], verdict: str = "", *, passed: bool = True
    ) -> None:
        """Append a line; `values` are loralib's and ours."""
        theirs, ours = values
        self.rows.append(Row(what, theirs, ours, verdict, passed))

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(row.passed for row in self.rows)

    def table(self) -> str:
        """Return the results as aligned text."""
        lines = [["", "loralib", "lora_fast", ""]]
        for row in self.rows:
            verdict = row.verdict if row.passed else f"FAILED: {row.verdict}"
            lines.append([row.what, row.loralib, row.lora_fast, verdict])
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        text = [self.title, ""]
        for what, theirs, ours, verdict in lines:
            cells = (what.ljust(widths[0]), theirs.rjust(widths[1]), ours.rjust(widths[2]), verdict)
            text.append("  ".join(cells).rstrip())
        if self.interrupted:
            text += ["", "Interrupted: this is what was done until then."]
        return "\n".join(text)

    def write_metrics(self, path: Path) -> None:
        """Write everything as JSON."""
        with written_whole(path) as part:
            part.write_text(json.dumps(self._metrics(), indent=2))

    def _metrics(self) -> dict[str, Any]:
        runs = {
            run.name: {
                "loss": run.losses,
                "step_seconds": run.seconds,
                "median_step_seconds": run.step_seconds(),
                "step_memory_bytes": run.memory,
                "valid_loss_before": run.valid_before,
                "valid_loss_after": run.valid_after,
                "trainable_parameters": sum(p.numel() for p in run.trainable()),
            }
            for run in self.runs
        }
        return {
            "title": self.title,
            "interrupted": self.interrupted,
            "passed": self.passed if self.rows else None,  # nothing was compared
            **self.facts,
            "runs": runs,
            "table": [vars(row) for row in self.rows],
        }

    def write_picture(self, path: Path) -> None:
        """Draw the loss curves as PNG."""
        import matplotlib  # type: ignore[import-not-found, unused-ignore]

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        # Equal curves hide one another: the first is drawn wide, the second thin over it.
        for run, width in zip(self.runs, (4.0, 1.2), strict=False):
            axes.plot(range(1, len(run.losses) + 1), run.losses, label=run.name, linewidth=width)
        axes.set_xlabel("fine-tuning step")
        axes.set_ylabel("training loss (nats per token)")
        # A path in it may hold bytes that are no text, and dollars that are no formula.
        title = self.title.encode(errors="backslashreplace").decode()
        axes.set_title(title, fontsize="medium", parse_math=False)
        axes.legend()
        with written_whole(path) as part:
            figure.savefig(part, format="png", dpi=120)
        plt.close(figure)
