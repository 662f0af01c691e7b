"""Int8Embedding and Int8EmbeddingBag: torch.nn's, with an int8 table."""

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.int8_embedding_bag import MODES
from .int8_weight import Int8Weight


class _Int8Table(Int8Weight):
    """An int8 table [V, D] with one scale a row, resident as it is: rows are read where they lie."""

    bias = None

    def _pack(self, weight: Tensor) -> Tensor:
        return weight.contiguous()

    def _take_table(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.weight_shape = (weight.shape[0], weight.shape[1])
        self.dtype = dtype
        self.set_weight(weight, scale)

    def _zeros(
        self, device: torch.device | str | None, dtype: torch.dtype | None, *shape: int
    ) -> None:
        weight = torch.zeros(shape, dtype=torch.int8, device=device)
        scale = torch.zeros(shape[0], dtype=torch.float32, device=device)
        self._take_table(weight, scale, dtype or torch.get_default_dtype())

    @property
    def weight(self) -> Tensor:
        """The float table [V, D] this layer stands for, computed on demand."""
        return self.float_weight()


def _check_float(name: str, kind: type[nn.Module], module: nn.Module) -> None:
    if not isinstance(module, kind):
        raise TypeError(f"{name}: expected an nn.{kind.__name__}, got {type(module).__name__}")
    if module.max_norm is not None:
        raise ValueError(
            f"{name}: expected max_norm=None, got {module.max_norm}: it rewrites the float rows that "
            "are looked up, and the int8 table is fixed"
        )


class Int8Embedding(_Int8Table, nn.Embedding):  # type: ignore[override]
    """``weight[indices]`` from an int8 table, one scale a row.

    ``indices`` int32 or int64 of any shape; the result [..., embedding_dim] has ``dtype``, that of the
    float table, which ``.to(dtype)`` changes: ``float(q) * scale``, rounded once. The table is fixed:
    no gradient. ``padding_idx`` keeps its (zero) row; torch uses it for gradients only. An index out of
    range is a RuntimeError that names it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero table, to load a checkpoint into; see from_float for a trained one."""
        plan = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta")
        nn.Module.__init__(self)
        self._take_settings(plan)
        self._zeros(device, dtype, num_embeddings, embedding_dim)

    @classmethod
    def from_float(cls, module: nn.Embedding) -> "Int8Embedding":
        """The int8 form of a float Embedding, which is left alone.

        Raises:
            TypeError: ``module`` is no nn.Embedding.
            ValueError: it has a ``max_norm``.
            RuntimeError: its weight is not float32, bfloat16 or float16.
        """
        _check_float("Int8Embedding", nn.Embedding, module)
        table, scale = ops.quantize_int8(module.weight.detach())
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_settings(module)
        layer._take_table(table, scale, module.weight.dtype)
        layer.train(module.training)
        return layer

    def _take_settings(self, module: nn.Embedding) -> None:
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(module, name))

    def forward(self, input: Tensor) -> Tensor:
        return ops.int8_embedding(input, self.packed, self.weight_scale, self.dtype)


class Int8EmbeddingBag(_Int8Table, nn.EmbeddingBag):  # type: ignore[override]
    """Sums or means of bags of rows of an int8 table, one scale a row.

    Takes what torch.nn.EmbeddingBag takes; the result [bags, embedding_dim] has ``dtype``, that of the
    float table. Rows are added in float32 in the order of the indices, so every instruction set gives
    the same bits. The table is fixed: no gradient, to ``per_sample_weights`` neither.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero table, to load a checkpoint into; see from_float for a trained one.

        Raises ValueError for a mode other than "sum" and "mean".
        """
        self._check_mode(mode)
        plan = nn.EmbeddingBag(
            num_embeddings, embedding_dim, mode=mode, include_last_offset=include_last_offset,
            padding_idx=padding_idx, device="meta",
        )  # fmt: skip
        nn.Module.__init__(self)
        self._take_settings(plan)
        self._zeros(device, dtype, num_embeddings, embedding_dim)

    @staticmethod
    def _check_mode(mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"Int8EmbeddingBag: expected mode in {list(MODES)}, got {mode!r}")

    @classmethod
    def from_float(cls, module: nn.EmbeddingBag) -> "Int8EmbeddingBag":
        """The int8 form of a float EmbeddingBag, which is left alone.

        Raises:
            TypeError: ``module`` is no nn.EmbeddingBag.
            ValueError: it has a ``max_norm``, or a mode other than "sum" and "mean".
            RuntimeError: its weight is not float32, bfloat16 or float16.
        """
        _check_float("Int8EmbeddingBag", nn.EmbeddingBag, module)
        cls._check_mode(module.mode)
        table, scale = ops.quantize_int8(module.weight.detach())
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_settings(module)
        layer._take_table(table, scale, module.weight.dtype)
        layer.train(module.training)
        return layer

    def _take_settings(self, module: nn.EmbeddingBag) -> None:
        for name in nn.EmbeddingBag.__constants__:
            setattr(self, name, getattr(module, name))

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        return ops.int8_embedding_bag(
            input, self.packed, self.weight_scale, offsets, self.mode, per_sample_weights,
            self.padding_idx, self.include_last_offset, self.dtype,
        )  # fmt: skip
