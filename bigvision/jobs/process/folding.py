"""Batch norm folded into the convolution before it: one pass over the activations instead of two."""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bigvision.graph.outputs import main_output


@torch.no_grad()  # parameters made in inference mode could not be used outside of it
def fold_batch_norms(model: nn.Module, example: Tensor) -> int:
    """Fold every batch norm that follows its convolution, in place; returns how many.

    Which follows which is seen by running `example` [1, C, H, W]. The folded model must give what it gave
    before (to 1e-4 of its largest value), which fails where something else reads a convolution's output;
    then nothing is folded.
    """
    pairs = _adjacent(model, example)
    if not pairs:
        return 0
    before = main_output(model(example))
    names = {id(module): name for name, module in model.named_modules()}
    originals: dict[str, nn.Module] = {}
    for conv, norm in pairs:
        fused = fuse_conv_bn_eval(conv, norm)
        originals[names[id(conv)]] = conv
        originals[names[id(norm)]] = norm
        model.set_submodule(names[id(conv)], fused)
        model.set_submodule(names[id(norm)], nn.Identity())
    after = main_output(model(example))
    if (after.float() - before.float()).abs().max() <= 1e-4 * before.float().abs().max():
        return len(pairs)
    for name, module in originals.items():
        model.set_submodule(name, module)
    return 0


def _adjacent(model: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose very output a batch norm takes, both called once and standing once in the model."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    calls: Counter[nn.Module] = Counter()

    def after_conv(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        made[id(output)] = (module, output)  # the tensor is kept, so that its id stays its own

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        conv, _ = made.get(id(inputs[0]), (None, None))
        if isinstance(conv, nn.Conv2d) and isinstance(module, nn.BatchNorm2d):
            pairs.append((conv, module))

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_conv))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return [(c, n) for c, n in pairs if calls[c] == calls[n] == places[c] == places[n] == 1]
