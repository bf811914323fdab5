"""Kernels compiled ahead of time: the eager ones' numbers, built once, and a fall back that says so."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heads import SGD, Adam, Margin, RowwiseAdagrad, ShardedMarginHead, ahead, kernels
from heads.ahead import AheadKernel, Library


def test_where_nothing_can_be_built_it_says_so_once_and_runs_eagerly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(ahead, "_CHILD", "raise SystemExit('no compiler here')")
    library = Library(tmp_path)
    total = AheadKernel(library, kernels.sum_exp, "KB", "K", "K")
    norms = AheadKernel(library, kernels.inverse_norms, "KD")
    z, ones = torch.zeros(3, 2), torch.ones(3)
    assert torch.equal(total(z, ones, 0 * ones), torch.full((2,), 3.0))
    assert torch.equal(norms(torch.eye(3), torch.float32), ones)
    said = [str(w.message) for w in recwarn]
    assert len(said) == 1 and "no compiler here" in said[0] and "eagerly" in said[0]
    assert not list(tmp_path.glob("*.pt2"))


def test_a_head_without_a_cache_folder_runs_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiling doesn't work here.*eagerly"):
        head = ShardedMarginHead(9, 4, optimizer=SGD(0.1), compiled=True)
    head(torch.randn(3, 4), torch.tensor([0, 8, -1])).backward()
    assert head.step == 1


def test_what_the_machine_code_depends_on_gives_another_digest() -> None:
    f, b = torch.float32, torch.bfloat16
    base: dict[str, Any] = {
        "function": kernels.inverse_norms,
        "constants": (None, f),
        "dtypes": (f,),
        "shapes": ("KD",),
        "dim": 8,
        "device": "cpu",
        "threads": 1,
    }
    others = [
        {"dtypes": (b,)},
        {"dim": 16},
        {"threads": 2},
        {"device": "cuda:0", "processor": "A100"},
        {"device": "cuda:0", "processor": "H100"},
        {"constants": (None, b)},
        {"function": kernels.sum_exp},
        {"constants": (SGD(0.1), None)},
        {"constants": (SGD(0.1, 0.9), None)},
    ]
    digests = [ahead.Signature(**(base | other)).digest() for other in [{}, {}, *others]]
    assert digests[0] == digests[1] and len(set(digests)) == len(others) + 1
    second = ahead.Signature(**(base | {"device": "cuda:1", "processor": "H100"})).digest()
    assert second == digests[2 + others.index({"device": "cuda:0", "processor": "H100"})]


def test_gpus_of_different_machine_code_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [SimpleNamespace(name=n, major=m, minor=0) for n, m in (("H100", 9), ("A100", 8), ("H100", 9))]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: kinds[device.index])
    first, second, third = (ahead.processor(torch.device("cuda", number)) for number in range(3))
    assert first == third != second and "compute capability 9.0" in first
    assert ahead.processor(torch.device("cpu")) == ""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("kernels"))


def test_a_built_kernel_takes_any_number_of_classes_and_samples_and_is_built_once(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel() -> AheadKernel:
        return AheadKernel(library, kernels.softmax_gradient_, "KB", "K", "K", "B", "B")

    first = kernel()
    for rows, samples in [(1, 1), (5, 1), (1, 7), (33, 65), (4, 0)]:
        torch.manual_seed(rows)
        z, row, column = torch.randn(rows, samples), torch.rand(3, rows), torch.rand(2, samples)
        expected = z.clone()
        q = kernels.softmax_gradient_(expected, row[0], row[1], *column)
        torch.testing.assert_close(first(z, row[0], row[1], *column), q)
        torch.testing.assert_close(z, expected)
    assert not library.broken and len(list(library.folder.glob("*.pt2"))) == 1
    monkeypatch.setattr(ahead, "_CHILD", "raise SystemExit('built already')")
    kernel()(torch.zeros(2, 2), torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(2))
    assert not library.broken


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("rule", [SGD(0.1, 0.9, 1e-3), RowwiseAdagrad(0.1), Adam(0.01)])
@pytest.mark.parametrize("scale", [16.0, 90.0])  # with and without a shift
def test_a_compiled_head_learns_what_the_eager_one_does(storage: str, rule: Any, scale: float) -> None:
    def make(compiled: bool) -> ShardedMarginHead:
        return ShardedMarginHead(
            29, 5, Margin(1.0, 0.3, 0.0), scale, storage=storage, optimizer=rule, tile=8, compiled=compiled
        )

    eager, compiled = make(False), make(True)
    tolerance = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2}[storage]
    for step in range(4):
        torch.manual_seed(step)
        x, y = 4 * torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 29, (8,))
        losses = [head(x.clone().requires_grad_(), y) for head in (eager, compiled)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
    assert isinstance(compiled.shard.kernels.sum_exp, AheadKernel)
    assert not compiled.shard.kernels.sum_exp.library.broken
    kept = [head.full_centers().double() for head in (eager, compiled)]
    torch.testing.assert_close(kept[1], kept[0], rtol=tolerance, atol=tolerance * 0.01)
