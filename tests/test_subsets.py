"""What `trainable` means: fractions, counts, indices, masks, policies, and every way to get it wrong."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rwn_ext.subsets import Subset, choose, parse, run_indices


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_runs_hold_the_indices_and_the_complement_the_others(case):
    size, chosen = case
    subset = choose(sorted(chosen, reverse=True), size)
    others = sorted(set(range(size)) - chosen)
    assert subset.indices == tuple(sorted(chosen)) and len(subset) == len(chosen)
    assert subset.complement.indices == tuple(others)
    assert subset.is_empty == (not chosen) and subset.is_full == (not others)
    starts, stops = subset.runs[::2], subset.runs[1::2]
    assert all(stop < start for stop, start in zip(stops, starts[1:], strict=False)), "runs are not maximal"


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        (0.0, []),
        (1.0, list(range(10))),
        (0.25, [8, 9]),
        (0.29, [8, 9]),
        (np.float32(0.5), [5, 6, 7, 8, 9]),
        (0, []),
        (1, [9]),
        (10, list(range(10))),
        (np.int64(3), [7, 8, 9]),
        ([], []),
        ([5, 2], [2, 5]),
        ((3,), [3]),
        (range(4, 7), [4, 5, 6]),
        ({7, 1}, [1, 7]),
        (np.array([4, 0]), [0, 4]),
        (torch.tensor([6, 5]), [5, 6]),
        (torch.tensor([3], dtype=torch.uint8), [3]),
        ([False] * 9 + [True], [9]),
        (torch.arange(10) % 5 == 0, [0, 5]),
        (np.arange(10) > 7, [8, 9]),
        (torch.zeros(10, dtype=torch.bool), []),
        (torch.tensor(3), [7, 8, 9]),
        (torch.tensor(0.25), [8, 9]),
        (np.array(1), [9]),
    ],
    ids=repr,
)
def test_every_kind_of_choice(trainable, expected):
    assert list(choose(trainable, 10).indices) == expected


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.29, 0.3, 0.7, 0.9, 1 / 3])
@pytest.mark.parametrize("size", [1, 3, 10, 16, 100, 640])
def test_fraction_is_int_of_the_product(size, fraction):
    assert len(choose(fraction, size)) == int(size * fraction)


@pytest.mark.parametrize(
    ("trainable", "error", "named"),
    [
        (True, TypeError, "True"),
        (False, TypeError, "False"),
        (None, TypeError, "None"),
        ("0.5", TypeError, "'0.5'"),
        (b"1", TypeError, "b'1'"),
        (1j, TypeError, "1j"),
        (bytearray(b"1"), TypeError, "bytearray"),
        ({1: 2}, TypeError, "{1: 2}"),
        (object, TypeError, "object"),
        (-1, ValueError, "-1"),
        (9, ValueError, "9"),
        (-0.1, ValueError, "-0.1"),
        (1.1, ValueError, "1.1"),
        (2.0, ValueError, "2.0"),
        (float("nan"), ValueError, "nan"),
        (float("inf"), ValueError, "inf"),
        ([3, 1, 3], ValueError, "3 twice"),
        ([-1], ValueError, "-1"),
        ([0, 8], ValueError, "8"),
        ([1.0], TypeError, "1.0"),
        ([float("nan")], TypeError, "nan"),
        (["1"], TypeError, "'1'"),
        ([None], TypeError, "None"),
        ([[1, 2]], TypeError, r"\[1, 2\]"),
        ([0, True], TypeError, "True"),
        (torch.tensor([0.5]), TypeError, "0.5"),
        (torch.tensor(True), TypeError, "True"),
        (np.True_, TypeError, "True"),
        ([True] * 7, ValueError, "7"),
        (torch.ones(9, dtype=torch.bool), ValueError, "9"),
        (torch.ones(0, dtype=torch.bool), ValueError, "0"),
        (np.ones(0, dtype=bool), ValueError, "0"),
    ],
    ids=repr,
)
def test_wrong_choices_are_refused_by_name(trainable, error, named):
    with pytest.raises(error, match=named) as caught:
        choose(trainable, 8, what="trainable_inputs")
    assert "trainable_inputs" in str(caught.value)


def test_policies():
    assert choose(3, 8, policy="last").indices == (5, 6, 7)
    assert choose(3, 8, policy="first").indices == (0, 1, 2)
    with pytest.raises(ValueError, match="'biggest'"):
        choose(3, 8, policy="biggest")
    with pytest.raises(ValueError, match="magnitude"):
        choose(3, 8, policy="magnitude")
    with pytest.raises(ValueError, match="meta"):
        choose(3, 8, policy="magnitude", weight=torch.empty(8, 2, device="meta"))


def test_random_follows_its_seed_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    chosen = choose(20, 100, policy="random", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(chosen) == 20 and chosen != choose(20, 100, policy="last")
    assert chosen == choose(20, 100, policy="random", seed=1)
    assert chosen != choose(20, 100, policy="random", seed=2)
    generator = torch.Generator().manual_seed(1)
    assert (
        chosen == choose(20, 100, policy="random", seed=generator) != choose(20, 100, policy="random", seed=generator)
    )
    torch.manual_seed(3)
    unseeded = choose(20, 100, policy="random")
    torch.manual_seed(3)
    assert unseeded == choose(20, 100, policy="random")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_takes_the_largest_norms_along_its_axis(dtype):
    weight = torch.full((4, 3, 2, 2), 0.5, dtype=dtype)
    weight[2] = -3  # filters 2, then 0
    weight[0, 1] = 2  # input channels 1, then 0 and 2 alike: the first of them
    assert choose(2, 4, policy="magnitude", weight=weight, axis=0).indices == (0, 2)
    assert choose(2, 3, policy="magnitude", weight=weight, axis=1).indices == (0, 1)
    assert choose([3], 4, policy="magnitude", weight=weight).indices == (3,)


def test_command_line_numbers():
    assert parse("1") == 1 and isinstance(parse("1"), int)
    assert parse("1.0") == 1.0 and isinstance(parse("1.0"), float)
    assert parse("1e-1") == 0.1
    with pytest.raises(ValueError, match="'half'"):
        parse("half")


def test_runs_need_not_be_many():
    assert Subset.full(10**6).runs == (0, 10**6)
    assert Subset.empty(3).complement == Subset.full(3)
    assert run_indices((1, 3, 5, 6)) == (1, 2, 5)
