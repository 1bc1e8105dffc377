"""The linears of the models whose layers are measured, and the sizes that kernels are measured at."""

from collections.abc import Iterable
from dataclasses import dataclass

TOKENS = (1, 4, 16, 64, 128, 256, 1024, 4096)
DECODE_TOKENS = (1, 4, 16, 64, 128)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder block of the Llama family."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    def linears(self) -> dict[str, tuple[int, int]]:
        """`(O, I)` of each linear of a block: those that share an input joined, and each on its own."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q+k+v": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate+up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "q": (q, self.hidden),
            "k, v": (kv, self.hidden),
            "gate, up": (self.intermediate, self.hidden),
        }


JOINED = ("q+k+v", "o", "gate+up", "down")
MODELS = {
    model.name: model
    for model in (
        ModelShape("qwen3_8b", 4096, 12288, 32, 8),
        ModelShape("qwen3_14b", 5120, 17408, 40, 8),
        ModelShape("llama3_1_8b", 4096, 14336, 32, 8),
        ModelShape("llama3_1_70b", 8192, 28672, 64, 8),
    )
}


@dataclass(frozen=True)
class LayerShape:
    """A linear of `(O, I)`, and the models' linears that have this shape, such as `qwen3_8b o`."""

    out_features: int
    in_features: int
    used_by: tuple[str, ...]

    @property
    def weights(self) -> int:
        """`O * I`."""
        return self.out_features * self.in_features


def layer_shapes(models: Iterable[str]) -> list[LayerShape]:
    """The different linears of models; raises `ValueError` for a model that is not known."""
    used_by: dict[tuple[int, int], list[str]] = {}
    for name in models:
        if name not in MODELS:
            raise ValueError(f"unknown shapes {name!r}; choose from {', '.join(MODELS)}")
        for linear, shape in MODELS[name].linears().items():
            used_by.setdefault(shape, []).append(f"{name} {linear}")
    return [LayerShape(*shape, tuple(users)) for shape, users in used_by.items()]
