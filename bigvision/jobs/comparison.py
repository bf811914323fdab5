"""Networks compared by compute and memory at once, from the layer dimensions that their papers publish.

No result is written down here: parameters, FLOPs and bytes follow from the dimensions. A FLOP is one
multiplication or one addition; bytes are those of float32. One example is one sequence, image, user or scene.

Legend: d width of a layer, n positions it is applied at, h heads, L layers, E experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

_FLOAT = 4


@dataclass(frozen=True)
class LayerCost:
    """What a layer, or a whole network, adds up to for one example."""

    parameters: int = 0
    flops: int = 0
    activations: int = 0

    def __add__(self, other: "LayerCost") -> "LayerCost":
        return LayerCost(
            self.parameters + other.parameters,
            self.flops + other.flops,
            self.activations + other.activations,
        )

    def __mul__(self, count: int) -> "LayerCost":
        return LayerCost(self.parameters * count, self.flops * count, self.activations * count)


def dense(inputs: int, outputs: int, n: int, copies: int = 1) -> LayerCost:
    """A matrix applied at n positions; of `copies` alike (experts) one serves each position."""
    return LayerCost(copies * inputs * outputs, 2 * n * inputs * outputs, n * outputs)


def embedding(rows: int, d: int, n: int) -> LayerCost:
    """A table looked up n times."""
    return LayerCost(parameters=rows * d, activations=n * d)


def attention(d: int, inner: int, h: int, queries: int, keys: int, causal: bool = False) -> LayerCost:
    """Multi-head attention: four projections of d x inner, scores and weighted sums over the keys."""
    seen = queries * (keys + 1) // 2 if causal else queries * keys
    projections = dense(d, inner, queries) + dense(d, inner, keys) * 2 + dense(inner, d, queries)
    return projections + LayerCost(flops=4 * seen * inner, activations=h * seen + queries * inner)


def feed_forward(d: int, hidden: int, n: int, gated: bool = False, experts: int = 1) -> LayerCost:
    """Two matrices, three where gated; with experts also the router's, and each position sees one expert."""
    layer = dense(d, hidden, n, experts) * (2 if gated else 1) + dense(hidden, d, n, experts)
    return layer + dense(d, experts, n) if experts > 1 else layer


# T5 reads 512 tokens and writes about 114 where 15 % of them are masked (arXiv 1910.10683, section 3.1.4).
_READ, _WRITTEN, _T5_VOCABULARY = 512, 114, 32128


@dataclass(frozen=True)
class EncoderDecoder:
    """Dimensions as T5 and Switch print them; each `every`-th feed-forward layer has experts."""

    d: int
    hidden: int
    kv: int
    h: int
    layers: int
    gated: bool = False
    experts: int = 1
    every: int = 1

    def cost(self) -> LayerCost:
        """Both stacks, and the vocabulary shared by input and output."""
        inner, total = self.kv * self.h, LayerCost()
        for layer in range(self.layers):
            experts = self.experts if (layer + 1) % self.every == 0 else 1
            total += attention(self.d, inner, self.h, _READ, _READ)
            total += feed_forward(self.d, self.hidden, _READ, self.gated, experts)
            total += attention(self.d, inner, self.h, _WRITTEN, _WRITTEN, causal=True)
            total += attention(self.d, inner, self.h, _WRITTEN, _READ)
            total += feed_forward(self.d, self.hidden, _WRITTEN, self.gated, experts)
        logits = dense(self.d, _T5_VOCABULARY, _WRITTEN)
        shared = LayerCost(flops=logits.flops, activations=logits.activations)
        return total + embedding(_T5_VOCABULARY, self.d, _READ + _WRITTEN) + shared


def gpt3() -> LayerCost:
    """GPT-3 175B on a full context (arXiv 2005.14165, table 2.1)."""
    d, layers, h, context, vocabulary = 12288, 96, 96, 2048, 50257
    block = attention(d, d, h, context, context, causal=True) + feed_forward(d, 4 * d, context)
    logits = dense(d, vocabulary, context)
    tables = embedding(vocabulary, d, context) + embedding(context, d, context)
    return block * layers + tables + LayerCost(flops=logits.flops, activations=logits.activations)


def wide_and_deep(features: int = 36, ids: int = 10**9) -> LayerCost:
    """Wide & Deep (arXiv 1606.07792, section 4): embeddings of 32, about 1200 wide, three ReLU layers.

    features, ids: categorical features, and the ids that all their tables hold; the paper gives neither, a
    thousand million ids make it the kind of recommender whose tables outgrow a device.
    """
    inputs, total = features * 32 + 48, LayerCost()
    for width, following in ((inputs, 1024), (1024, 512), (512, 256), (256, 1)):
        total += dense(width, following, 1)
    wide = embedding(ids, 1, features)
    return total + embedding(ids, 32, features) + wide


@cache
def face_network(identities: int = 10**7) -> LayerCost:
    """An iResNet-50 on 112 x 112 pixels and cosine logits against every identity's centre of 512."""
    from bigvision.models.iresnet import iresnet50

    return traced_cost(iresnet50(), (3, 112, 112)) + dense(512, identities, 1)


@cache
def scene_network() -> LayerCost:
    """A U-Net with ResNet-18 encoder and 8 classes over a scene of 30000 x 30000 x 4."""
    from segmentation_models_pytorch import Unet

    model = Unet("resnet18", encoder_weights=None, in_channels=4, classes=8)
    return traced_cost(model, (4, 30_000, 30_000))


