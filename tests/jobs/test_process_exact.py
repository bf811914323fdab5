"""Tiled results equal the whole-image forward, whatever the network, the size of the scene and the tile."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from process_networks import dict_net, placed_net, pooling_net, random_net
from process_scenes import random_pixels, read, whole_image, write_scene
from torch._inductor import config as inductor

from bigvision.jobs.process import Options, run_scene
from tiling import open_raster

NETWORKS = Path(__file__).with_name("process_networks.py")


def assert_equal_to_whole(logits: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-4 of the largest value; one class where the two best are further apart than twice that."""
    bound = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=bound)
    ordered = np.sort(expected, axis=0)
    clear = ordered[-1] - ordered[-2] > 2 * bound if len(expected) > 1 else np.ones(expected.shape[1:], bool)
    assert (logits.argmax(0) == expected.argmax(0))[clear].all()


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    tile=st.sampled_from([8, 16, 24, 40]),
    bands=st.integers(1, 4),
    engine=st.sampled_from(["tiles", "stream"]),
)
def test_units_equal_the_whole_image(
    seed: int, height: int, width: int, tile: int, bands: int, engine: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pixels = random_pixels((bands, height, width), seed)
        scene = write_scene(Path(folder) / "scene.tif", pixels)
        target = Path(folder) / "out.zarr"
        options = Options(
            model=f"{NETWORKS}:random_net?seed={seed}&bands={bands}",
            output="logits",
            format="zarr",
            tile=tile,
            engine=engine,
            dtype="float32",
            scale=200,
            mean=(0.5,),
            std=(0.25,),
        )
        run_scene((str(scene),), target, options)
        model = random_net(seed, bands)
        expected = whole_image(model, (pixels / 200 - 0.5) / 0.25, model.stride)
        assert_equal_to_whole(open_raster(target).read(), expected)


def test_a_network_that_cannot_be_traced_is_probed_and_exact(tmp_path: Path) -> None:
    pixels = random_pixels((3, 70, 53))
    scene = write_scene(tmp_path / "scene.tif", pixels)
    options = Options(model=f"{NETWORKS}:branching_net?seed=6", output="logits", tile=16, dtype="float32")
    outcome = run_scene((str(scene),), tmp_path / "out.tif", options)
    model = random_net(6)
    assert outcome.plan is not None and outcome.plan.exactness == "exact"
    assert outcome.plan.stride == model.stride > 1
    assert_equal_to_whole(read(tmp_path / "out.tif"), whole_image(model, pixels, model.stride))


def test_a_dict_output_is_its_entry_out(tmp_path: Path) -> None:
    pixels = random_pixels((3, 33, 41))
    scene = write_scene(tmp_path / "scene.tif", pixels)
    options = Options(model=f"{NETWORKS}:dict_net", output="logits", tile=16, dtype="float32")
    run_scene((str(scene),), tmp_path / "out.tif", options)
    model = dict_net()
    assert_equal_to_whole(read(tmp_path / "out.tif"), whole_image(model, pixels, model.stride))


class TestASavedProgram:
    """A .pt2 of `torch.export` with dynamic height and width, through the whole job."""

    @pytest.fixture(scope="class")
    def program(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        model = random_net(6).eval()
        sides = {2 + axis: model.stride * torch.export.Dim(f"s{axis}", max=20_000) for axis in range(2)}
        exported = torch.export.export(model, (torch.zeros(1, 3, 64, 64),), dynamic_shapes={"x": sides})
        path = tmp_path_factory.mktemp("program") / "net.pt2"
        torch.export.save(exported, path)
        return path

    @pytest.mark.parametrize("engine", ["tiles", "stream"])
    def test_equals_the_whole_image(self, program: Path, tmp_path: Path, engine: str) -> None:
        pixels = random_pixels((3, 171, 133))
        scene = write_scene(tmp_path / "scene.tif", pixels)
        options = Options(
            model=str(program), trust_model=True, output="logits", engine=engine, tile=64, dtype="float32"
        )
        outcome = run_scene((str(scene),), tmp_path / "out.tif", options)
        assert outcome.plan is not None and outcome.plan.engine == engine
        model = random_net(6)
        assert_equal_to_whole(read(tmp_path / "out.tif"), whole_image(model, pixels, model.stride))

    def test_is_not_opened_untrusted(self, program: Path, tmp_path: Path) -> None:
        scene = write_scene(tmp_path / "scene.tif", random_pixels((3, 20, 20)))
        with pytest.raises(ValueError, match=r"net\.pt2: a \.pt2 can carry pickled code; say --trust-model"):
            run_scene((str(scene),), tmp_path / "out.tif", Options(model=str(program)))


class TestWhatTilesCannotDoExactly:
    def options(self, **more: object) -> Options:
        return Options(model=f"{NETWORKS}:pooling_net", output="logits", dtype="float32", **more)  # type: ignore[arg-type]

    @pytest.mark.parametrize("engine", ["tiles", "auto"])
    def test_is_run_whole_or_streamed(self, tmp_path: Path, engine: str) -> None:
        pixels = random_pixels((3, 164, 80))
        scene = write_scene(tmp_path / "scene.tif", pixels)
        outcome = run_scene((str(scene),), tmp_path / "out.tif", self.options(engine=engine))
        assert outcome.plan is not None and outcome.plan.engine == (
            "tiles" if engine == "tiles" else "stream"
        )
        torch_seeded = load(self.options().model)
        assert_equal_to_whole(read(tmp_path / "out.tif"), whole_image(torch_seeded, pixels, 1))
        assert open_raster(tmp_path / "out.tif").tags["BIGVISION_EXACTNESS"] == "exact"

    def test_is_refused_by_name_where_tiles_must_do_and_memory_is_short(self, tmp_path: Path) -> None:
        scene = write_scene(tmp_path / "scene.tif", np.ones((3, 3000, 3000), np.uint8))
        with pytest.raises(ValueError, match=r"adaptive_avg_pool2d at pool.*--halo N"):
            run_scene((str(scene),), tmp_path / "out.tif", self.options(engine="tiles", memory="1300MiB"))
        assert not (tmp_path / "out.tif").exists()

    def test_is_marked_approximate_where_the_user_accepts_it(self, tmp_path: Path) -> None:
        scene = write_scene(tmp_path / "scene.tif", random_pixels((3, 100, 100)))
        run_scene((str(scene),), tmp_path / "out.tif", self.options(halo=8, tile=32))
        tags = open_raster(tmp_path / "out.tif").tags
        assert tags["BIGVISION_EXACTNESS"].startswith("approximate: halo 8 px; adaptive_avg_pool2d at pool")


def load(spec: str):
    from bigvision.models.spec import load_model

    return load_model(spec)


def test_pooling_net_is_not_local() -> None:
    """The network of the tests above does need the whole image."""
    image = np.zeros((3, 8, 8), np.float32)
    other = image.copy()
    other[:, 7, 7] = 1
    model = pooling_net()
    assert (whole_image(model, image, 1)[:, 0, 0] != whole_image(model, other, 1)[:, 0, 0]).any()


@pytest.mark.parametrize("engine", ["auto", "tiles"])
def test_a_compiled_job_is_exact(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.streaming.compiled.LEAST_RESULTS", 0)
    pixels = random_pixels((3, 70, 53))
    scene = write_scene(tmp_path / "scene.tif", pixels)
    options = Options(
        model=f"{NETWORKS}:random_net?seed=6", output="logits", dtype="float32", engine=engine, compile=True
    )
    outcome = run_scene((str(scene),), tmp_path / "out.tif", options)
    model = random_net(6)
    assert outcome.plan is not None
    assert outcome.plan.engine == {"auto": "stream", "tiles": "tiles"}[engine]
    assert_equal_to_whole(read(tmp_path / "out.tif"), whole_image(model, pixels, model.stride))


def test_without_a_compiler_nothing_is_begun(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", random_pixels((3, 20, 20)))
    options = Options(model=f"{NETWORKS}:random_net?seed=6", compile=True)
    none = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with none, pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        run_scene((str(scene),), tmp_path / "out" / "scene.tif", options)
    assert not list((tmp_path / "out").glob("*.tif"))


@pytest.mark.parametrize("engine", ["auto", "stream"])
def test_a_network_of_one_size_runs_on_scenes_of_that_size(tmp_path: Path, engine: str) -> None:
    pixels = random_pixels((3, 90, 70))
    scene = write_scene(tmp_path / "scene.tif", pixels)
    model = f"{NETWORKS}:placed_net?height=90&width=70"
    options = Options(model, output="logits", format="zarr", engine=engine, dtype="float32")
    run_scene((str(scene),), tmp_path / "out.zarr", options)
    expected = whole_image(placed_net(90, 70), pixels.astype(np.float32), 1)
    assert_equal_to_whole(open_raster(tmp_path / "out.zarr").read(), expected)


def test_a_network_of_another_size_is_refused_by_the_scenes(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", random_pixels((3, 40, 70)))
    options = Options(f"{NETWORKS}:placed_net?height=91&width=70", output="logits", format="zarr")
    with pytest.raises(ValueError, match=r"fails on an image of the scene's size, 3 x 40 x 70: .*91"):
        run_scene((str(scene),), tmp_path / "out.zarr", options)
