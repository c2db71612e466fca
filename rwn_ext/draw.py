"""Initial values drawn from a seed, bit for bit the same on every machine, so that a seed can stand for them.

Layout, version 1. Element i (in C order) of the tensor called `name` is made from word i of a stream of 32-bit words of
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):

* key = (seed mod 2^32, seed div 2^32), with 0 <= seed < 2^64
* stream = the first 8 bytes of SHA-256 of `name` in UTF-8, as a little-endian integer
* word i = word (i mod 4) of the block with counter (b mod 2^32, b div 2^32, stream mod 2^32, stream div 2^32), where
  b = i div 4
* uniform in (-bound, bound): ((word + 0.5) * 2^-31 - 1) * bound
* normal, he: std * z((word + 0.5) * 2^-32), z the inverse of the normal distribution function by Wichura's rational
  approximations (1988, algorithm AS 241, PPND7: 7 digits). In the tails they take sqrt(-log p); the logarithm is made
  of the exponent of p and a series of its mantissa, the square root by five of Heron's steps.
* signed: std if word >= 2^31, else -std
* orthogonal: normal values in a (K, C R S) matrix, transposed if it has more rows than columns, whose rows are made
  orthonormal one after the other (modified Gram-Schmidt, twice) and multiplied by sqrt(2); sums add the second half of
  the (zero-padded to a power of two) terms to the first until one is left.

All of it is float64 arithmetic of single + - * /, each rounded once as IEEE 754 demands, then one rounding to float32
and, for another dtype, one more. No value depends on a library's `log`, `cos` or `sqrt`, which differ between machines,
nor on the values of other tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rwn_ext.partial_layer import PartialLayer

VERSION = 1
INITS = ("uniform", "normal", "he", "orthogonal", "signed")
# Blocks of four words drawn at once: their temporaries stay in a core's cache.
_CHUNK = 1 << 13
_MASK = 0xFFFFFFFF


def draw_(model: nn.Module, seed: int, *, init: str = "uniform", layers: Iterable[str] | None = None) -> nn.Module:
    """Gives convolutions and linear layers new initial values, drawn from `seed` and the layers' names alone.

    Args:
        init: of convolution weights; biases and linear layers are uniform in any case. fan_in is C R S.
            "uniform": PyTorch's default, U(-b, b), b = 1 / sqrt(fan_in);
            "normal": N(0, std), std = sqrt(2 / (K R S)), He's by fan-out;
            "he": N(0, std), std = sqrt(2 / fan_in), `nn.init.kaiming_normal_`;
            "orthogonal": sqrt(2) times a matrix (K, C R S) of orthonormal rows (or columns, if K is greater), as
            `nn.init.orthogonal_` makes them; slow for the widest layers;
            "signed": std = sqrt(2 / fan_in) with a random sign (Ramanujan et al. 2019).
        layers: names of the layers to draw; default: all.

    Other layers stay as they are, and so does torch's global generator. Fixed filters of `frozen="zero"` stay zero.
    Returns the model. Raises ValueError for a seed outside 0..2^64 - 1 and an unknown `init`.
    """
    wanted = None if layers is None else set(layers)
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Conv1d, nn.Linear, PartialLayer)) or (
            wanted is not None and name not in wanted
        ):
            continue
        prefix = f"{name}." if name else ""
        shape = module.weight.shape
        weight = draw(seed, prefix + "weight", shape, init=init)
        bias = None if module.bias is None else draw(seed, prefix + "bias", shape[:1], weight_shape=shape, init=init)
        if isinstance(module, PartialLayer):
            module.set_initial_(weight, bias)
            continue
        with torch.no_grad():
            for parameter, value in ((module.weight, weight), (module.bias, bias)):
                if parameter is not None and value is not None:
                    parameter.copy_(value)
    return model


def draw(
    seed: int, name: str, shape: tuple[int, ...], *, weight_shape: tuple[int, ...] | None = None, init: str = "uniform"
) -> Tensor:
    """The float32 initial values of the weight `name`, or of a bias, whose weight's shape is then `weight_shape`."""
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {', '.join(INITS)}")
    weight_shape = tuple(shape) if weight_shape is None else tuple(weight_shape)
    count = math.prod(shape)
    if init != "uniform" and len(shape) > 2:
        k, c, taps = shape[0], shape[1], math.prod(shape[2:])
        std = math.sqrt(2 / (k * taps if init == "normal" else c * taps))
        if init == "signed":
            return _fill(seed, name, count, lambda words: torch.where(words >= 2.0**31, std, -std)).view(shape)
        if init == "orthogonal":
            matrix = _fill(seed, name, count, _normal).view(k, -1).double()
            rows = _orthonormal(matrix) if k <= matrix.size(1) else _orthonormal(matrix.t().contiguous()).t()
            return (rows * math.sqrt(2)).float().reshape(shape)
        return _fill(seed, name, count, lambda words: _normal(words) * std).view(shape)
    bound = 1 / math.sqrt(math.prod(weight_shape[1:]))
    return _fill(seed, name, count, lambda words: ((words + 0.5) * 2.0**-31 - 1) * bound).view(shape)


