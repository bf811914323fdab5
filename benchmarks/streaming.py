"""The streaming engine beside the dense network: forward, an exact gradient step, and what lightstream makes.

    python benchmarks/streaming.py                        small sizes: all three tables
    python benchmarks/streaming.py forward --width 30000  the size of a Sentinel-2 mosaic
    python benchmarks/streaming.py gradient --width 30000 --height 30000 --memory 8GiB \\
        --scratch FOLDER --scratch-limit 40GB --no-plain  the size the project is for
    python benchmarks/streaming.py lightstream            its streaming of a network's parts

Each table has its own module, `streaming_forward.py`, `streaming_gradient.py` and `lightstream_cases.py`, and
takes that one's options.
"""

from __future__ import annotations

import sys

import lightstream_cases
import streaming_forward
import streaming_gradient

TABLES = {
    "forward": streaming_forward.main,
    "gradient": streaming_gradient.main,
    "lightstream": lightstream_cases.main,
}


def main(arguments: list[str]) -> None:
    if arguments and arguments[0] in TABLES:
        TABLES[arguments[0]](arguments[1:])
    elif arguments:
        raise SystemExit(__doc__)
    else:
        for table in TABLES.values():
            table([])
            print(flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
