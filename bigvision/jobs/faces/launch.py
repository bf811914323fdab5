"""Starting a training run under torchrun on this machine.

torchrun restarts no dead rank unless told to (`--max-restarts` is 0); here it is told to, and each start goes
on from the last checkpoint.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from bigvision.jobs.faces.options import parse, parser

MODULE = "bigvision.jobs.train_face"
HELP = """\
bigvision face train [--nproc-per-node N] [--max-restarts 3] OPTIONS

Starts torchrun with N ranks on this machine; over several machines call torchrun yourself:
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --max-restarts 3 \\
         -m bigvision.jobs.train_face OPTIONS
"""


def launch(arguments: Sequence[str], *, ranks: int, max_restarts: int) -> int:
    """Run torchrun and return its exit status.

    Raises ValueError for impossible options or a run in the way before it starts, and with the run's own
    sentence where the run was refused: torchrun's report of dead ranks would bury it.
    """
    if "--help" in arguments or "-h" in arguments:
        print(HELP + "\n" + parser("bigvision face train").format_help())
        return 0
    if ranks < 1 or max_restarts < 0:
        raise ValueError(f"{ranks} ranks, {max_restarts} restarts")
    from bigvision.jobs.faces.checkpoint import starting_point  # imports torch, which --help needn't

    options = parse(arguments, "bigvision face train")
    if not options.plan:  # a plan disturbs no run
        starting_point(options.out, options.resume)
    marker = options.out / "stopped.json"
    marker.unlink(missing_ok=True)
    status = subprocess.run(command(arguments, ranks, max_restarts), check=False).returncode
    if status and marker.is_file():
        raise ValueError(json.loads(marker.read_text())["why"])
    return status


def command(arguments: Sequence[str], ranks: int, max_restarts: int) -> list[str]:
    """The command line of torchrun."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts)),
        *("-m", MODULE),
        *arguments,
    ]
