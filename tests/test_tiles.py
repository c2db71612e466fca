"""How work is cut: every pixel in exactly one split, partial sums within their bound, grids that a GPU can launch."""

from hypothesis import given
from hypothesis import strategies as st

from rwn_ext.kernels import tiles

PIXELS = st.one_of(st.integers(1, 5000), st.integers(1, 2**31 - 1 - 1024))
OPERANDS = st.builds(tiles.Operands, st.sampled_from([2, 4]), st.booleans(), st.booleans())
CHIPS = st.sampled_from([(108, 80), (132, 90), (148, 100), (1, 86)])


def assert_each_pixel_once(pixels: int, splits: int, split_pixels: int) -> None:
    """Splits tile [0, pixels): the first begins it, each next begins where the last ends, none is empty."""
    assert (splits - 1) * split_pixels < pixels <= splits * split_pixels


@given(PIXELS, st.integers(1, 4096), st.integers(1, 4096), st.sampled_from([1, 2, 32, 512]), OPERANDS, CHIPS)
def test_splits_cover_each_pixel_once_within_bounds(pixels, channels, columns, groups, operands, chip):
    plan = tiles.cut(pixels, channels, columns, groups, operands, multiprocessors=chip[0], arch=chip[1])
    assert_each_pixel_once(pixels, plan.splits, plan.split_pixels)
    assert plan.split_pixels % plan.shape.block_pixels == 0
    assert plan.shape in tiles.shipped(operands, chip[1])
    x, y, z = tiles.grid(plan, channels, columns, groups)
    assert x * plan.shape.block_columns >= columns and y * plan.shape.block_channels >= channels
    assert z == groups * plan.splits <= 65535 and y <= 65535
    if plan.splits > 1:
        workspace = 4 * plan.splits * groups * channels * columns
        assert workspace <= max(tiles.WORKSPACE_BYTES, operands.element_size * groups * pixels * channels // 4)
        assert pixels >= plan.splits * tiles.SPLIT_PIXELS


@given(PIXELS, st.integers(1, 4096), st.integers(1, 121), CHIPS)
def test_depthwise_splits_cover_each_pixel_once(pixels, learned, taps, chip):
    plan = tiles.cut_depthwise(pixels, learned, taps, multiprocessors=chip[0])
    assert_each_pixel_once(pixels, plan.splits, plan.split_pixels)
    assert plan.split_pixels % plan.block_pixels == 0 and plan.splits <= 65535


@given(st.integers(1, 4096))
def test_the_depth_holds_the_filters_and_can_be_loaded_whole(learned):
    depth = tiles.depth(learned)
    assert learned <= depth < max(2 * learned, learned + 8) + 1 and (depth % 8 == 0 or depth in tiles.DEPTHS)


def test_a_wide_image_is_split_among_all_multiprocessors():
    plan = tiles.cut(128 * 32 * 32, 160, 72, 1, tiles.Operands(2), multiprocessors=132, arch=90)
    blocks = tiles.grid(plan, 160, 72, 1)
    assert 132 <= blocks[0] * blocks[1] * blocks[2] <= 264
