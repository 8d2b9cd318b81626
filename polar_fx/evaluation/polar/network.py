"""PoLar's network: from the token features of a question to boundary and op logits of every layer
(PoLar, section 3).

Shapes: B batch, T tokens, Q feature size of a token (d_q), W width (d), D depth (layers of the
model that runs programs), O op classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...output.plain_text import dtype_name


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a network; the defaults are the paper's. Raises InputError on a value out of range.

    `repeat_times` is the most often a segment runs: 2 is the paper's repeat, more adds a class for
    each further count.
    """

    depth: int
    feature_size: int
    width: int = 256
    heads: int = 4
    blocks: int = 2
    dropout: float = 0.1
    repeat_times: int = 2
    residual: bool = False
    """Add the layer embeddings to what cross-attention gives; see `PolarNetwork`."""

    def __post_init__(self) -> None:
        for name, low in (
            ("depth", 1),
            ("feature_size", 1),
            ("width", 1),
            ("heads", 1),
            ("blocks", 1),
            ("repeat_times", 2),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise InputError(f"{name} is {value!r}; give a whole number of at least {low}")
        if self.width % self.heads:
            raise InputError(
                f"width {self.width} does not divide into {self.heads} heads; give a multiple of "
                "the heads"
            )
        if (
            isinstance(self.dropout, bool)
            or not isinstance(self.dropout, (int, float))
            or not 0 <= self.dropout < 1
        ):
            raise InputError(f"dropout is {self.dropout!r}; give a number from 0 to below 1")

    @property
    def ops(self) -> int:
        """Number of op classes O.

        Class c runs its segment c times: 0 skip, 1 keep, 2 repeat, 3 repeat x3, and so on.
        """
        return self.repeat_times + 1


class PolarNetwork(nn.Module):
    """Cross-attention of one learnt query a layer onto the tokens, then a transformer over the
    layers (PoLar, section 3).

    The paper states W = 256, 4 heads, 2 blocks, feed-forward 4W, dropout 0.1 and the two linear
    heads. The numbers of trained parameters, 2,112,260 at D = 24 and 2,115,332 at D = 36 with Q =
    1024, tell more: the token projection and all attentions have biases, each block has two layer
    norms, and there is no norm or bias anywhere else, so nothing after cross-attention and nothing
    after the last block. What has no parameters they do not tell. Chosen here, as PyTorch's modules
    have it and as in the published code: X is the cross-attention's output alone, without residual;
    norms come after the sums; ReLU; dropout also on cross-attention's weights; queries start as
    N(0, 1).

    Without residual, a layer differs from another only by what it attends to: on a single token,
    all layers of the output are equal. `residual=True` adds the queries and costs no parameter.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_projection = nn.Linear(config.feature_size, width)
        # N(0, 1), not smaller: without residual, queries that are nearly equal make layers that are
        # nearly equal.
        self.layer_queries = nn.Parameter(torch.randn(config.depth, width))
        self.cross_attention = nn.MultiheadAttention(
            width, config.heads, dropout=config.dropout, batch_first=True
        )
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, 4 * width, config.dropout, batch_first=True
            )
            for _ in range(config.blocks)
        )
        self.boundary_head = nn.Linear(width, 1)
        self.op_head = nn.Linear(width, config.ops)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return boundary logits [B, D] and op logits [B, D, O].

        `features` [B, T, Q] is floating, `mask` [B, T] bool, true at tokens and false at padding;
        what features hold at padding is not looked at. Raises InputError on other shapes or dtypes,
        on a row without tokens, and on features that are not finite.
        """
        self._check(features, mask)
        # NaN times the weight 0 is NaN, so padding is cleared, not only masked.
        features = features.masked_fill(~mask.unsqueeze(-1), 0).to(
            self.token_projection.weight.dtype
        )
        tokens = self.token_projection(features)  # [B, T, W]
        queries = self.layer_queries.expand(len(tokens), -1, -1)  # [B, D, W]
        hidden, _ = self.cross_attention(
            queries, tokens, tokens, key_padding_mask=~mask, need_weights=False
        )
        if self.config.residual:
            hidden = hidden + queries
        for block in self.blocks:
            hidden = block(hidden)  # [B, D, W]
        return self.boundary_head(hidden).squeeze(-1), self.op_head(hidden)

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def _check(self, features: Tensor, mask: Tensor) -> None:
        size = self.config.feature_size
        if features.dim() != 3 or features.shape[-1] != size or not features.is_floating_point():
            raise InputError(
                f"features are {_describe(features)}; give a floating tensor [batch, tokens, "
                f"{size}], or build the network for another feature_size"
            )
        if mask.dtype != torch.bool or mask.shape != features.shape[:2]:
            raise InputError(
                f"mask is {_describe(mask)}; give a bool tensor {list(features.shape[:2])}, true "
                "at tokens, false at padding"
            )
        empty = ~mask.any(dim=1)
        bad = mask & ~features.isfinite().all(dim=-1)
        if bool(empty.any()):
            raise InputError(
                f"row {int(empty.nonzero()[0])} of the mask is false everywhere; give each "
                "question a token"
            )
        if bool(bad.any()):
            row, token = bad.nonzero()[0].tolist()
            raise InputError(
                f"features of row {row}, token {token} are not all finite; look for NaN or "
                "overflow in the text encoder, half precision may be too small for it"
            )


def pad_features(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return questions [T, Q] of any numbers of tokens as one batch: float32 [B, T, Q], zero at
    padding, and mask [B, T].

    Raises InputError naming the question if one is not floating, is not [T, Q] with at least one
    token, or has another Q.
    """
    if not features:
        raise InputError("no questions; give the features of at least one")
    for index, each in enumerate(features):
        if (
            each.dim() != 2
            or not len(each)
            or not each.is_floating_point()
            or each.shape[1] != features[0].shape[1]
        ):
            raise InputError(
                f"features of question {index} are {_describe(each)}; give a floating tensor "
                "[tokens, feature size] with at least one token, of one feature size for all"
            )
    longest = max(len(each) for each in features)
    batch = features[0].new_zeros(len(features), longest, features[0].shape[1], dtype=torch.float32)
    mask = torch.zeros(len(features), longest, dtype=torch.bool, device=batch.device)
    for row, each in enumerate(features):
        batch[row, : len(each)] = each
        mask[row, : len(each)] = True
    return batch, mask


def _describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
