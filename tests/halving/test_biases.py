"""Biases of an attention in the layers around a tied one."""

import numpy as np

from halvit_jax.halving import attention, biases

WIDTH = 6


def tied_attention(num_heads: int) -> tuple[attention.Heads, attention.TiedHeads]:
    a, c = np.random.default_rng(0).standard_normal((2, WIDTH, WIDTH))
    heads = attention.split(a, c, c.T, a.T, num_heads=num_heads)
    return heads, attention.TiedHeads(a, c, objective=[])


def test_a_shift_of_the_input_has_the_effect_of_the_query_bias() -> None:
    heads, tied = tied_attention(num_heads=1)
    bias, inputs = np.random.default_rng(1).standard_normal((2, WIDTH))
    shift = biases.norm_shift(tied, heads, bias, np.eye(WIDTH))
    keys = inputs @ tied.key_value
    np.testing.assert_allclose(shift @ tied.query_output @ keys, bias @ keys, rtol=1e-3)


def test_the_shift_is_the_best_of_several_heads() -> None:
    heads, tied = tied_attention(num_heads=3)
    bias = np.random.default_rng(1).standard_normal(WIDTH)
    centred = np.diag(np.arange(1.0, 1.0 + WIDTH))

    def left(shift: np.ndarray) -> float:
        rest = [
            np.sqrt(centred) @ tied.key_value[:, part] @ (tied.query_output[:, part].T @ shift - bias[part])
            for part in (slice(0, 2), slice(2, 4), slice(4, 6))
        ]
        return float(np.sum(np.square(rest)))

    shift = biases.norm_shift(tied, heads, bias, centred)
    rng = np.random.default_rng(2)
    assert all(left(shift) < left(shift + 0.1 * rng.standard_normal(WIDTH)) for _ in range(20))


def test_a_query_bias_moves_to_other_bases_of_the_heads() -> None:
    heads, tied = tied_attention(num_heads=2)
    bases = np.random.default_rng(3).standard_normal((2, 3, 3))
    rotated = heads._replace(query=heads.query @ bases, key=heads.key @ np.linalg.inv(bases).transpose(0, 2, 1))
    bias = np.random.default_rng(1).standard_normal(WIDTH)
    given = np.concatenate([part @ base for part, base in zip(bias.reshape(2, 3), bases, strict=True)])
    np.testing.assert_allclose(biases.query_bias(tied, rotated, given, np.eye(WIDTH)), bias, rtol=1e-3)


def test_a_shift_of_all_inputs_adds_a_constant_to_the_output() -> None:
    heads, tied = tied_attention(num_heads=2)
    shift = np.random.default_rng(1).standard_normal(WIDTH)
    parts = [shift @ value @ output.T for value, output in zip(heads.value, heads.output, strict=True)]
    np.testing.assert_allclose(biases.shift_output(tied, shift), sum(parts))
