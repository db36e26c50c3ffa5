"""Dead leaves: of mean 0 and deviation 1, with the spectrum and the colours of photographs."""

import pytest
import torch
from foldcut.compiler.synthesis.natural_images import ImageForm, dead_leaves


def leaves(count: int = 24, form: ImageForm | None = None, seed: int = 0) -> torch.Tensor:
    return dead_leaves(count, form or ImageForm(3, 32, 32), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "form", [ImageForm(3, 32, 32), ImageForm(1, 16, 24), ImageForm(4, 9, 8)], ids=lambda f: str(f.channels)
)
def test_they_are_standardised_whatever_the_form(form: ImageForm) -> None:
    found = leaves(form=form)
    assert found.shape == (24, form.channels, form.height, form.width)
    assert found.dtype == torch.float32
    assert torch.allclose(found.mean((0, 2, 3)), torch.zeros(form.channels), atol=1e-4)
    assert torch.allclose(found.std((0, 2, 3)), torch.ones(form.channels), atol=1e-3)


def test_the_generator_alone_decides() -> None:
    assert torch.equal(leaves(4), leaves(4))
    assert not torch.equal(leaves(4), leaves(4, seed=1))
    assert len({float(image.sum()) for image in leaves(4)}) == 4


def test_neighbours_are_alike_and_far_pixels_less() -> None:
    """White noise would have differences of 2 everywhere."""
    found = leaves(48, ImageForm(3, 48, 48))
    near, far = ((found[..., step:] - found[..., :-step]).square().mean() for step in (1, 16))
    assert near < 0.6 < far < 2


def test_large_patterns_hold_most_of_the_power() -> None:
    power = torch.fft.rfft2(leaves(48)).abs().square().mean((0, 1))
    slow, fast = power[1:4, 1:4].mean(), power[12:16, 12:16].mean()
    assert slow > 30 * fast


def test_colours_vary_together() -> None:
    pixels = leaves(48).permute(1, 0, 2, 3).reshape(3, -1)
    together = torch.corrcoef(pixels)
    assert 0.5 < float(together[0, 1]) < 0.99
    assert 0.5 < float(together[1, 2]) < 0.99
