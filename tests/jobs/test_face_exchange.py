"""What comes from elsewhere and goes elsewhere: InsightFace files, ONNX and torch.export, galleries."""

import os
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bigvision.jobs.convert_face import config_arguments, convert_weights, read_config
from bigvision.jobs.evaluate_faces import EmbedOptions, described, evaluate, lines
from bigvision.jobs.export_face import export_face
from bigvision.jobs.faces.options import parse
from bigvision.jobs.identify_faces import build_gallery, identify, load_gallery
from bigvision.models.embedding import BackboneSpec, build_backbone, load_backbone, save_backbone
from datasets.alignment import TEMPLATE_112
from datasets.face_batches import normalized, read_batch
from datasets.identities import SyntheticIdentities

SPEC = BackboneSpec("mobilefacenet", 16, 32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    torch.manual_seed(0)
    model = build_backbone(SPEC).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain mean of what it sees
    faces = read_batch(SyntheticIdentities(32, 1, 32), np.arange(32), 32)
    with torch.no_grad():
        model(normalized(faces.images))
    save_backbone(model, SPEC, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = SyntheticIdentities(4, 3, 32)
    for position in range(len(source)):
        image, label = source.read(position)
        (tmp_path / "faces" / f"p{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "faces" / f"p{label}" / f"{position}.png")
    return tmp_path / "faces"


@pytest.mark.parametrize("name", ["iresnet18", "iresnet50", "mobilefacenet"])
def test_public_weights_are_recognised(tmp_path: Path, name: str) -> None:
    model = build_backbone(BackboneSpec(name, 8, 32))
    torch.save(
        {f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "backbone.pth"
    )
    done = convert_weights(tmp_path / "backbone.pth", tmp_path / "out.safetensors")
    assert (done.spec, done.centres) == (BackboneSpec(name, 8, 32), None)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_backbone(done.backbone)[0](x), model.eval()(x))


def test_per_rank_checkpoints_are_joined_in_class_order(tmp_path: Path) -> None:
    state = build_backbone(SPEC).state_dict()
    centres = torch.randn(7, 16)
    for rank, part in enumerate(centres.split([3, 2, 2])):
        saved = {"epoch": 3, "global_step": 9, "state_dict_backbone": OrderedDict(state)}
        saved |= {"state_dict_softmax_fc": OrderedDict(weight=part), "state_lr_scheduler": {"base_lr": 0.1}}
        torch.save(saved, tmp_path / f"checkpoint_gpu_{rank}.pt")
    done = convert_weights(tmp_path, tmp_path / "out.safetensors")
    assert (done.spec, done.classes) == (SPEC, 7)
    assert done.centres is not None
    assert torch.equal(load_file(done.centres)["weight"], centres)
    (tmp_path / "checkpoint_gpu_1.pt").unlink()
    with pytest.raises(ValueError, match=r"ranks \[0, 2\]: not a complete set"):
        convert_weights(tmp_path, tmp_path / "out.safetensors")


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoint_gpu_\*\.pt"):
        convert_weights(tmp_path, tmp_path / "out.safetensors")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"
    for saved, message in (
        ({"weight": torch.zeros(3)}, r"backbone\.pth holds the weights of none of the known"),
        ([torch.zeros(3)], "holds a list"),
        ({"a": Path("x")}, "no file of plain tensors: it needs .pathlib"),
    ):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=message):
            convert_weights(path, tmp_path / "out.safetensors")
    torch.save(build_backbone(SPEC).state_dict(), path)
    with pytest.raises(ValueError, match="do not fit iresnet18"):
        convert_weights(path, tmp_path / "out.safetensors", "iresnet18")
    assert not (tmp_path / "out.safetensors").exists()


CONFIG = """
from easydict import EasyDict as edict
import os
config = edict()
config.margin_list = (1.0, 0.0, 0.4)
config.network = "r50"
config.output = None
config.embedding_size = 512
config.sample_rate = 0.3
config.fp16 = True
config.batch_size = 64 * 2
config.lr = 0.4
config.rec = "/data/webface"
config.num_classes = 2059906
config.num_epoch = 20
config.warmup_epoch = 2
config.dali = True
config.val_targets = ["lfw", "agedb_30"]
"""


def test_a_config_is_read_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(CONFIG + f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    words, rest = config_arguments(read_config(path), ranks=4)
    assert not (tmp_path / "trace").exists()
    options = parse([*words, "--out", "run"])
    assert (options.backbone, options.margin, options.active) == ("iresnet50", "1,0,0.4", "sampled:0.3")
    assert (options.batch_size, options.dtype, options.data) == (512, "float16", "rec:/data/webface")
    assert (options.classes, options.epochs, options.warmup, options.lr) == ("2059906", 20, 2, 0.4)
    assert options.evaluate == ("bin:/data/webface/lfw.bin", "bin:/data/webface/agedb_30.bin")
    assert rest == ["output = None", "dali = True"]
    assert options.inactive == "dense"


def test_arithmetic_of_values_known_before_is_reckoned(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(
        "config = edict()\nconfig.num_epoch = 40\nconfig.warmup_epoch = config.num_epoch // 10\n"
        "config.lr = 0.1 * (config.num_epoch + 8) / 12 - -1 % 3\nconfig.margin_list = (1, 0.0, 2 * 0.2)\n"
    )
    assert read_config(path) == {
        "num_epoch": 40,
        "warmup_epoch": 4,
        "lr": 0.1 * 48 / 12 - 2,
        "margin_list": (1, 0.0, 0.4),
    }


@pytest.mark.parametrize(("warmup", "ours"), [(-1, 0), (0, 0), (0.5, 0.5), (4, 4)])
def test_a_negative_warmup_is_none(warmup: float, ours: float) -> None:
    words, _ = config_arguments({"warmup_epoch": warmup}, 1)
    assert parse([*words, "--data", "rec:a", "--out", "run"]).warmup == ours


@pytest.mark.parametrize(
    ("config", "inactive"),
    [
        ({"sample_rate": 0.1}, "dense"),
        ({"sample_rate": 0.1, "optimizer": "sgd"}, "dense"),
        ({"sample_rate": 0.1, "optimizer": "adamw"}, "frozen"),
        ({"sample_rate": 1.0}, "frozen"),
        ({}, "frozen"),
    ],
)
def test_classes_left_out_of_a_step_move_as_in_the_source(config: dict[str, Any], inactive: str) -> None:
    words, _ = config_arguments(config, 1)
    options = parse([*words, "--data", "rec:a", "--out", "run"])
    assert options.inactive == inactive
    assert options.head_optimizer_settings().inactive == inactive


def test_a_rate_of_zero_is_the_batchs_own_classes_alone() -> None:
    words, _ = config_arguments({"sample_rate": 0}, 1)
    assert parse([*words, "--data", "rec:a", "--out", "run"]).active == "sampled:1e-09"


def test_accumulated_batches_become_one_in_as_many_parts() -> None:
    """Theirs takes four batches of 128 images a rank for an update: here one of 512, passed in four parts."""
    words, rest = config_arguments({"network": "r18", "batch_size": 128, "gradient_acc": 4}, ranks=2)
    options = parse([*words, "--data", "rec:a", "--out", "run"])
    assert (options.batch_size, options.accumulate, rest) == (1024, 4, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config.lr = os.getpid()", r"line 1: lr = os\.getpid\(\) is more than a plain value"),
        ("config.lr = config.base * 2", "line 1: .*base has no value before it"),
        ("config.lr = 1 / 0", "line 1: .*division by zero"),
        ("config.rec = 'a' * 10**9", "line 1: .*more than a plain value"),
        ("def", "is no Python file"),
        ("x = 1", "assigns nothing to a config"),
    ],
)
def test_a_config_that_is_a_program_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path)
    with pytest.raises(ValueError, match="network 'vit'"):
        config_arguments({"network": "vit"}, 1)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_export_equals_torch(weights: Path, tmp_path: Path, suffix: str) -> None:
    done = export_face(weights, tmp_path / f"face{suffix}")
    assert done.difference < 1e-4
    assert [entry.name for entry in tmp_path.iterdir()] == [f"face{suffix}"]


def test_an_export_that_differs_is_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigvision.jobs import export_face as job

    monkeypatch.setattr(job, "_difference", lambda *_: 0.5)
    with pytest.raises(ValueError, match=r"differs from torch by 0\.5"):
        export_face(weights, tmp_path / "face.pt2")
    with pytest.raises(ValueError, match=r"neither \.onnx nor \.pt2"):
        export_face(weights, tmp_path / "face.bin")
    assert not list(tmp_path.iterdir())


def test_an_evaluation_leaves_a_report_and_a_picture(weights: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "p0" / "0.png").write_bytes(b"damaged")
    options = EmbedOptions(weights)
    (found,) = evaluate(
        options, [f"folder:{folder}"], roc=tmp_path / "roc.png", report=tmp_path / "report.json"
    )
    assert (found.images, len(found.damaged)) == (12, 1)
    assert described(found)["tar_at_far_all_pairs"]["1e-06"] is None
    text = "\n".join(lines(found))
    assert "12 images, 1 damaged" in text
    assert "too few to measure" in text
    assert "damaged: p0/0.png" in text
    assert (tmp_path / "roc.png").exists() and (tmp_path / "report.json").exists()
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate(options, [])


@pytest.mark.parametrize("per_identity", [True, False])
def test_a_gallery_names_its_own_images(
    weights: Path, folder: Path, tmp_path: Path, per_identity: bool
) -> None:
    options = EmbedOptions(weights)
    gallery, damaged = build_gallery(
        options, f"folder:{folder}", tmp_path / "gallery", per_identity=per_identity
    )
    assert (len(gallery.embeddings), damaged) == (4 if per_identity else 12, ())
    opened = load_gallery(tmp_path / "gallery")
    np.testing.assert_allclose(np.linalg.norm(opened.embeddings, axis=1), 1, rtol=1e-5)
    (folder / "p9").mkdir()
    (folder / "p9" / "x.jpg").write_bytes(b"damaged")
    found, left_out = identify(options, tmp_path / "gallery", [folder], k=2)
    assert len(found) == 12
    assert all(len(set(face.names)) == len(face.names) == 2 for face in found)
    if not per_identity:
        assert all(face.names[0] == Path(face.image).parent.name for face in found)
        assert all(face.cosines[0] == pytest.approx(1, abs=1e-4) for face in found)
    assert len(left_out) == 1 and "x.jpg" in left_out[0]
    with pytest.raises(ValueError, match="exists: --overwrite"):
        build_gallery(options, f"folder:{folder}", tmp_path / "gallery")


def test_names_of_any_bytes_and_what_is_left_out_are_told(
    weights: Path, folder: Path, tmp_path: Path
) -> None:
    strange = folder / os.fsdecode(b"\xe9")
    strange.mkdir()
    (strange / os.fsdecode(b"\xff.png")).write_bytes(b"damaged")
    shutil.copy(next((folder / "p0").iterdir()), strange / "a.png")
    (folder / "p0" / "notes.txt").touch()
    options = EmbedOptions(weights)
    _, left_out = build_gallery(options, f"folder:{folder}", tmp_path / "gallery")
    found, also = identify(options, tmp_path / "gallery", [folder], k=1)
    assert any(face.names[0] == r"\udce9" for face in found)
    assert any("1 .txt" in line for line in left_out) and any("1 .txt" in line for line in also)
    for line in (*left_out, *also, *(face.image for face in found)):
        line.encode()


def test_landmarks_align_gallery_and_pictures(weights: Path, tmp_path: Path) -> None:
    # A turned picture with its landmarks is the upright one: the same embedding, to interpolation.
    upright = SyntheticIdentities(1, 1, 112).read(0)[0]
    for name, image in (("a/up.png", upright), ("b/turned.png", np.rot90(upright, 2))):
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / "faces" / name)
    points = {"a/up.png": TEMPLATE_112, "b/turned.png": 111 - TEMPLATE_112}
    table = tmp_path / "landmarks.csv"
    table.write_text("".join(f"{n},{','.join(map(str, p.ravel()))}\n" for n, p in points.items()))
    options = EmbedOptions(weights, flip=False)
    gallery, _ = build_gallery(options, f"folder:{tmp_path / 'faces'}", tmp_path / "gallery", landmarks=table)
    assert float(gallery.embeddings[0] @ gallery.embeddings[1]) > 0.999
    table.write_text(f"turned.png,{','.join(map(str, points['b/turned.png'].ravel()))}\n")
    images = [tmp_path / "faces" / name for name in points]
    found, left_out = identify(options, tmp_path / "gallery", images, k=1, landmarks=table)
    assert [Path(face.image).name for face in found] == ["turned.png"]
    assert left_out == [f"{images[0]}: no landmarks for it"]
    with pytest.raises(ValueError, match="landmarks go with folder"):
        build_gallery(options, "synthetic:3", tmp_path / "other", landmarks=table)


def test_a_detector_finds_the_faces_of_a_photograph(
    weights: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("my_detector")
    module.find = lambda image: np.stack([TEMPLATE_112 / 3.5, TEMPLATE_112 / 3.5 + 1])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_detector", module)
    build_gallery(EmbedOptions(weights), f"folder:{folder}", tmp_path / "gallery")
    image = next((folder / "p0").iterdir())
    found, _ = identify(EmbedOptions(weights), tmp_path / "gallery", [image], detector="my_detector:find")
    assert len(found) == 2
    assert found[0].landmarks is not None and len(found[0].landmarks) == 5
    module.find = lambda image: []  # type: ignore[attr-defined]
    found, left_out = identify(
        EmbedOptions(weights), tmp_path / "gallery", [image], detector="my_detector:find"
    )
    assert (found, left_out) == ([], [f"{image}: no face found"])
    for name in ("absent_module:find", "my_detector:nothing", "retina"):
        with pytest.raises(ValueError, match=f"detector '{name}' is not at hand"):
            identify(EmbedOptions(weights), tmp_path / "gallery", [image], detector=name)


def test_the_detectors_of_known_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigvision.jobs.identify_faces import load_detector

    class Application:
        def __init__(self, **_: object) -> None: ...
        def prepare(self, ctx_id: int) -> None: ...
        def get(self, image: np.ndarray) -> list[object]:
            assert image[0, 0].tolist() == [3, 2, 1]  # blue first, as that package wants it
            return [types.SimpleNamespace(kps=TEMPLATE_112)]

    class Network:
        def __init__(self, **_: object) -> None: ...
        def detect(self, image: np.ndarray, landmarks: bool) -> tuple[None, None, None]:
            return None, None, None

    for name, content in (("insightface", None), ("insightface.app", {"FaceAnalysis": Application})):
        module = types.ModuleType(name)
        module.__dict__.update(content or {})
        monkeypatch.setitem(sys.modules, name, module)
    torch_module = types.ModuleType("facenet_pytorch")
    torch_module.MTCNN = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "facenet_pytorch", torch_module)
    picture = np.tile(np.array([1, 2, 3], np.uint8), (4, 4, 1))
    assert load_detector("insightface")(picture).shape == (1, 5, 2)
    assert load_detector("facenet-pytorch")(picture).shape == (0, 5, 2)


def test_galleries_that_do_not_fit_are_refused(weights: Path, folder: Path, tmp_path: Path) -> None:
    options = EmbedOptions(weights)
    build_gallery(options, f"folder:{folder}", tmp_path / "gallery")
    other = tmp_path / "other.safetensors"
    save_backbone(build_backbone(SPEC), SPEC, other)
    with pytest.raises(ValueError, match="made with other weights"):
        identify(EmbedOptions(other), tmp_path / "gallery", [folder])
    with pytest.raises(ValueError, match=r"no file or folder .*absent"):
        identify(options, tmp_path / "gallery", [tmp_path / "absent"])
    (tmp_path / "gallery" / "labels.npy").unlink()
    with pytest.raises(ValueError, match="is no gallery"):
        load_gallery(tmp_path / "gallery")
