import pytest
import torch

from bigvision.gating import Noise, normalize, top_k

KINDS = ["gaussian", "gumbel", "jitter"]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_a_function_of_seed_step_and_token(kind: str) -> None:
    noise = Noise(kind, 0.5)  # type: ignore[arg-type]
    logits = torch.randn(6, 4)
    base = noise.perturb(logits, step=3)
    assert torch.equal(base, noise.perturb(logits, step=3))
    assert (noise.perturb(logits, step=4) != base).all()
    assert (Noise(kind, 0.5, seed=1).perturb(logits, step=3) != base).all()  # type: ignore[arg-type]
    ids = torch.tensor([5, 2])
    assert torch.equal(noise.perturb(logits[ids], step=3, token_ids=ids), base[ids])


@pytest.mark.parametrize("kind", KINDS)
def test_no_scale_is_no_noise_and_no_token_is_fine(kind: str) -> None:
    logits = torch.randn(5, 3)
    assert torch.equal(Noise(kind, 0.0).perturb(logits), logits)  # type: ignore[arg-type]
    assert Noise(kind).perturb(logits[:0]).shape == (0, 3)  # type: ignore[arg-type]


def test_gaussian_noise_has_deviation_scale_over_experts() -> None:
    drawn = Noise("gaussian", 2.0).perturb(torch.zeros(20000, 8))
    assert float(drawn.std()) == pytest.approx(2 / 8, rel=0.02)
    assert Noise("gaussian", 2.0).std(8) == 0.25


def test_jitter_stays_within_its_factor() -> None:
    drawn = Noise("jitter", 0.1).perturb(torch.ones(5000, 4))
    assert 0.9 <= drawn.min() < 0.901 and 1.099 < drawn.max() <= 1.1


def test_gumbel_noise_samples_from_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    picked = top_k(Noise("gumbel").perturb(logits.expand(40000, 4)), 1)
    torch.testing.assert_close(picked.float().mean(0), normalize(logits[None])[0], atol=0.012, rtol=0)


def test_gradients_pass_through() -> None:
    for kind in KINDS:
        logits = torch.ones(2, 3, requires_grad=True)
        noisy = Noise(kind, 0.1).perturb(logits)  # type: ignore[arg-type]
        noisy.sum().backward()
        expected = noisy.detach() if kind == "jitter" else torch.ones(2, 3)
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, expected)


def test_bad_input_is_refused_with_its_values() -> None:
    with pytest.raises(ValueError, match="'pink'"):
        Noise("pink")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least 0, got -1\.0"):
        Noise("gumbel", -1.0)
    with pytest.raises(ValueError, match="only Gaussian noise has a load loss, got 'jitter'"):
        Noise("jitter").std(4)
