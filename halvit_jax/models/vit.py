"""Vision transformers of one width: DeiT (Touvron et al., 2021) and HaLViT.

    x = patches + position;  x += attention(norm(x));  x += ffn(norm(x));  ...;  logits = head(norm(x) pooled)

Shapes: `b` batch, `h w` space, `n` tokens, `d` width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.attention import ATTENTION
from halvit_jax.layers.drop import DropPath, linear_rates
from halvit_jax.layers.embed import POSITIONS, PatchEmbed, Position
from halvit_jax.layers.ffn import FFN, Compact
from halvit_jax.layers.fused_attention import CHOICES
from halvit_jax.layers.initializers import Dtype, normal_02
from halvit_jax.layers.sow import keep
from halvit_jax.models.validation import check_choice, check_compact, check_divides

EPSILON = 1e-6  # of every LayerNorm; Flax's default, PyTorch's is 1e-5
POOLS = ("token", "mean")


class Block(nn.Module):
    """Pre-norm transformer block, [b, n, d] -> [b, n, d]; which attention and which FFN are named by fields."""

    width: int
    num_heads: int
    hidden: int
    attention: str  # a key of ATTENTION
    ffn: str  # a key of FFN
    attention_bias: bool
    real_heads: float
    hallucinate: str  # one of HALLUCINATE
    attention_impl: str  # one of CHOICES
    compact: Compact
    drop_path: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        attention = ATTENTION[self.attention](
            self.width,
            self.num_heads,
            bias=self.attention_bias,
            real_heads=self.real_heads,
            hallucinate=self.hallucinate,
            attention_impl=self.attention_impl,
            dtype=self.dtype,
            name="attention",
        )
        ffn = FFN[self.ffn](self.width, self.hidden, compact=self.compact, dtype=self.dtype, name="ffn")
        drop = DropPath(self.drop_path, name="drop_path")
        x = x + drop(attention(nn.LayerNorm(EPSILON, dtype=self.dtype, name="attention_norm")(x)), train=train)
        x = x + drop(ffn(nn.LayerNorm(EPSILON, dtype=self.dtype, name="ffn_norm")(x), train=train), train=train)
        keep(self, "hidden", x)
        return x


class VisionTransformer(nn.Module):
    """A plain ViT whose blocks are dense (DeiT), tied (HaLViT) or compact, with hallucinated attention maps (`_hc`).

    `halvit_tiny` and `halvit_small` are our reading of the paper's T and M. Neither its text nor its code states the
    width, depth, heads, biases, positions or recipe of the ViT. We take the shapes of DeiT-S and DeiT-B with class
    token, learned positions, both FFN biases and no attention bias, since the formulas show none. That gives
    11,030,400 and 43,294,464 parameters without the classifier, where the paper reports 11.1M and 43.0M: 0.6 % below
    and 0.7 % above. No shape of this kind hits both figures at once; both equal half of the published sizes of the
    untied models (22.1M and 86M), which is the likeliest origin of the reported ones.

    Args:
        num_classes: size of the head; 0 leaves it out and returns the pooled features.
        image_size: height and width of the (square) images; a multiple of `patch_size`.
        attention: "full" or "tied".
        ffn: "dense" or "tied".
        real_heads: share of the heads with queries and keys of their own, rounded up; the maps of the others are
            hallucinated from theirs, see `AttentionMaps`.
        hallucinate: what of the real heads they are made from, "logits" or "maps".
        attention_impl: "xla", or "fused": without the maps in memory; "auto": fused where it can be, see `attend`.
        ffn_rank: rank of the FFNs' second matrix as a share of the width; below 1 it is two matrices, see
            `CompactDense`. Needs `ffn` "dense".
        ffn_branches: the products in the sum that each of the two is in training.
        pool: what the head sees: the class "token", or the "mean" over the image's tokens (and then no such token).
        distilled: a second token and a second classifier, for the words of a teacher (DeiT, section 4); the logits are
            the mean of both classifiers'. Needs `pool` "token".
        position: "learned", "sincos" (fixed; `width` a multiple of 4) or "none".
        drop_path: stochastic depth of the last block; the others' rates rise to it linearly from 0.
        remat: recompute each block in the backward pass instead of keeping its activations.
        dtype: the type to compute in. Parameters, softmax and logits are float32 whatever it is.
        folded: for inference alone, with the variables of `models.fold`.
    """

    num_classes: int = 1000
    image_size: int = 224
    patch_size: int = 16
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    ffn_ratio: float = 4.0
    attention: str = "full"
    ffn: str = "dense"
    attention_bias: bool = True
    real_heads: float = 1.0
    hallucinate: str = "logits"
    attention_impl: str = "auto"
    ffn_rank: float = 1.0
    ffn_branches: int = 2
    pool: str = "token"
    distilled: bool = False
    position: str = "learned"
    drop_path: float = 0.0
    remat: bool = False
    dtype: Dtype = jnp.float32
    folded: bool = False

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ATTENTION)
        check_choice("ffn", self.ffn, FFN)
        check_choice("attention_impl", self.attention_impl, CHOICES)
        check_choice("pool", self.pool, POOLS)
        check_choice("position", self.position, POSITIONS)
        if self.distilled and self.pool != "token":
            raise ValueError(f"model.distilled=True needs model.pool='token', not {self.pool!r}")
        if self.depth < 1:
            raise ValueError(f"model.depth={self.depth} must be at least 1")
        check_divides("num_heads", self.num_heads, "width", self.width)
        check_divides("patch_size", self.patch_size, "image_size", self.image_size)
        if self.position == "sincos" and self.width % 4:
            raise ValueError(f"model.width={self.width} must be a multiple of 4 when model.position='sincos'")
        if self.width * self.ffn_ratio < 1:
            raise ValueError(f"model.ffn_ratio={self.ffn_ratio} leaves nothing of model.width={self.width}")
        check_compact(self.real_heads, self.hallucinate, self.ffn_rank, self.ffn_branches)
        if self.ffn != "dense" and self.ffn_rank != 1.0:
            raise ValueError(f"model.ffn_rank={self.ffn_rank} needs model.ffn='dense', not {self.ffn!r}")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"model.drop_path={self.drop_path} must lie in [0, 1)")
        super().__post_init__()

    def setup(self) -> None:
        self.embed = PatchEmbed(self.width, self.patch_size, dtype=self.dtype)
        if self.pool == "token":
            self.class_token = self.param("class_token", normal_02, (self.width,))
        if self.distilled:
            self.distill_token = self.param("distill_token", normal_02, (self.width,))
        self.add_position = Position(self.position, self._grid, name="position")
        self.blocks = self._make_blocks()
        self.norm = nn.LayerNorm(EPSILON, dtype=self.dtype)
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=normal_02, dtype=self.dtype)
            if self.distilled:
                self.head_distill = nn.Dense(self.num_classes, kernel_init=normal_02, dtype=self.dtype)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Normalised images [b, h, w, 3] -> float32 logits [b, num_classes], or pooled features [b, d]."""
        heads = self.heads(images, train=train)
        return (heads["class"] + heads["distill"]) / 2 if self.distilled else heads["class"]

    def heads(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """What each classifier answers: {"class": float32 logits [b, num_classes]}, and "distill" where distilled.

        Without classifiers, the features [b, d] that each would see.
        """
        x = self._tokens(images, train)
        out = {"class": x[:, 0] if self.pool == "token" else x.mean(axis=1)}
        if self.distilled:
            out["distill"] = x[:, 1]
        if self.num_classes:
            out["class"] = self.head(out["class"])
            if self.distilled:
                out["distill"] = self.head_distill(out["distill"])
        return {name: answer.astype(jnp.float32) for name, answer in out.items()}

    def features(self, images: jax.Array, *, train: bool) -> dict[int, jax.Array]:
        """Normalised images [b, h, w, 3] -> {patch_size: [b, h / patch_size, w / patch_size, d]}."""
        x = self._tokens(images, train)
        x = x[:, x.shape[1] - math.prod(self._grid) :]
        return {self.patch_size: x.reshape(x.shape[0], *self._grid, -1)}

    @property
    def _grid(self) -> tuple[int, int]:
        return (self.image_size // self.patch_size,) * 2

    def _make_blocks(self) -> list[nn.Module]:
        """The blocks in their order, each called as block(x, train)."""
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        return [
            block(
                width=self.width,
                num_heads=self.num_heads,
                hidden=round(self.width * self.ffn_ratio),
                attention=self.attention,
                ffn=self.ffn,
                attention_bias=self.attention_bias,
                real_heads=self.real_heads,
                hallucinate=self.hallucinate,
                attention_impl=self.attention_impl,
                compact=Compact(self.ffn_rank, self.ffn_branches, self.folded),
                drop_path=rate,
                dtype=self.dtype,
                name=f"block{i}",
            )
            for i, rate in enumerate(linear_rates(self.drop_path, self.depth))
        ]

    def _tokens(self, images: jax.Array, train: bool) -> jax.Array:
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} for a model built for {self.image_size}x"
                f"{self.image_size}; set model.image_size"
            )
        x = self.embed(images)  # [b, n, d]
        if self.pool == "token":
            tokens = [self.class_token, self.distill_token] if self.distilled else [self.class_token]
            tokens = jnp.stack(tokens).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)), x], axis=1)
        x = self.add_position(x)
        for block in self.blocks:
            x = block(x, train)
        return self.norm(x)


