"""torchrun for the ranks of one machine, ending with the process that started it."""

from torch.distributed.run import main

from bigvision.jobs.faces.orphans import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    main()