def _fill(seed: int, name: str, count: int, values: Callable[[Tensor], Tensor]) -> Tensor:
    result = torch.empty(count, dtype=torch.float32, device="cpu")
    for start in range(0, count, 4 * _CHUNK):
        blocks = min(_CHUNK, -(-(count - start) // 4))
        words = philox(seed, name, start // 4, blocks).double()
        result[start : start + 4 * blocks] = values(words)[: count - start]
    return result


def philox(seed: int, name: str, start: int, blocks: int) -> Tensor:
    """The 32-bit words of some blocks of the stream of `name`, from block `start` on: (4 * blocks,) int64."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} is outside 0..2^64 - 1")
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    block = torch.arange(start, start + blocks, dtype=torch.int64, device="cpu")
    counter = (block & _MASK, block >> 32, stream & _MASK, stream >> 32)
    zero = torch.zeros_like(block)
    words = philox_rounds([part + zero for part in counter], (seed & _MASK, seed >> 32))
    return torch.stack(words, 1).flatten()


def philox_rounds(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 of four tensors of 32-bit words in int64, whose products wrap around at 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def _normal(words: Tensor) -> Tensor:
    """Standard normal values of 32-bit words in float64."""
    q = (words + 0.5) * 2.0**-32 - 0.5
    r = 0.180625 - q * q
    result = q * _rational(r, _CENTRE)
    (tail,) = torch.where(r < 0)
    side = torch.where(q[tail] < 0, -1.0, 1.0).to(q.dtype)
    r = _sqrt(-_log(0.5 - q[tail] * side))
    result[tail] = side * _rational(r - 1.6, _TAIL)
    return result


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows that span what these span, in float64. Twice: the first pass leaves what rounding leaves."""
    for _ in range(2):
        for i in range(rows.size(0)):
            rows[i] /= math.sqrt(_sums(rows[i] * rows[i]).item())
            rest = rows[i + 1 :]
            rest -= _sums(rest * rows[i])[:, None] * rows[i]
    return rows


def _sums(terms: Tensor) -> Tensor:
    """The sums over the last axis, in an order that no machine chooses."""
    terms = torch.nn.functional.pad(terms, (0, (1 << (terms.size(-1) - 1).bit_length()) - terms.size(-1)))
    while terms.size(-1) > 1:
        half = terms.size(-1) // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def _rational(x: Tensor, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    return _polynomial(x, coefficients[0]) / _polynomial(x, coefficients[1])


# Of the numerator and the denominator. 32-bit words never reach the algorithm's third pair, for p < 1.4e-11.
_CENTRE = (
    (3.3871327179, 50.434271938, 159.29113202, 59.109374720),
    (1.0, 17.895169469, 78.757757664, 67.187563600),
)
_TAIL = ((1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103), (1.0, 0.73700164250, 0.12021132975))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * x
        result = result + coefficient
    return result


def _log(x: Tensor) -> Tensor:
    """The natural logarithm of normal positive float64 numbers, to some 1e-12."""
    mantissa, exponent = torch.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = torch.where(low, mantissa * 2, mantissa)
    exponent = exponent.to(x.dtype) - low.to(x.dtype)
    s = (mantissa - 1) / (mantissa + 1)
    series = _polynomial(s * s, tuple(1 / n for n in range(1, 16, 2)))
    return exponent * 0.6931471805599453 + s * series * 2


def _sqrt(x: Tensor) -> Tensor:
    """The square root of numbers in 2..24, to the last bit or the one before."""
    root = x * 0.17 + 0.9
    for _ in range(5):
        root = (root + x / root) * 0.5
    return root
