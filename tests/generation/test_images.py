"""The resize rule, and pixels in and out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import noise, pixels

from lowmem_bagel.checkpoint.config import PUBLISHED_MAX_PIXELS, ResizeRule
from lowmem_bagel.generation.images import from_pixels, in_range, resize, to_bytes

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


@pytest.mark.parametrize("size", [(600, 500), (1000, 517), (3, 200_000)])
def test_a_picture_resized_in_parts_is_the_same(size: tuple[int, int]) -> None:
    """Smaller and larger; of a very slender one Pillow changes the height first."""
    shown = Image.fromarray(noise(size[1], size[0]))
    for side in (64, 560, 1024):
        rule = ResizeRule(side, 16, 8)
        assert rule.resized(*size) != size
        assert resize(shown, rule).tobytes() == shown.resize(rule.resized(*size), Image.Resampling.BICUBIC).tobytes()


class TestPixels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_is_the_arithmetic_of_every_value(self, dtype: torch.dtype) -> None:
        """Step by step in float32, and rounded once: what is looked up has the same bits."""
        values = in_range(to_bytes(Image.fromarray(noise())), dtype)
        assert values.shape == (6, 9, 3) and values.is_contiguous()
        assert values.equal(((torch.from_numpy(noise()).float() / 255 - 0.5) / 0.5).to(dtype))

    @pytest.mark.gpu
    def test_a_card_gives_the_bits_of_the_processor(self) -> None:
        values = torch.arange(256, dtype=torch.uint8)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert in_range(values.cuda(), dtype).cpu().equal(in_range(values, dtype))

    def test_out_clamps_and_truncates(self) -> None:
        values = torch.tensor([-3.0, -1.0, -1 + 1.99 / 127.5, 0.0, 1.0, 7.0]).expand(3, 1, 6)
        assert pixels(from_pixels(values))[0, :, 0].tolist() == [0, 0, 1, 127, 255, 255]