def traced_cost(model: object, shape: tuple[int, int, int]) -> LayerCost:
    """A network of this project or another, by its traced graph at its true (padded) size."""
    from torch import nn

    from bigvision.graph.cost import cost
    from bigvision.graph.geometry import trace_padded
    from bigvision.graph.trace import trace

    assert isinstance(model, nn.Module)
    model.eval()
    spatial = shape[1] >= 1024
    found = cost(trace_padded(model, shape)[0] if spatial else trace(model, shape))
    return LayerCost(found.parameters, found.flops, found.dense_bytes // _FLOAT)


T5, SWITCH = "arXiv 1910.10683", "arXiv 2101.03961, table 9"
NETWORKS: dict[str, tuple[str, str, Callable[[], LayerCost]]] = {
    "T5-Base": (f"{T5}, section 3.8", "sequence", EncoderDecoder(768, 3072, 64, 12, 12).cost),
    "T5-Large": (f"{T5}, section 3.8", "sequence", EncoderDecoder(1024, 4096, 64, 16, 24).cost),
    "T5-13B (T5-XXL)": (SWITCH, "sequence", EncoderDecoder(4096, 10240, 64, 64, 24, gated=True).cost),
    "Switch-Base, 128 experts": (
        SWITCH,
        "sequence",
        EncoderDecoder(768, 2048, 64, 12, 12, gated=True, experts=128, every=2).cost,
    ),
    "Switch-C 1.6T, 2048 experts": (
        SWITCH,
        "sequence",
        EncoderDecoder(2080, 6144, 64, 32, 15, experts=2048).cost,
    ),
    "GPT-3 175B": ("arXiv 2005.14165, table 2.1", "context of 2048", gpt3),
    "Wide & Deep, 10⁹ ids": ("arXiv 1606.07792, section 4", "user", wide_and_deep),
    "iResNet-50, 10⁷ identities": ("traced, and 10⁷ centres of 512", "face", face_network),
    "U-Net ResNet-18, 30000 x 30000 x 4": ("traced at its true size", "scene", scene_network),
}


@dataclass(frozen=True)
class Row:
    """One network of the table."""

    name: str
    source: str
    example: str
    cost: LayerCost

    @property
    def flops_per_parameter(self) -> float:
        """How often a parameter is used: small where capacity outruns compute."""
        return self.cost.flops / self.cost.parameters

    @property
    def bytes_per_flop(self) -> float:
        """Bytes of weights and activations for each FLOP: large where memory is what a network needs."""
        return _FLOAT * (self.cost.parameters + self.cost.activations) / self.cost.flops


def compare(names: Iterable[str] = NETWORKS) -> list[Row]:
    """The rows of the table, in its order."""
    return [Row(name, NETWORKS[name][0], NETWORKS[name][1], NETWORKS[name][2]()) for name in names]


def markdown(rows: Iterable[Row]) -> str:
    """The table."""
    lines = [
        "| network | parameters | FLOPs | of one | activations | FLOPs per parameter | bytes per FLOP | "
        "source |",
        "|---|---:|---:|---|---:|---:|---:|---|",
    ]
    for row in rows:
        cells = (
            row.name,
            quantity(row.cost.parameters),
            quantity(row.cost.flops),
            row.example,
            quantity(row.cost.activations * _FLOAT) + "B",
            f"{row.flops_per_parameter:.3g}",
            f"{row.bytes_per_flop:.2g}",
            row.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quantity(value: float) -> str:
    """`5.12 G` for 5.12e9."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def page() -> str:
    """`docs/comparison.md`."""
    rows = {row.name: row for row in compare()}

    def ratio(one: str, other: str, what: str) -> float:
        return float(getattr(rows[one].cost, what) / getattr(rows[other].cost, what))

    base, large, xxl, switch, trillion = list(rows)[:5]
    return f"""# Compute and memory, compared

Generated by `python -m bigvision.jobs.comparison > docs/comparison.md` from the layer dimensions in the
sources named; the last two rows are traced by the code behind `bigvision plan`. A FLOP is one multiplication
or one addition of a forward pass over one example. Bytes are those of float32: weights and every layer's
result.

{markdown(rows.values())}

Two numbers tell what kind of large a network is. **FLOPs per parameter** are few where capacity outruns
compute: experts, embeddings and classes, of which an example uses a handful, and which are divided among
devices. **Bytes per FLOP** say how much memory each unit of compute brings along.

- {switch} has {ratio(switch, base, "parameters"):.0f} x the parameters of {base} at
  {ratio(switch, base, "flops"):.2f} x its compute,
  and {ratio(switch, large, "parameters"):.1f} x those of {large} at {ratio(switch, large, "flops"):.0%}.
- {trillion} has {ratio(trillion, xxl, "parameters"):.0f} x the parameters of {xxl}
  at {ratio(trillion, xxl, "flops"):.0%} of its compute: per parameter, {
        ratio(trillion, xxl, "flops") / ratio(trillion, xxl, "parameters"):.4f} of it.
- The face network's weights are its identities; the scene network's memory is its activations. Both are what
  this project is about: the one is sharded and gated, the other streamed.

Every multiplication counts here, also those of routers, of logits and of the keys that decoders compute from
the encoder's output, so the FLOPs lie up to a quarter above those that table 9 of the Switch paper prints.
Parameters agree with the papers within 2 %; T5-XXL, also called T5-13B, has
{quantity(rows[xxl].cost.parameters).strip()} of them by its printed dimensions, as that table says.
"""


if __name__ == "__main__":
    print(page(), end="")
