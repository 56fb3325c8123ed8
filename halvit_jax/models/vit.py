"""Vision transformers of one width: DeiT and HaLViT.

- DeiT: Hugo Touvron, Matthieu Cord, Matthijs Douze, Francisco Massa, Alexandre Sablayrolles, Hervé Jégou, "Training
  data-efficient image transformers & distillation through attention", 2021, https://arxiv.org/abs/2012.12877.
- HaLViT: Onur Can Koyun, Behçet Uğur Töreyin, "HaLViT: Half of the Weights are Enough", CVPR Workshops 2024,
  https://doi.org/10.1109/CVPRW63382.2024.00370.

    x = patches + position;  x += attention(norm(x));  x += ffn(norm(x));  ...;  logits = head(norm(x) pooled)

Shapes: `b` batch, `h w` space, `n` tokens, `d` width, `p` patch size.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from halvit_jax.layers.attention import ATTENTION
from halvit_jax.layers.batch_norm import norms_in_evaluation
from halvit_jax.layers.block import PreNormBlock
from halvit_jax.layers.drop import linear_rates
from halvit_jax.layers.embed import POSITIONS, PatchEmbed, PositionEmbedding
from halvit_jax.layers.ffn import FFN, Compact, fold
from halvit_jax.layers.fused_attention import CHOICES
from halvit_jax.layers.initializers import Dtype, normal_02
from halvit_jax.layers.remat import run_block
from halvit_jax.models.family import Family, Fields, Published
from halvit_jax.models.partition import COLUMNS, FILTERS, ROWS, VECTORS
from halvit_jax.models.validation import check_channels, check_choice, check_compact, check_divides, check_rate

EPSILON = 1e-6  # of every LayerNorm; Flax's default, PyTorch's is 1e-5
POOLS = ("token", "mean")


class VisionTransformer(nn.Module):
    """A plain ViT whose blocks are dense (DeiT), tied (HaLViT) or compact, with hallucinated attention maps (`_hc`).

    `halvit_tiny` and `halvit_small` are our reading of the paper's T and M. Neither its text nor its code states the
    width, depth, heads, biases, positions or recipe of the ViT. We use the shapes of DeiT-S and DeiT-B with class
    token, learned positions, both FFN biases and no attention bias, because the formulas show none. That gives
    11,030,400 and 43,294,464 parameters without the classifier; the paper reports 11.1M and 43.0M (0.6 % more, 0.7 %
    less). No such shape matches both figures; both equal half of the published sizes of the untied models (22.1M and
    86M), the likeliest origin of the reported ones.

    Args:
        num_classes: size of the classifier; 0 leaves it out and returns the pooled features.
        image_size: height and width of the images to classify; a multiple of `patch_size`. `features` takes others.
        in_channels: channels of the images: 3 of colour, 1 of grey ones.
        attention: "full" or "tied".
        ffn: "dense" or "tied".
        real_heads: fraction of the heads with their own queries and keys, rounded up; the other maps are hallucinated
            from the real heads' "logits" or "maps" (`hallucinate`), see `AttentionMaps`.
        attention_impl: "xla", "fused" (without the maps in memory) or "auto" (fused if possible), see `attend`.
        ffn_impl: the same for the hidden activations of the feed-forward layers, see `layers.ffn.implementation`.
        ffn_rank: rank of the FFNs' second matrix as a fraction of the width; below 1 it is two matrices, in training
            each the sum of `ffn_branches`, see `CompactDense`. Needs `ffn` "dense".
        pool: input of the head: the class "token", or the "mean" over the image's tokens (without a class token).
        distilled: a second token and a second classifier, trained on the teacher's predictions (DeiT, section 4); the
            logits are the mean of both. Needs `pool` "token".
        position: "learned", "sincos" (fixed; `width` a multiple of 4) or "none".
        drop_path: stochastic depth of the last block; the others' rates rise to it linearly from 0.
        remat: recompute each block in the backward pass instead of keeping its activations.
        residual_float32: keep the sums of the residual branches in float32 while the branches compute in `dtype`.
        dtype: the type to compute in. Parameters, softmax and head are always float32.
        folded: for inference only, with the variables of `models.fold`.
    """

    num_classes: int = 1000
    image_size: int = 224
    in_channels: int = 3
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
    ffn_impl: str = "auto"
    ffn_rank: float = 1.0
    ffn_branches: int = 2
    pool: str = "token"
    distilled: bool = False
    position: str = "learned"
    drop_path: float = 0.0
    remat: bool = False
    residual_float32: bool = False
    dtype: Dtype = jnp.float32
    folded: bool = False

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ATTENTION)
        check_choice("ffn", self.ffn, FFN)
        check_choice("attention_impl", self.attention_impl, CHOICES)
        check_choice("ffn_impl", self.ffn_impl, CHOICES)
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
        check_rate("drop_path", self.drop_path)
        super().__post_init__()

    def setup(self) -> None:
        self.embed = PatchEmbed(self.width, self.patch_size, dtype=self.dtype)
        grid = (self.image_size // self.patch_size,) * 2
        self.add_position = PositionEmbedding(self.position, grid, len(self._names_before), name="position")
        self.blocks = self._make_blocks()
        self.norm = nn.LayerNorm(EPSILON, dtype=self.dtype)
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=normal_02, dtype=jnp.float32)
            if self.distilled:
                self.head_distill = nn.Dense(self.num_classes, kernel_init=normal_02, dtype=jnp.float32)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Normalised images [b, h, w, 3] -> float32 logits [b, num_classes], or pooled features [b, d]."""
        logits = self.head_logits(images, train=train)
        return (logits["class"] + logits["distill"]) / 2 if self.distilled else logits["class"]

    def head_logits(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """The logits of each classifier: {"class": float32 [b, num_classes]}, and "distill" if distilled.

        With `num_classes` 0, their inputs [b, d].
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} for a model built for {self.image_size}x"
                f"{self.image_size}; set model.image_size"
            )
        x = self._tokens(images, train, before=True)
        out = {"class": x[:, 0] if self.pool == "token" else x.mean(axis=1)}
        if self.distilled:
            out["distill"] = x[:, 1]
        if self.num_classes:
            out["class"] = self.head(out["class"])
            if self.distilled:
                out["distill"] = self.head_distill(out["distill"])
        return {name: logits.astype(jnp.float32) for name, logits in out.items()}

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        """The normalised tokens of the image as a map: [b, h, w, 3] -> {p: [b, h / p, w / p, d]}.

        Any h and w that p divides; positions are resampled. There is no class token, whose position stays unused.
        `frozen_norms`: see `norms_in_evaluation`.
        """
        with norms_in_evaluation(frozen_norms):
            x = self._tokens(images, train, before=False)
        return {self.patch_size: x.reshape(x.shape[0], *self._grid(images), -1)}

    @property
    def _names_before(self) -> list[str]:
        """The tokens that stand before those of the image."""
        return ["class_token"] * (self.pool == "token") + ["distill_token"] * self.distilled

    @nn.compact  # made only where they are used, so that a detector's backbone has none
    def _tokens_before(self) -> jax.Array:
        return jnp.stack([self.param(name, normal_02, (self.width,)) for name in self._names_before])  # [t, d]

    def layers(self) -> tuple[nn.LayerNorm, nn.Module, nn.Module]:
        """A norm, the attention and the feed-forward layer of a block, by themselves; those of all blocks are alike."""
        norm = nn.LayerNorm(EPSILON, dtype=self.dtype, parent=None)
        return norm, self._attention()(parent=None), self._ffn()(parent=None)

    def _grid(self, images: jax.Array) -> tuple[int, int]:
        return images.shape[1] // self.patch_size, images.shape[2] // self.patch_size

    def _attention(self) -> Callable[..., nn.Module]:
        """The attention of every block, without its name."""
        return functools.partial(
            ATTENTION[self.attention],
            self.width,
            self.num_heads,
            bias=self.attention_bias,
            real_heads=self.real_heads,
            hallucinate=self.hallucinate,
            attention_impl=self.attention_impl,
            dtype=self.dtype,
        )

    def _ffn(self) -> Callable[..., nn.Module]:
        """The feed-forward layer of every block, without its name."""
        compact = Compact(self.ffn_rank, self.ffn_branches, self.folded)
        hidden = round(self.width * self.ffn_ratio)
        chosen = {"compact": compact, "ffn_impl": self.ffn_impl, "dtype": self.dtype}
        return functools.partial(FFN[self.ffn], self.width, hidden, **chosen)

    def _make_blocks(self) -> list[nn.Module]:
        return [
            PreNormBlock(self._attention(), self._ffn(), EPSILON, rate, self.dtype, name=f"block{i}")
            for i, rate in enumerate(linear_rates(self.drop_path, self.depth))
        ]

    def _run_blocks(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
        """Run all blocks on tokens [b, n, d]; the last of them are those of the grid."""
        del grid
        for block in self.blocks:
            x = run_block(block, x, remat=self.remat, train=train)
        return x

    def embed_tokens(self, images: jax.Array, *, before: bool = True) -> jax.Array:
        """The input [b, n, d] of the first block; `before` the tokens of the image those of class and distillation."""
        check_channels(images, self.in_channels)
        x, grid = self.embed(images), self._grid(images)
        x = x.astype(jnp.float32) if self.residual_float32 else x
        if before and self._names_before:
            tokens = self._tokens_before().astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)), x], axis=1)
        return self.add_position(x, grid)

    def _tokens(self, images: jax.Array, train: bool, *, before: bool) -> jax.Array:
        """Normalised tokens [b, n, d] of the image, and `before` them those of class and distillation if any."""
        return self.norm(self._run_blocks(self.embed_tokens(images, before=before), self._grid(images), train))


TIED = {"attention": "tied", "ffn": "tied", "attention_bias": False}
HALLUCINATED = {"real_heads": 0.5}
HC = HALLUCINATED | {"ffn_rank": 0.5}  # hallucinated attention and compact feed-forward layers
TINY = {"width": 192, "num_heads": 3}
SMALL = {"width": 384, "num_heads": 6}
BASE = {"width": 768, "num_heads": 12}

SIZES: dict[str, Fields] = {
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
    "halvit_tiny_h": SMALL | TIED | HALLUCINATED,  # an unpublished combination
    "halvit_small_h": BASE | TIED | HALLUCINATED,
}

PARTITION_RULES = (
    (r"(qkv|expand|head(_distill)?|tied|query_output|key_value|second\d*(/dense)?)/kernel$", COLUMNS),
    (r"(output|reduce|first\d*(/dense)?)/kernel$", ROWS),
    (r"embed/kernel$", FILTERS),
    VECTORS,
)
TRANSFER_RULES = (
    (r"^head(_distill)?/", "head"),
    (r"^position/embedding$", "position_grid"),
    (r"^embed/kernel$", "input_channels"),
)
TINY_SHAPE = {"width": 64, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}

FAMILY = Family(
    model=VisionTransformer,
    sizes=SIZES,
    partition_rules=PARTITION_RULES,
    transfer_rules=TRANSFER_RULES,
    tiny=TINY_SHAPE,
    fold=fold,
    neck="plain",
    published={
        "halvit_tiny": Published(77.3, "HaLViT, T, 300 epochs", params="11.1M"),
        "halvit_small": Published(81.3, "HaLViT, M, 300 epochs", params="43.0M"),
        "deit_tiny": Published(72.2, "DeiT, 300 epochs"),
        "deit_small": Published(79.9, "DeiT, 300 epochs"),
        "deit_base": Published(81.8, "DeiT, 300 epochs"),
        "deit_tiny_distilled": Published(74.5, "DeiT, 300 epochs"),
        "deit_small_distilled": Published(81.2, "DeiT, 300 epochs"),
        "deit_base_distilled": Published(83.4, "DeiT, 300 epochs"),
    },
    baselines={
        "halvit_tiny": "deit_small",
        "halvit_small": "deit_base",
        "halvit_tiny_h": "deit_small",
        "halvit_small_h": "deit_base",
        **{f"{name}_hc": name for name in ("deit_tiny", "deit_small", "deit_base")},
    },
)
