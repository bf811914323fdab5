"""What a network's output is, is looked at: class maps, probabilities and NaN are not taken for logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process_networks import random_net
from process_scenes import random_pixels, read, write_scene
from torch import Tensor, nn

from bigvision.jobs.process import Options, process_scenes, run_scene
from bigvision.jobs.process.nature import Nature, nature_of

NETWORKS = Path(__file__).with_name("process_networks.py")
FILE = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, end, classes):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.end = nn.Conv2d(3, classes, 3, padding=1), end
        self.body.bias.data.fill_(-1.0 if classes == 1 else 0.0)

    def forward(self, x):
        return self.end(self.body(x / 50 - 2))


def net(end="y", classes=4):
    return Net(eval("lambda y: " + end, {"torch": torch, "F": F}), classes)
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    """The name of a network that ends in an expression of y [1, K, H, W], its logits."""
    (tmp_path / "net.py").write_text(FILE)

    def named(end: str = "y", classes: int = 4) -> str:
        from urllib.parse import quote

        return f"{tmp_path / 'net.py'}:net?classes={classes}&end={quote(end)}"

    return named


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = random_pixels((3, 70, 53), 8)
    pixels[:, 20:30, 5:25] = 0
    return write_scene(tmp_path / "scene.tif", pixels, nodata=0)


def run(scene: Path, model: str, **more: Any) -> tuple[np.ndarray, str]:
    """The result, and what is warned of."""
    target = scene.with_name(f"out-{abs(hash((model, *more.items())))}.tif")
    outcome = run_scene((str(scene),), target, Options(model, **({"dtype": "float32"} | more)))
    return read(target), outcome.warning


ENGINES = [{"engine": "stream"}, {"engine": "tiles", "tile": 24}]

CLASS_MAPS = {
    "argmax [B, 1, H, W]": "y.argmax(1, keepdim=True)",
    "argmax [B, H, W]": "y.argmax(1)",
    "uint8": "y.argmax(1, keepdim=True).to(torch.uint8)",
    "whole floats": "y.argmax(1, keepdim=True).float()",
}


@pytest.mark.parametrize(
    ("engine", "end"),
    [(ENGINES[0], end) for end in CLASS_MAPS.values()] + [(ENGINES[1], CLASS_MAPS["argmax [B, H, W]"])],
)
def test_a_class_map_is_written_as_it_is(scene: Path, make: Any, end: str, engine: dict[str, Any]) -> None:
    expected, nothing = run(scene, make(), **engine)
    found, told = run(scene, make(end), **engine)
    assert nothing == "" and "gives a class map, which is written as it is" in told
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8 and len(np.unique(found)) == 5


@pytest.mark.parametrize("end", ["y[:, :1] > 0", "(y[:, 0] > 0).long()", "(y[:, :1] > 0).float()"])
def test_a_binary_map_is_one_too(scene: Path, make: Any, end: str) -> None:
    expected, _ = run(scene, make("y[:, :1]"))
    found, _ = run(scene, make(end))
    np.testing.assert_array_equal(found, expected)


def test_logits_of_one_channel_may_lack_its_axis(scene: Path, make: Any) -> None:
    np.testing.assert_array_equal(run(scene, make("y[:, 0]"))[0], run(scene, make("y[:, :1]"))[0])


@pytest.mark.parametrize(
    ("end", "classes", "output", "engine"),
    [
        ("y.sigmoid()", 1, "classes", ENGINES[0]),
        ("y.sigmoid()", 1, "probabilities", ENGINES[1]),
        ("y.softmax(1)", 4, "classes", ENGINES[1]),
        ("y.softmax(1)", 4, "probabilities", ENGINES[0]),
    ],
)
def test_probabilities_are_not_squashed_twice(
    scene: Path, make: Any, end: str, classes: int, output: str, engine: dict[str, Any]
) -> None:
    expected, _ = run(scene, make(classes=classes), output=output, **engine)
    found, told = run(scene, make(end, classes), output=output, **engine)
    kind = "sigmoid" if classes == 1 else "softmax"
    assert f"gives probabilities, as from a {kind}, and none is applied again" in told
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Said by the user, it is settled, either way.
    settled, quiet = run(scene, make(end, classes), output=output, activation="none", **engine)
    np.testing.assert_array_equal(settled, found)
    assert quiet == ""
    squashed, quiet = run(scene, make(end, classes), output=output, activation=kind, **engine)
    assert quiet == "" and ((output == "classes" and classes == 4) or (squashed != found).any())


def test_probabilities_of_several_labels_stay_what_they_are(scene: Path, make: Any) -> None:
    found, told = run(scene, make("y.sigmoid()"), output="probabilities")
    expected, _ = run(scene, make("y"), output="probabilities", activation="sigmoid")
    assert "as from a sigmoid" in told
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("end", "classes", "more", "message"),
    [
        (
            "y.softmax(1)",
            4,
            {"output": "logits"},
            r"--output logits: the network gives probabilities, as from a soft",
        ),
        ("y.argmax(1)", 4, {"output": "logits"}, r"--output logits: the network gives a class map"),
        (
            "y.argmax(1)",
            4,
            {"output": "probabilities"},
            r"--output probabilities: the network gives a class map",
        ),
        ("y.argmax(1)", 4, {"activation": "softmax"}, r"--activation softmax: the network gives a class map"),
        ("y", 1, {"activation": "softmax"}, r"--activation softmax of one channel is 1 everywhere"),
        ("y.long()", 4, {}, r"its output is 4 channels of torch.int64: a class map has one"),
        ("y * float('nan')", 4, {}, r"every pixel of its output is NaN or infinite"),
        ("y * float('inf')", 1, {}, r"every pixel of its output is NaN or infinite"),
        ("torch.complex(y, y)", 4, {}, r"complex numbers"),
    ],
)
def test_what_an_output_has_not_is_refused_before_work(
    scene: Path, make: Any, end: str, classes: int, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(scene, make(end, classes), **more)
    assert not list(scene.parent.glob("out-*")) and not list(scene.parent.glob(".out-*"))


def test_a_class_that_the_result_cannot_hold_ends_the_scene(scene: Path, make: Any) -> None:
    """The trial has seen small classes only."""
    with pytest.raises(
        RuntimeError, match=r"the network gave class 30[0-3]: a result of uint8 holds classes 0 to 254"
    ):
        run(
            scene,
            make("y.argmax(1) + 300 * (y.amax(1) > 2.5).long() * (y.mean() < 1).long()"),
            engine="tiles",
        )


@pytest.mark.parametrize(
    ("engine", "output", "value"),
    [
        (ENGINES[0], "classes", "nan"),
        (ENGINES[1], "classes", "inf"),
        (ENGINES[1], "probabilities", "nan"),
        (ENGINES[0], "logits", "-inf"),
    ],
)
def test_what_is_not_finite_is_nodata_and_counted(
    scene: Path, make: Any, engine: dict[str, Any], output: str, value: str
) -> None:
    logits, _ = run(scene, make(), output="logits", **engine)
    bad = (logits[1] > 0.8) & ~np.isnan(logits[0])
    end = f"torch.where(y[:, 1:2] > 0.8, torch.tensor(float('{value}')), y)"
    found, told = run(scene, make(end), output=output, **engine)
    nodata = found[0] == 255 if output == "classes" else np.isnan(found[0])
    np.testing.assert_array_equal(nodata, bad | np.isnan(logits[0]))
    assert 0 < bad.sum() < 3000 and f"{bad.sum()} of {bad.size} pixels have data but are nodata" in told


def test_a_resumed_run_counts_what_was_lost_before(
    scene: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigvision.jobs.process.run import Watcher

    class Stop(BaseException):
        pass

    class StopAfter(Watcher):
        left = 3

        def computed(self, pixels: float) -> None:
            self.left -= 1
            if not self.left:
                raise Stop

    options = Options(
        make("torch.where(y > 1.2, torch.tensor(float('nan')), y)"), dtype="float32", engine="tiles", tile=24
    )
    whole = run_scene((str(scene),), scene.with_name("whole.tif"), options)
    with pytest.raises(Stop):
        run_scene((str(scene),), scene.with_name("out.tif"), options, watcher=StopAfter())
    assert "pixels have data but are nodata" in whole.warning
    assert run_scene((str(scene),), scene.with_name("out.tif"), options).warning == whole.warning


class TestARoute:
    def route(self, folder: Path, model: str, gate: str = "entropy") -> Path:
        path = folder / "route.toml"
        path.write_text(f'region = 16\ngate = "{gate}"\nbudget = 0.4\n[cheap]\nmodel = "{model}"\n')
        return path

    @pytest.mark.parametrize(("end", "classes"), [("y.softmax(1)", 4), ("y.sigmoid()", 1)])
    @pytest.mark.parametrize("gate", ["entropy", "margin"])
    def test_of_probabilities_goes_where_that_of_logits_goes(
        self, scene: Path, make: Any, end: str, classes: int, gate: str
    ) -> None:
        results = []
        for ending in ("y", end):
            route = self.route(scene.parent, make(ending.replace("y", "(y / 2)", 1), classes), gate)
            results.append(run(scene, make(ending, classes), output="probabilities", route=route)[0])
        np.testing.assert_allclose(results[0], results[1], atol=1e-5)

    def test_of_two_kinds_is_refused(self, scene: Path, make: Any) -> None:
        route = self.route(scene.parent, make("y.softmax(1)"))
        with pytest.raises(ValueError, match=r"the cheap network's output is softmax, the full one's logits"):
            run(scene, make(), route=route)

    def test_of_a_class_map_is_refused(self, scene: Path, make: Any) -> None:
        route = self.route(scene.parent, make("y.argmax(1)"))
        with pytest.raises(ValueError, match="--route compares logits or probabilities"):
            run(scene, make("y.argmax(1)"), route=route)

    def test_counts_what_is_lost(self, scene: Path, make: Any) -> None:
        end = "torch.where(y > 1.2, torch.tensor(float('nan')), y)"
        found, told = run(scene, make(end), route=self.route(scene.parent, make(end)))
        lost = int((found == 255).sum()) - 200
        assert f"{lost} of 3710 pixels have data but are nodata" in told


def test_the_warning_is_shown(
    scene: Path, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert process_scenes([str(scene)], tmp_path / "out", Options(make("y.softmax(1)"), dtype="float32"))
    assert "the network gives probabilities, as from a softmax" in capsys.readouterr().err


class TestNatureOf:
    def nature(self, end: Callable[[Tensor], Tensor], model: nn.Module) -> Nature:
        example = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return nature_of(lambda x: end(model(x)), example)

    @settings(max_examples=25)
    @given(seed=st.integers(0, 10**6), classes=st.integers(1, 6))
    def test_knows_every_end_of_a_network(self, seed: int, classes: int) -> None:
        model = random_net(seed, 3, classes).eval()
        several = classes > 1
        with torch.no_grad():
            assert self.nature(lambda y: y, model) == Nature("logits", classes)
            assert self.nature(lambda y: y.log_softmax(1), model).kind == "logits"
            assert self.nature(lambda y: y.sigmoid(), model) == Nature("sigmoid", classes)
            if several:
                assert self.nature(lambda y: y.softmax(1), model) == Nature("softmax", classes)
                assert self.nature(lambda y: y.argmax(1, True), model).kind == "classes"

    def test_takes_a_constant_for_no_evidence(self) -> None:
        """A last layer that begins at zero gives 0 everywhere."""
        assert self.nature(lambda y: y * 0, random_net(1, 3, 1)).kind == "logits"
        assert self.nature(lambda y: y * 0 + 0.3, random_net(1, 3, 1)).kind == "logits"

    def test_looks_at_larger_inputs_too(self) -> None:
        """Small weights make small logits, of a small image only."""
        assert self.nature(lambda y: (y * 1e-3 + 0.5).relu(), nn.Conv2d(3, 1, 3, padding=1)).kind == "logits"
