"""What is measured, and one line for what is unknown."""

import pytest
import torch

from harness import selection
from harness.shapes import SHAPE_SETS, find_shapes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": "llama-3-9b"}, "unknown shape set 'llama-3-9b'; known are square, gpt2-medium"),
        ({"peers": "loralib,unsloth"}, "unknown peer 'unsloth'; known are frozen, loralib"),
        ({"dtypes": "int8"}, "unknown dtype 'int8'; known are float32"),
        ({"tokens": "8,0"}, "--tokens takes whole numbers from 1 on with commas, got '0'"),
        ({"tokens": "²"}, "--tokens takes whole numbers"),  # a digit, but no number
        ({"ranks": "four"}, "--ranks takes whole numbers"),
    ],
)
def test_unknown_names_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        selection.parse("quick", CPU, known_peers=("frozen", "loralib"), **options)
    assert "\n" not in str(caught.value)


def test_each_size_once():
    every = find_shapes(SHAPE_SETS)
    sizes = [(shape.K, shape.N, shape.bias) for shape in every]
    assert len(set(sizes)) == len(sizes)
    assert {(8192, 8192, False), (28672, 8192, False), (4096, 14336, False)} <= set(sizes)
    assert find_shapes(["llama-3-8b.kv"])[0].N == 1024


def rows(level: str, device: torch.device, **options: str) -> list:
    import bench_layers
    import bench_linear
    import bench_merge
    import bench_models

    chosen = selection.parse(level, device, **options)
    modules = (bench_linear, bench_layers, bench_merge, bench_models)
    return [row for module in modules for row in module.rows(chosen)]


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_rows_are_distinct_and_levels_grow(device):
    sizes = []
    for level in ("toy", "quick", "standard", "full"):
        names = [(row.table, row.id) for row in rows(level, device)]
        assert len(set(names)) == len(names)
        sizes.append(len(names))
    assert sizes[1] < sizes[2] < sizes[3]


def test_a_cpu_that_multiplies_16_bits_in_loops_measures_fewer_rows_of_them(monkeypatch):
    def most() -> dict[torch.dtype, int]:
        found = [row for row in rows("standard", CPU) if row.table in ("linear", "layers")]
        found = [row for row in found if not row.columns()["layer"].startswith("Conv")]
        dtypes = {row.dtype for row in found}
        return {dtype: max(row.tokens for row in found if row.dtype is dtype) for dtype in dtypes}

    def trained() -> set[torch.dtype]:
        return {row.dtype for row in rows("standard", CPU) if row.table == "models"}

    for module in ("harness.selection", "bench_models"):
        monkeypatch.setattr(f"{module}.slow_dtypes", frozenset)
    assert most() == {torch.float32: 512, torch.bfloat16: 512}
    assert trained() == {torch.bfloat16}
    for module in ("harness.selection", "bench_models"):
        monkeypatch.setattr(f"{module}.slow_dtypes", lambda: frozenset((torch.bfloat16,)))
    assert most() == {torch.float32: 512, torch.bfloat16: 32}
    assert trained() == {torch.float32}
    on_gpu = rows("standard", CUDA)
    assert max(row.tokens for row in on_gpu if row.table == "linear") == 8192
    assert {row.dtype for row in on_gpu if row.table == "models"} == {torch.bfloat16}


def test_the_full_gpu_selection_is_the_whole_list():
    found = [row for row in rows("full", CUDA) if row.table == "linear"]
    assert {row.tokens for row in found} == {1, 16, 512, 2048, 8192}
    assert {row.r for row in found} == {4, 8, 16, 64, 128}
    assert {row.p for row in found} == {0.0, 0.1}
    assert {row.graph for row in found} == {row.backward for row in found} == {False, True}
    assert {row.dtype for row in found} == {torch.bfloat16, torch.float16, torch.float32}


def test_options_narrow_and_replace():
    found = rows("quick", CPU, shapes="gpt2-medium.c_fc", tokens="7", ranks="2,3")
    assert {(row.shape.name, row.tokens, row.r) for row in found} == {
        ("gpt2-medium.c_fc", 7, 2),
        ("gpt2-medium.c_fc", 7, 3),
    }


def test_a_selection_without_rows_tells_which_values_there_are():
    import bench_gemm
    import bench_merge

    chosen = selection.parse("quick", CPU, dtypes="float16", ranks="7")
    line = selection.nothing_fits(
        chosen, {"--ranks": "7", "--dtypes": "float16"}, [bench_merge.rows, bench_gemm.rows]
    )
    assert line == (
        "no row of level quick on cpu fits --ranks 7 --dtypes float16; "
        "without that there are ranks 16; dtypes float32"
    )
    line = selection.nothing_fits(selection.parse("full", CPU), {}, [bench_gemm.rows])
    assert line == "no row of level full on cpu in the tables that were asked for"
