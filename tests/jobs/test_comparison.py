"""The comparison's figures follow from layer dimensions, and agree with what the papers print."""

from pathlib import Path

import pytest

from bigvision.jobs.comparison import LayerCost, attention, compare, dense, feed_forward, page, quantity

PUBLISHED = compare(
    [
        "T5-Base",
        "T5-Large",
        "T5-13B (T5-XXL)",
        "Switch-Base, 128 experts",
        "Switch-C 1.6T, 2048 experts",
        "GPT-3 175B",
        "Wide & Deep, 10⁹ ids",
    ]
)
BASE, LARGE, XXL, SWITCH, TRILLION, GPT3, WIDE = (row.cost for row in PUBLISHED)


def test_layers_by_hand() -> None:
    assert dense(3, 5, 7, copies=2) == LayerCost(30, 210, 35)
    assert feed_forward(2, 8, 3) == LayerCost(32, 192, 30)
    assert feed_forward(2, 8, 3, gated=True).parameters == 48
    assert feed_forward(2, 8, 3, experts=4) == LayerCost(128 + 8, 192 + 48, 30 + 12)
    # Two queries of three keys, 4 -> 6 in two heads: projections, then scores and sums of 2 x 3 x 6 each.
    assert attention(4, 6, 2, 2, 3) == LayerCost(
        4 * 24, 2 * 24 * (2 + 3 + 3 + 2) + 4 * 36, 12 + 18 + 18 + 8 + 12 + 12
    )


@pytest.mark.parametrize(
    ("cost", "parameters", "flops"),
    [
        # Parameters: 1910.10683 section 3.8 (220 M, 770 M), 2101.03961 table 9. FLOPs of a sequence: table 9.
        (BASE, 0.22e9, 124e9),
        (LARGE, 0.74e9, 425e9),
        (XXL, 11e9, 6.3e12),
        (SWITCH, 7.4e9, 124e9),
        (TRILLION, 1571e9, 890e9),
        # Ours count routers and the keys of cross-attention too.
        # 2005.14165: 174600 M parameters (table D.1); six FLOPs a parameter and token, a third of it forward.
        (GPT3, 174.6e9, 2 * 174.6e9 * 2048),
    ],
)
def test_published_sizes_come_out(cost: LayerCost, parameters: float, flops: float) -> None:
    assert cost.parameters == pytest.approx(parameters, rel=0.02)
    assert flops * 0.98 < cost.flops < flops * 1.25


def test_published_ratios_come_out() -> None:
    assert SWITCH.parameters / BASE.parameters == pytest.approx(33, abs=0.5)
    assert SWITCH.flops / BASE.flops == pytest.approx(1, abs=0.02)
    assert SWITCH.parameters / LARGE.parameters == pytest.approx(10, abs=0.2)
    assert SWITCH.flops / LARGE.flops == pytest.approx(0.29, abs=0.015)
    assert 100 < TRILLION.parameters / XXL.parameters < 150
    assert 0.1 < TRILLION.flops / XXL.flops < 0.16
    per_parameter = (TRILLION.flops / XXL.flops) / (TRILLION.parameters / XXL.parameters)
    assert per_parameter == pytest.approx(0.001, rel=0.12)
    assert WIDE.flops / WIDE.parameters < 1e-3


def test_the_face_network_has_five_thousand_million_parameters() -> None:
    (face,) = compare(["iResNet-50, 10⁷ identities"])
    assert face.cost.parameters == pytest.approx(5.1e9, rel=0.015)
    assert face.flops_per_parameter < 5


def test_the_scene_network_is_all_activations() -> None:
    (scene,) = compare(["U-Net ResNet-18, 30000 x 30000 x 4"])
    assert scene.cost.parameters < 20e6
    assert 4 * scene.cost.activations > 0.5e12
    assert scene.cost.flops == pytest.approx(168e9 * 900, rel=0.15)  # 168 GFLOP a megapixel, measured apart


def test_the_page_in_the_docs_is_what_the_code_says() -> None:
    assert (Path(__file__).parents[2] / "docs" / "comparison.md").read_text() == page()


def test_quantities() -> None:
    assert [quantity(v) for v in (5.12e9, 999, 1.571e12)] == ["5.12 G", "999 ", "1.57 T"]