TIED = {"attention": "tied", "ffn": "tied", "attention_bias": False}
HALF_THE_MAPS = {"real_heads": 0.5}
HC = HALF_THE_MAPS | {"ffn_rank": 0.5}  # hallucinated attention and compact feed-forward layers
TINY = {"width": 192, "num_heads": 3}
SMALL = {"width": 384, "num_heads": 6}
BASE = {"width": 768, "num_heads": 12}

SIZES: dict[str, dict[str, Any]] = {
    "halvit_tiny": SMALL | TIED,  # the paper's T has the shape of DeiT-S
    "halvit_small": BASE | TIED,
    "deit_tiny": TINY,
    "deit_small": SMALL,
    "deit_base": BASE,
    "deit_tiny_distilled": TINY | {"distilled": True},
    "deit_small_distilled": SMALL | {"distilled": True},
    "deit_base_distilled": BASE | {"distilled": True},
    "deit_tiny_hc": TINY | HC,
    "deit_small_hc": SMALL | HC,
    "deit_base_hc": BASE | HC,
    "halvit_tiny_h": SMALL | TIED | HALF_THE_MAPS,  # two savings that nobody has published together
    "halvit_small_h": BASE | TIED | HALF_THE_MAPS,
}

# A tied kernel has one rule for both of its uses: split on f, its second dimension. Both axes split that one dimension,
# `tensor` outermost, so that gathering the parts of `fsdp` gives whole parts of `tensor`. (Where they split two, XLA of
# jax 0.10 permutes the rows of a product on a mesh of three axes, cf. openxla/xla#40034; tests/training/test_mesh.py.)
SPLIT = ("tensor", "fsdp")
PARTITION_RULES = (
    (r"(qkv|expand|head(_distill)?|tied|query_output|key_value|second\d*(/dense)?)/kernel$", (None, SPLIT)),
    (r"(output|reduce|first\d*(/dense)?)/kernel$", (SPLIT, None)),
    (r"embed/kernel$", (None, None, None, "fsdp")),
    (r"(bias|scale|mean|var|class_token|distill_token|embedding|across|within)$", ()),
)


TRANSFER_RULES = ((r"^head(_distill)?/", "head"), (r"^position/embedding$", "grid"), (r"^embed/kernel$", "colours"))
