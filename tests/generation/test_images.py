"""The resize rule, and pixels in and out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import noise, pixels

from lowmem_bagel.checkpoint.config import PUBLISHED_MAX_PIXELS, ResizeRule
from lowmem_bagel.generation.images import from_pixels, to_pixels

VAE_RULE, VIT_RULE = ResizeRule(1024, 512, 16), ResizeRule(980, 224, 14)


class TestResizeRule:
    def test_published_sizes(self) -> None:
        """Worked out by hand from the rule: scale to the limits, round to the stride."""
        assert VAE_RULE.resized(1024, 1024) == (1024, 1024)
        assert VAE_RULE.resized(2048, 1024) == (1024, 512)
        assert VAE_RULE.resized(100, 50) == (1024, 512)
        assert VAE_RULE.resized(640, 480) == (688, 512)  # 682.67 -> 683 -> 43 strides
        assert VIT_RULE.resized(1024, 1024) == (980, 980)

    def test_half_rounds_to_even(self) -> None:
        rule = ResizeRule(1000, 10, 10)
        assert rule.resized(25, 35) == (20, 40)

    def test_many_pixels_shrink_by_the_ratio_itself(self) -> None:
        """min_side forces 4 megapixels; both sides are then multiplied by 1806336 / pixels, not by its root."""
        rule = ResizeRule(4096, 2000, 16)
        width, height = rule.resized(2000, 2000)
        factor = PUBLISHED_MAX_PIXELS / 2000**2
        assert (width, height) == (round(round(2000 * factor) / 16) * 16,) * 2

    @pytest.mark.parametrize("rule", [VAE_RULE, VIT_RULE])
    def test_every_size_fits_the_position_table(self, rule: ResizeRule) -> None:
        generator = np.random.default_rng(1)
        for width, height in np.exp(generator.uniform(np.log(2), np.log(20000), (500, 2))).astype(int).tolist():
            for side in rule.resized(width, height):
                assert side % rule.stride == 0
                assert rule.stride <= side <= rule.max_side


class TestPixels:
    def test_in_and_out(self) -> None:
        values = to_pixels(Image.fromarray(noise()))
        assert values.dtype == torch.float32
        assert values.shape == (3, 6, 9)
        wanted = torch.from_numpy(noise()).permute(2, 0, 1).double() / 127.5 - 1
        assert (values.double() - wanted).abs().max() < 1e-6

    def test_out_clamps_and_truncates(self) -> None:
        values = torch.tensor([-3.0, -1.0, -1 + 1.99 / 127.5, 0.0, 1.0, 7.0]).expand(3, 1, 6)
        assert pixels(from_pixels(values))[0, :, 0].tolist() == [0, 0, 1, 127, 255, 255]
