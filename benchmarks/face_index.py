"""What it takes to open a set of many face images: listed the first time, mapped from its index afterwards.

    python benchmarks/face_index.py [--images 2000000] [--folder SCRATCH]

Each opening is a process of its own. Images are tiny or empty: only names and headers matter.
"""

import argparse
import io
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

from datasets.faces import open_faces
from datasets.recordio import ImageRecord, RecordWriter, pack_image_record

A_PERSON = 20  # images


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), 128).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root: Path, images: int) -> str:
    root.mkdir()
    for start in range(0, images, A_PERSON):
        person = root / f"person{start // A_PERSON:08d}"
        person.mkdir()
        for number in range(A_PERSON):
            (person / f"image{number:04d}.png").touch()
    return f"folder:{root}"


def make_records(root: Path, images: int) -> str:
    root.mkdir()
    data = picture()
    with RecordWriter(root / "train.rec") as writer:
        for number in range(images):
            writer.write(number, pack_image_record(ImageRecord((float(number // A_PERSON),), number, data)))
    (root / "train.idx").unlink()
    return f"rec:{root}"


def make_shards(root: Path, images: int, a_shard: int = 100_000) -> str:
    root.mkdir()
    data = picture()
    for start in range(0, images, a_shard):
        with tarfile.open(root / f"{start:09d}.tar", "w") as shard:
            for number in range(start, min(start + a_shard, images)):
                label = b"%d" % (number // A_PERSON)
                for name, content in ((f"{number:09d}.png", data), (f"{number:09d}.cls", label)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
                    shard.members.clear()  # type: ignore[attr-defined]
    return f"tar:{root}"


def opened(spec: str) -> None:
    """Print what opening took in this process."""
    before = peak()
    begun, cpu = time.perf_counter(), time.process_time()
    source = open_faces(spec)
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    size = source.index.nbytes / 2**20  # type: ignore[attr-defined]
    print(f"{wall:8.2f} {cpu:8.2f} {peak() - before:9.0f} {size:9.0f}  {len(source):,}")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        opened(options.open)
        return
    print(f"{'set':8} {'opened':10} {'wall s':>8} {'cpu s':>8} {'peak MiB':>9} {'index MiB':>9}  images")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for kind, make in (("folder", make_folder), ("rec", make_records), ("tar", make_shards)):
            spec = make(Path(scratch) / kind, options.images)
            time.sleep(3)  # a set that still moves is listed anew
            for when in ("first", "again"):
                print(f"{kind:8} {when:10}", end=" ", flush=True)
                subprocess.run([sys.executable, __file__, "--open", spec], check=True)


if __name__ == "__main__":
    main()
