"""A row of results, as the benchmarks write them."""

from typing import Any


def row(name: str, **columns: Any) -> dict[str, Any]:
    shown = {"layer": "Linear", "shape": name, "M": 512, "K": 64, "N": 48, "r": 16, "dropout": 0.0}
    shown |= {"dtype": "float32", "pass": "fwd+bwd", "mode": "eager"}
    ours = {"us": 2000.0, "us_low": 1900.0, "us_high": 2100.0, "ratio": [1.0, 1.0, 1.0]}
    ours |= {
        "efficiency": 0.91,
        "saved_bytes": 2**20,
        "peak_bytes": 2**21,
        "error": 0.4,
        "GB/s": 3.0,
    }
    peers = {
        "frozen": {"us": 1800.0, "ratio": [0.9, 0.88, 0.93]},
        "loralib": {"us": 2500.0, "ratio": [1.25, 1.2, 1.31], "saved_bytes": 2**22},
        "peft": {"failed": "out of memory"},
        "lora-first": {"absent": "written without dropout"},
        "lora_fast": ours,
        "lora_fast:split": {"us": 2200.0, "ratio": [1.1, 1.0, 1.2]},
    }
    return {"id": name, "columns": shown | columns, "peers": peers, "ideal_us": 1820.0}


CEILINGS = {"float32 TFLOP/s": 1.5, "copy GB/s": 20.0, "missing": {"lorafusion": "no checkout"}}
