"""`QuantLinear`: a linear layer with 4-bit weights and activations that are quantized at every forward."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wush.algorithms import QuantizedWeight
from wush.formats import Format, Quantized
from wush.transforms import apply_blocks


class QuantLinear(nn.Module):
    """`y = Q(T x) W_q^T + bias`, the drop-in replacement of an `nn.Linear` (method: a transformed linear layer).

    Buffers: `packed_weight` `(O, I * bits / 8)` uint8; `scales` `(O, N)`; `transform` `(N, G, G)`, `(G, G)` or
    None in the model's dtype; `bias` `(O,)` or None. The global scale travels with the state dict. Activations are
    rounded to nearest in the same format. The product is computed in float32 of the dequantized operands and
    returned in the input's dtype.
    """

    packed_weight: Tensor
    scales: Tensor
    transform: Tensor | None
    bias: Tensor | None
    byte_values: Tensor

    def __init__(self, weight: QuantizedWeight, fmt: Format, bias: Tensor | None = None, name: str = "") -> None:
        super().__init__()
        self.format = fmt
        self.name = name
        self.global_scale = weight.quantized.global_scale
        self.out_features, self.in_features = weight.quantized.codes.shape
        self.register_buffer("packed_weight", fmt.pack(weight.quantized.codes))
        self.register_buffer("scales", weight.quantized.scales)
        # Contiguous as when read back from a file: strides choose a product's kernel, and so its last bits.
        self.register_buffer("transform", None if weight.transform is None else weight.transform.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("byte_values", fmt.byte_values.to(self.packed_weight.device), persistent=False)

    @classmethod
    def from_state(cls, state: dict[str, Tensor], fmt: Format, name: str = "") -> "QuantLinear":
        """The layer whose `state_dict` this is, on the device of its tensors."""
        quantized = Quantized(fmt.unpack(state["packed_weight"]), state["scales"], state["_extra_state"].item())
        return cls(QuantizedWeight(quantized, state.get("transform")), fmt, state.get("bias"), name)

    def weight(self) -> Tensor:
        """The dequantized weight `(O, I)` float32, in transformed coordinates."""
        elements = F.embedding(self.packed_weight.int(), self.byte_values).flatten(-2)
        return self.format.expand(self.format.groups(elements), self.scales, self.global_scale).flatten(-2)

    def quantize_input(self, x: Tensor) -> Tensor:
        """`Q(T x)` in float32, `(..., I)`; raises `NumericError` that names the layer for NaN or infinity."""
        x = x.float()
        if self.transform is not None:
            x = apply_blocks(x, self.transform.float())
        return self.format.round_trip(x, f"{self.name} input")

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(self.quantize_input(x), self.weight())
        if self.bias is not None:
            product += self.bias
        return product.to(x.dtype)

    def get_extra_state(self) -> Tensor:
        """The global scale, `(1,)` float64."""
        return torch.tensor([self.global_scale], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the global scale from a state dict."""
        self.global_scale = state.item()

    def storage_bits(self) -> int:
        """Bits stored for the weight: codes, scales and the layer's own transform, `(N, G, G)`.

        A fixed `(G, G)` transform (Hadamard, a seeded rotation) is one for the whole model and not counted.
        """
        stored = [self.packed_weight, self.scales]
        if self.transform is not None and self.transform.ndim == 3:
            stored.append(self.transform)
        return 8 * sum(tensor.numel() * tensor.itemsize for tensor in stored)

    def extra_repr(self) -> str:
        transform = "none" if self.transform is None else tuple(self.transform.shape)
        return f"{self.in_features}, {self.out_features}, format={self.format.name}, transform={transform}"
