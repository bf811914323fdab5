"""The pieces of a training run by themselves: schedule, plan, step, curves, options, global batch norm."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import heads
from bigvision.jobs.faces import plan
from bigvision.jobs.faces.agreement import FaceJobError, World
from bigvision.jobs.faces.centres import open_centres
from bigvision.jobs.faces.curves import Curves, Point
from bigvision.jobs.faces.launch import command, launch
from bigvision.jobs.faces.options import TrainOptions, parse
from bigvision.jobs.faces.plan import available_memory, backbone_memory, make_plan, size_text
from bigvision.jobs.faces.schedule import Schedule
from bigvision.jobs.faces.step import DivergedError, Stepper
from bigvision.models.global_norm import GlobalBatchNorm, with_global_norms
from datasets.face_batches import Batch

OPTIONS = TrainOptions(data="synthetic:10", out=Path("run"))


@given(st.sampled_from(["polynomial", "cosine", "constant"]), st.integers(2, 60), st.integers(0, 20))
def test_a_schedule_warms_up_and_falls(shape: str, total: int, warmup: int) -> None:
    warmup = min(warmup, total - 1)
    rates = [Schedule(0.3, total, warmup, shape)(step) for step in range(total)]
    assert rates[:warmup] == pytest.approx([0.3 * (step + 1) / warmup for step in range(warmup)])
    assert rates[warmup] == pytest.approx(0.3)
    falling = rates[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(falling))
    assert min(rates) >= 0


def test_schedules_by_hand() -> None:
    assert Schedule(1.0, 4)(2) == pytest.approx(0.25)
    assert Schedule(1.0, 4, shape="cosine")(2) == pytest.approx(0.5)
    assert Schedule(1.0, 4, power=1)(3) == pytest.approx(0.25)
    for wrong in ({"peak": 0.0}, {"total": 0}, {"warmup": 4}, {"shape": "step"}):
        with pytest.raises(ValueError, match=r"cannot be|not one of"):
            Schedule(**({"peak": 1.0, "total": 4} | wrong))  # type: ignore[arg-type]


def test_options_come_from_a_command_line() -> None:
    words = "--data folder:a --out run --batch-size 64 --evaluate bin:a bin:b --margin 1,0,0.4 --plan"
    found = parse(words.split())
    assert (found.batch_size, found.evaluate, found.plan) == (64, ("bin:a", "bin:b"), True)
    assert found.head_margin() == heads.Margin(1.0, 0.0, 0.4)
    assert found.dim == 512
    assert parse(["--data", "a", "--out", "b"]).gate() is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"margin": "1,2"}, "margin '1,2' is not m1,m2,m3"),
        ({"active": "some"}, "active 'some' is not all, sampled"),
        ({"active": "sampled:2"}, "sample rate"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of float32"),
        ({"head_optimizer": "lion"}, "'lion' is not one of sgd"),
        ({"batch_size": 0, "lr": -1.0}, "out of range: batch_size = 0, lr = -1.0"),
        ({"batch_norm": "some"}, "batch_norm 'some'"),
        ({"memory": "much"}, "'much' is not a size"),
        ({"seed": -1}, "out of range: seed = -1"),
        ({"seed": 2**63}, "out of range: seed = 9223372036854775808"),
    ],
)
def test_options_that_cannot_be_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **changed)


def test_a_plan_counts_the_head() -> None:
    options = replace(
        OPTIONS, storage="bfloat16", batch_size=256, memory="24GiB", backbone="mobilefacenet", image_size=16
    )
    made = make_plan(options, 10_000_000, 100_000_000, 2, 2)
    assert made.head == 5_000_000 * 512 * 2
    assert made.head_optimizer > made.head  # momentum, and the rows' norms
    with pytest.raises(
        ValueError, match=r"2 ranks here need about .* GiB and 14\.00 GiB are available: lower"
    ):
        make_plan(replace(options, memory="14GiB"), 10_000_000, 100_000_000, 2, 2).check()
    mapped = make_plan(replace(options, place="/scratch"), 10_000_000, 100_000_000, 2, 2)
    assert mapped.head == 0
    assert mapped.on_disk == 2 * made.head
    listed = make_plan(options, 10_000_000, 100_000_000, 2, 2, (3 << 30, 1 << 20))
    assert listed.listing == (3 << 30) + 2 * (1 + options.workers) * (1 << 20)
    with pytest.raises(ValueError, match="2 ranks here need about"):
        room = replace(options, memory=f"{2 * made.total + (2 << 30)}")
        make_plan(room, 10_000_000, 100_000_000, 2, 2).check()
        make_plan(room, 10_000_000, 100_000_000, 2, 2, (3 << 30, 0)).check()
    lean = make_plan(replace(options, head_optimizer="adagrad"), 10_000_000, 100_000_000, 2, 2)
    lean.check()
    assert "5,000" not in "".join(lean.lines())
    assert lean.steps_per_epoch == 100_000_000 // 256


def test_a_plan_of_a_gpu_counts_host_memory_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host rows, processes that decode and Python itself take none of the GPU's memory."""
    free = {"cpu": 64 << 30, "cuda:0": 16 << 30, "cuda:1": 16 << 30}
    monkeypatch.setattr(plan, "free_memory", lambda device="cpu": free[str(device)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = replace(
        OPTIONS, device="cuda", storage="bfloat16", backbone="mobilefacenet", image_size=16, workers=9
    )
    large = make_plan(options, 20_000_000, 100_000_000, 2, 2)
    with pytest.raises(ValueError, match=r"need about .* of the GPU's memory and 32\.00 GiB .*--place host"):
        large.check()
    hosted = make_plan(replace(options, place="host"), 20_000_000, 100_000_000, 2, 2)
    hosted.check()
    assert hosted.on_device < 2 << 30 and hosted.on_host > 20 << 30
    text = "\n".join(hosted.lines())
    assert "GPU memory of each of 2 ranks here, of 32.00 GiB for all:" in text
    assert "host memory of each of 2 ranks here, of 64.00 GiB for all:" in text
    assert text.index("activations") < text.index("host memory") < text.index("processes that decode")
    free["cpu"] = 20 << 30
    with pytest.raises(ValueError, match="of host memory and"):
        make_plan(replace(options, place="host"), 20_000_000, 100_000_000, 2, 2).check()
    on_cpu = make_plan(replace(options, place="host", device="cpu"), 1_000_000, 10_000_000, 2, 2)
    assert on_cpu.available == 20 << 30 and on_cpu.total > 10**6 * 512 * 2  # one memory for all


def test_a_plan_measures_what_autograd_keeps() -> None:
    options = replace(OPTIONS, backbone="mobilefacenet", image_size=16)
    parameters, one = backbone_memory(options, 4)
    _, two = backbone_memory(options, 8)
    assert parameters == pytest.approx(3 * 4 * 2.05e6, rel=0.05)
    assert two == pytest.approx(2 * one, rel=0.05)
    half = replace(options, dtype="bfloat16")  # with copies of the weights, whatever the batch
    assert backbone_memory(half, 8)[1] - backbone_memory(half, 4)[1] < 0.9 * (two - one)


def test_runs_without_a_task_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two identities; the data has 1"):
        make_plan(OPTIONS, 1, 10, 1, 1)
    with pytest.raises(ValueError, match="2 classes cannot be shared by 3 ranks"):
        make_plan(OPTIONS, 2, 10, 3, 3)


def test_memory_is_what_was_asked_for() -> None:
    assert available_memory(replace(OPTIONS, memory="14GiB")) == 14 << 30
    assert available_memory(replace(OPTIONS, memory="14GB")) == 14 * 10**9  # as everywhere else
    assert available_memory(OPTIONS) > 1 << 20


def test_sizes_as_text() -> None:
    assert [size_text(count) for count in (3, 4096, 5 << 20, 14 << 30)] == [
        "3 B",
        "4 KiB",
        "5 MiB",
        "14.00 GiB",
    ]


def test_centres_come_from_a_file(tmp_path: Path) -> None:
    wanted = torch.randn(5, 8, dtype=torch.float64)
    path = tmp_path / "centres.safetensors"
    save_file({"weight": wanted}, path)
    made = [
        heads.ShardedMarginHead(5, 8, optimizer=heads.SGD(lr=0.1), storage="float64", tile=tile, seed=tile)
        for tile in (2, 4096)
    ]
    for head in made:
        head.set_centers(open_centres(path))
        assert torch.equal(head.full_centers(), wanted)
    x, y = torch.randn(4, 8, dtype=torch.float64), torch.arange(4)
    torch.testing.assert_close(made[0](x, y), made[1](x, y), rtol=1e-12, atol=0)
    other = heads.ShardedMarginHead(6, 8, optimizer=heads.SGD(lr=0.1))
    with pytest.raises(ValueError, match=r"centres must be \(6, 8\), got \(5, 8\)"):
        other.set_centers(open_centres(path))
    save_file({"other": wanted}, tmp_path / "other.safetensors")
    for name in ("absent.safetensors", "other.safetensors"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            open_centres(tmp_path / name)


@pytest.mark.parametrize(
    ("active", "place", "gate"),
    [
        ("all", "device", None),
        ("sampled:0.1", "device", heads.sampled(0.1)),
        ("sampled:0.1:unbiased", "host", heads.sampled(0.1, unbiased=True)),
        ("sampled:0.1", "/scratch", heads.sampled(0.1, run=64)),  # a disk reads runs
        ("sampled:0.1:unbiased:run=8", "/scratch", heads.sampled(0.1, unbiased=True, run=8)),
        ("clustered:20:2:epsilon=0.1", "device", heads.clustered(20, 2, epsilon=0.1)),
        ("hashed:4:6", "device", heads.hashed(4, 6)),
    ],
)
def test_gates_by_name(active: str, place: str, gate: object) -> None:
    assert replace(OPTIONS, active=active, place=place).gate() == gate


class Tiny(nn.Module):
    """A backbone without batch norm: parts of a batch don't influence each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 16, 8)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.dropout(x.flatten(1)))
        return y


def stepper(backbone: nn.Module, accumulate: int = 1, enabled: bool = False) -> Stepper:
    head = heads.ShardedMarginHead(5, 8, heads.Margin(1.0, 0.2, 0.0), 8.0, optimizer=heads.SGD(lr=0.5))
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    return Stepper(
        backbone, head, optimizer, torch.device("cpu"), torch.float32, accumulate, 0.0, scaler, World(), bool
    )


def batches(count: int = 7) -> Iterator[Batch]:
    random = torch.Generator().manual_seed(3)
    while True:
        images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=random)
        yield Batch(images, torch.randint(0, 5, (count,), generator=random), (), tuple(range(count)))


def test_parts_of_a_batch_give_the_step_of_the_whole() -> None:
    whole, parts = Tiny(), Tiny()
    whole.dropout.p = parts.dropout.p = 0.0
    first, second = stepper(whole), stepper(parts, accumulate=3)
    for a, b in zip(
        [first(batches(), 0) for _ in range(3)], [second(batches(), 0) for _ in range(3)], strict=True
    ):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
    torch.testing.assert_close(whole.linear.weight, parts.linear.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.head.full_centers(), second.head.full_centers(), rtol=1e-4, atol=1e-6)  # type: ignore[operator]


def test_a_part_meets_the_same_dropout_twice() -> None:
    masks: list[Tensor] = []

    class Watching(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            masks.append(self.dropout(torch.ones_like(x)) > 0)
            return super().forward(x)

    stepper(Watching(), accumulate=2)(batches(), 11)
    assert len(masks) == 4
    assert all(torch.equal(masks[i], masks[i + 2]) for i in range(2))
    assert not torch.equal(masks[0], masks[1][: len(masks[0])])


def test_parts_of_neighbouring_seeds_meet_other_dropout() -> None:
    masks: list[bytes] = []

    class Watching(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            masks.append((self.dropout(torch.ones_like(x)[:3]) > 0).numpy().tobytes())
            return super().forward(x)

    for seed in (11, 12):
        stepper(Watching(), accumulate=2)(batches(8), seed)
    assert len(masks) == 8 and len(set(masks)) == 4


def test_the_loss_scaler_does_not_reach_the_head() -> None:
    plain, scaled = stepper(Tiny()), stepper(Tiny(), enabled=True)
    for _ in range(3):
        a, b = plain(batches(), 0), scaled(batches(), 0)
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
    torch.testing.assert_close(plain.head.full_centers(), scaled.head.full_centers())  # type: ignore[operator]


def test_features_that_are_not_finite_stop_before_anything_moves() -> None:
    model = Tiny()
    step = stepper(model)
    with torch.no_grad():
        model.linear.bias[0] = torch.nan
    before = step.head.full_centers()  # type: ignore[operator]
    with pytest.raises(FaceJobError, match="features of the backbone are not finite"):
        step(batches(), 0)
    assert torch.equal(step.head.full_centers(), before)  # type: ignore[operator]


def test_a_gradient_that_is_not_finite_stops() -> None:
    class Exploding(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + torch.sqrt(torch.zeros_like(y) * self.linear.weight.sum())

    with pytest.raises(DivergedError, match="gradient has the norm"):
        stepper(Exploding())(batches(), 0)


def test_statistics_move_once_for_each_part() -> None:
    def trained(accumulate: int) -> nn.Sequential:
        model = nn.Sequential(Tiny(), nn.BatchNorm1d(8))
        stepper(model, accumulate)(batches(8), 0)
        return model

    for accumulate, count in ((1, 1), (2, 2)):
        norm = trained(accumulate)[1]
        assert isinstance(norm, nn.BatchNorm1d)
        assert int(norm.num_batches_tracked) == count  # type: ignore[arg-type]
        assert norm.momentum == 0.1


def test_curves_are_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    def point(step: int) -> Point:
        return Point(step, step / 4, 1.0 / step, 0.1, 2.0, 100.0, 500.0, 0)

    first = Curves(tmp_path, 0)
    for step in range(1, 6):
        first.add(point(step))
    first.close()
    second = Curves(tmp_path, 3)
    second.add(point(4))
    second.close()
    assert [row.step for row in Curves(tmp_path, 9).points] == [1, 2, 3, 4]
    assert Curves(tmp_path, 9).points[1] == point(2)
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_half_a_line_in_the_curve_is_passed_over(tmp_path: Path) -> None:
    whole = Curves(tmp_path, 0)
    whole.add(Point(1, 0.25, 1.0, 0.1, 2.0, 100.0, 500.0, 0))
    whole.close()
    for torn in ("2,0.5", "2,0.5,", "x"):
        with (tmp_path / "curve.csv").open("a") as file:
            file.write(torn)
        assert [row.step for row in Curves(tmp_path, 9).points] == [1]
        assert (tmp_path / "curve.csv").read_text().count("\n") == 2


def test_global_norms_are_batch_norms_on_one_rank() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4 * 36))
    x = torch.randn(5, 3, 8, 8)
    names = list(model.state_dict())
    expected = model(x)
    with_global_norms(model)
    assert isinstance(model[1], GlobalBatchNorm)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="batch norm of"):
        GlobalBatchNorm(3)(torch.randn(2, 3, 4))


def test_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    words = command(["--data", "a"], 2, 3, Path("meeting"))
    assert " ".join(words[1:]).startswith("-m bigvision.jobs.faces.ranks --rdzv-backend c10d")
    assert "--nproc-per-node 2 --max-restarts 3" in " ".join(words)
    assert words[-4:] == ["-m", "bigvision.jobs.train_face", "--data", "a"]
    assert launch(["--help"], ranks=1, max_restarts=0) == 0
    assert "--batch-norm" in capsys.readouterr().out
    with pytest.raises(ValueError, match="0 ranks"):
        launch([], ranks=0, max_restarts=0)
    with pytest.raises(ValueError, match="dtype 'int8'"):
        launch(["--data", "a", "--out", "b", "--dtype", "int8"], ranks=1, max_restarts=0)


def test_a_lone_rank_speaks_for_itself() -> None:
    world = World()
    assert (world.leads, world.gather(3), world.sum(2.0)) == (True, [3], 2.0)
    with pytest.raises(FaceJobError, match=r"^reading: no file$"), world.together("reading"):
        raise OSError("no file")
    assert np.isfinite(world.sum(1.0))
