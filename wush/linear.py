"""`QuantLinear`: a linear layer with 4-bit weights and activations that are quantized at every forward."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wush.algorithms import QuantizedWeight
from wush.backends import DEFAULT, Settings, linear
from wush.formats import Format, Quantized
from wush.operands import Weight, bits_of

if TYPE_CHECKING:
    from wush.joint import Joint


class QuantLinear(nn.Module):
    """`y = Q(T x) W_q^T + bias`, the drop-in replacement of an `nn.Linear` (method: a transformed linear layer).

    Buffers: `packed_weight` `(O, I * bits / 8)` uint8; `scales` `(O, N)`; `transform` `(N, G, G)`, `(G, G)` or
    None in the model's dtype; `bias` `(O,)` or None. The global scales, of the weight and of the inputs, travel with
    the state dict. Activations are rounded to nearest in the same format; a row with NaN or infinity gives a row of
    NaN. `settings` say what may compute it (`wush.use_kernels`); the reference is the float32 product of the
    dequantized operands. The result has the input's dtype.
    """

    packed_weight: Tensor
    scales: Tensor
    transform: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        fmt: Format,
        bias: Tensor | None = None,
        name: str = "",
        settings: Settings = DEFAULT,
    ) -> None:
        super().__init__()
        self.format = fmt
        self.name = name
        self.settings = settings
        self.joint: Joint | None = None
        self.joint_index = 0
        self.not_joined = ""
        self.global_scale = weight.quantized.global_scale
        self.input_scale = fmt.global_scale if weight.input_scale is None else weight.input_scale
        self.out_features, self.in_features = weight.quantized.codes.shape
        self.register_buffer("packed_weight", fmt.pack(weight.quantized.codes))
        self.register_buffer("scales", weight.quantized.scales)
        # Contiguous as when read back from a file: strides choose a product's kernel, and so its last bits.
        self.register_buffer("transform", None if weight.transform is None else weight.transform.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], fmt: Format, name: str = "", settings: Settings = DEFAULT
    ) -> "QuantLinear":
        """The layer whose `state_dict` this is, on the device of its tensors."""
        global_scale, input_scale = state["_extra_state"].tolist()
        quantized = Quantized(fmt.unpack(state["packed_weight"]), state["scales"], global_scale)
        weight = QuantizedWeight(quantized, state.get("transform"), input_scale)
        return cls(weight, fmt, state.get("bias"), name, settings)

    def weight(self) -> Tensor:
        """The dequantized weight `(O, I)` float32, in transformed coordinates."""
        return self.own.values()

    @property
    def own(self) -> Weight:
        """This layer's weight, transform and bias."""
        return Weight(
            self.format, self.packed_weight, self.scales, self.global_scale, self.input_scale, self.transform, self.bias
        )

    @property
    def operand_source(self) -> Weight:
        """The weight that forward multiplies with: of all layers it is joined with, or its own."""
        return self.joint.weight if self.joint is not None and self.joint.whole else self.own

    def forward(self, input: Tensor) -> Tensor:  # the name by which callers of nn.Linear may pass it
        self._check(input)
        if self.joint is not None:
            return self.joint.output(input, self)
        return linear(input, self.own, self.settings)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.name}: the input has {x.shape[-1]} features, the layer {self.in_features}")
        if not x.is_floating_point() or x.dtype == torch.float64 or x.dtype.itemsize == 1:
            raise TypeError(f"{self.name}: the input is {x.dtype}; it should be float32, bfloat16 or float16")
        if x.device != self.packed_weight.device:
            raise ValueError(
                f"{self.name}: the input is on {x.device}, the weight on {self.packed_weight.device}; move one of them"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Move the buffers; scales are bits to a change of dtype, which would round them."""
        own = self.scales.dtype
        self.scales = bits_of(self.scales)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = self.scales.view(own)
        if self.joint is not None:
            self.joint.mend()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.joint is not None and self.transform is not None:
            self.transform = self.transform.clone()  # the one that is loaded may differ from the other layers'
        super()._load_from_state_dict(*args)
        if self.joint is not None:
            self.joint.mend()

    def get_extra_state(self) -> Tensor:
        """The global scales of weight and inputs, `(2,)` float64."""
        return torch.tensor([self.global_scale, self.input_scale], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the global scales from a state dict."""
        self.global_scale, self.input_scale = state.tolist()

    def storage_bits(self) -> int:
        """Bits stored for the weight: codes, scales and the layer's own transform."""
        stored = (self.packed_weight, self.scales)
        return 8 * sum(tensor.numel() * tensor.itemsize for tensor in stored) + self.transform_bits()

    def transform_bits(self) -> int:
        """Bits of the layer's own transform, `(N, G, G)`, or of its diagonal where it is no more than that.

        A fixed `(G, G)` transform (Hadamard, a seeded rotation) is one for the whole model and not counted.
        """
        if self.transform is None or self.transform.ndim == 2:
            return 0
        diagonal = self.transform.diagonal(dim1=1, dim2=2)
        stored = diagonal if torch.equal(self.transform, diagonal.diag_embed()) else self.transform
        return 8 * stored.numel() * stored.itemsize

    def extra_repr(self) -> str:
        transform = "none" if self.transform is None else tuple(self.transform.shape)
        return f"{self.in_features}, {self.out_features}, format={self.format.name}, transform={transform}"
