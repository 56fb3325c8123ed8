import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from halvit_jax.detection.heads import BoxHead, MaskHead, RetinaNetHead, RPNHead


@pytest.mark.parametrize(
    ("head", "shape", "count", "outputs"),
    [
        (RPNHead(), (2, 3, 4, 256), 593_935, [(2, 36), (2, 36, 4)]),
        (BoxHead(80), (5, 7, 7, 256), 14_306_705, [(5, 81), (5, 80, 4)]),
        (MaskHead(80), (5, 14, 14, 256), 2_643_280, [(5, 28, 28, 80)]),
        (RetinaNetHead(80), (2, 3, 4, 256), 6_463_220, [(2, 108, 80), (2, 108, 4)]),
    ],
)
def test_counts_and_shapes(head: nn.Module, shape: tuple[int, ...], count: int, outputs: list[tuple[int, ...]]) -> None:
    made = jax.eval_shape(lambda: head.init_with_output(jax.random.key(0), jnp.zeros(shape)))
    assert sum(leaf.size for leaf in jax.tree.leaves(made[1])) == count
    assert [leaf.shape for leaf in jax.tree.leaves(made[0])] == outputs


def test_an_anchor_is_its_row_column_and_number() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 4)), jnp.float32)
    head = RPNHead(4, anchors=2)
    variables = jax.jit(head.init)(jax.random.key(0), x)
    # The middle of a 3x3 kernel alone, so that a position sees itself.
    middle = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))
    variables["params"]["conv"]["kernel"] = middle
    logits, deltas = jax.jit(head.apply)(variables, x)
    params, x = jax.tree.map(np.asarray, (variables["params"], x))
    for row, column, k in np.ndindex(2, 3, 2):
        seen = np.maximum(x[0, row, column], 0)
        number = (row * 3 + column) * 2 + k
        np.testing.assert_allclose(logits[0, number], seen @ params["score"]["kernel"][0, 0, :, k], atol=1e-6)
        own = params["delta"]["kernel"][0, 0, :, 4 * k : 4 * k + 4]
        np.testing.assert_allclose(deltas[0, number], seen @ own, atol=1e-6)


def test_untrained_retinanet_expects_background() -> None:
    x = jnp.zeros((1, 2, 2, 8))
    logits, _ = jax.jit(RetinaNetHead(3, 8, 1).init_with_output)(jax.random.key(0), x)[0]
    np.testing.assert_allclose(jax.nn.sigmoid(logits), 0.01, rtol=1e-5)


@pytest.mark.parametrize("head", [RPNHead(8, dtype="bfloat16"), RetinaNetHead(3, 8, 1, dtype="bfloat16")])
def test_heads_in_bfloat16_put_out_float32(head: nn.Module) -> None:
    made = jax.eval_shape(lambda: head.init_with_output(jax.random.key(0), jnp.zeros((1, 2, 2, 8), jnp.bfloat16))[0])
    assert {leaf.dtype for leaf in made} == {jnp.dtype("float32")}
