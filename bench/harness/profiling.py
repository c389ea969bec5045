"""A profile of one peer in one row: a trace for a browser, and its kernels by time."""

import re
from pathlib import Path
from typing import Any

import torch

from harness.contest import Absent, Lab, Row, explain
from harness.results import markdown, write_text

CALLS = 5


def profile(row: Row, lab: Lab, peer: str, folder: Path) -> dict[str, Any]:
    """Write `profile-ROW-PEER.json`, a Chrome trace, and `.md`, a table; return where they are."""
    try:
        contestant = row.build(peer, lab)
    except Absent as reason:
        return {"absent": str(reason)}
    except Exception as error:
        return {"failed": explain(error)}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if lab.clock.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with contestant.around():
        contestant.steps[0]()
        with torch.profiler.profile(activities=activities, acc_events=True) as found:
            for i in range(CALLS):
                contestant.steps[i % len(contestant.steps)]()
            if lab.clock.is_cuda:
                torch.cuda.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.+-]", "_", f"profile-{row.id}-{peer}")
    found.export_chrome_trace(str(folder / f"{name}.json"))
    table = markdown(_kernels(found, lab.clock.is_cuda))
    write_text(folder / f"{name}.md", f"{row.id}, {peer}: {CALLS} calls\n\n{table}\n")
    return {"profile": str(folder / f"{name}.md")}


def _kernels(found: torch.profiler.profile, on_gpu: bool) -> list[dict[str, Any]]:
    times = {}
    for event in found.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0:
            times[event.key] = (own / CALLS, event.count / CALLS)
    total = sum(own for own, _ in times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1][0])
    return [
        {"kernel": key[:80], "us a call": own, "calls": n, "share": own / total}
        for key, (own, n) in ordered[:30]
    ]
