"""End to end: a Llama-3.1-8B-shaped model with random weights, in BF16 and in MXFP4: prefill and decode.

Two ways to run it: `as is`, transformers' own forward; and `compiled`, the same decoder block as one function that
`torch.compile` fuses, for both models alike, since unfused norms and rotary embeddings cost as much as 4-bit
products. All in CUDA graphs. A decode step writes the last slot of a static cache that is full but for it.
What is checked is in `wush_kernels.bench.model_check`.
Shape legend: `B` windows in a batch, `M` tokens, `H` heads, `D` head size.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import wush
from wush.backends import use_kernels
from wush.decoder import find_blocks
from wush.joint import join
from wush_kernels.bench import operands
from wush_kernels.bench.cases import Case, Prepared
from wush_kernels.bench.measurement import BF16, OURS, Work
from wush_kernels.bench.timing import Call

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
BLOCKS, QUICK_BLOCKS = 32, 2
WINDOWS, WINDOW, CONTEXT = 4, 2048, 256
SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

BlockForward = Callable[..., Tensor]
CallOf = Callable[[BlockForward | None], Call]


@dataclass(frozen=True)
class DecodeCache:
    """Keys and values of each block, `(B, H, M, D)`, and the slot that the next token takes, `(1,)`."""

    keys: list[Tensor]
    values: list[Tensor]
    slot: Tensor

    @classmethod
    def random(cls, model: Any, length: int) -> "DecodeCache":
        """A cache of batch 1 in which only the last slot is free."""
        config, like = model.config, next(model.parameters())
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        keys, values = (
            [torch.randn(shape, device=like.device, dtype=like.dtype) for _ in range(config.num_hidden_layers)]
            for _ in range(2)
        )
        return cls(keys, values, torch.tensor([length - 1], device=like.device))


def cases(quick: bool) -> Iterator[Case]:
    """Decode and prefill, each way of running; quickly, decode of a few blocks."""
    models = Models(QUICK_BLOCKS if quick else BLOCKS)
    for how in ("compiled", "as is"):
        for name in ("decode",) if quick else ("decode", "prefill"):
            tokens = 1 if name == "decode" else WINDOWS * WINDOW
            yield Case(
                name, f"mxfp4 {how}", tokens, 0, 0, models.work(tokens), partial(models.prepare, name, how),
                details={"decoder_blocks": models.blocks},
            )  # fmt: skip


class Models:
    """The model in BF16, and the same with random 4-bit weights and inputs quantized once for those that share one."""

    def __init__(self, blocks: int, sizes: dict[str, int] | None = None, device: str = "cuda") -> None:
        self.blocks, self.sizes, self.device = blocks, sizes or SIZES, device

    @cached_property
    def bf16(self) -> Any:
        """A `LlamaForCausalLM`, made on the device."""
        config = AutoConfig.for_model("llama", num_hidden_layers=self.blocks, tie_word_embeddings=False, **self.sizes)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        return model.eval().requires_grad_(False)

    @cached_property
    def mxfp4(self) -> Any:
        """Every linear of its decoder blocks is a `QuantLinear`; those with one input share its transform."""
        fmt, model = operands.FORMATS["mxfp4"], copy.deepcopy(self.bf16)
        for block in find_blocks(model)[1]:
            for names in SHARED_INPUTS:
                matrix = None
                for name in names:
                    outputs, features = block.get_parameter(f"{name}.weight").shape
                    matrix = operands.transform(fmt, features) if matrix is None else matrix
                    block.set_submodule(name, operands.layer(fmt, outputs, features, matrix))
                join(block, names)
        return use_kernels(model, "auto")

    def work(self, tokens: int) -> Work:
        """Of one pass: weights read once (the head's in BF16), two operations a weight and token; no attention."""
        sizes, head = self.sizes, self.sizes["hidden_size"] * self.sizes["vocab_size"]
        heads = sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"]
        attention = sizes["hidden_size"] * sizes["head_dim"] * (heads + sizes["num_attention_heads"])
        weights = self.blocks * (attention + 3 * sizes["hidden_size"] * sizes["intermediate_size"])
        moved = weights * wush.MXFP4.bits_per_weight / 8 + 2 * head
        return Work(moved, 2.0 * weights * tokens + 2.0 * head * (1 if tokens == 1 else WINDOWS), "fp8")

    def prepare(self, name: str, how: str) -> Prepared:
        """The two models' calls, interleaved by the timing; the quantized one's first blocks are checked."""
        from wush_kernels.bench.model_check import errors

        make = CALLS[name]
        run_block = torch.compile(run_decoder_block, fullgraph=True, dynamic=False) if how == "compiled" else None
        contenders = {OURS: [make(self.mxfp4)(run_block)], BF16: [make(self.bf16)(run_block)]}
        return Prepared(contenders, lambda: errors(self.mxfp4, make, run_block))


def run_decoder_block(
    block: Any, hidden: Tensor, cos: Tensor, sin: Tensor, cached: tuple[Tensor, Tensor, Tensor] | None
) -> Tensor:
    """A Llama decoder block as transformers computes it, `(B, M, I)`; with keys, values and slot it decodes one token.

    Takes tensors only, so that one compiled function serves all blocks.
    """
    attention = block.self_attn
    normed = block.input_layernorm(hidden)
    heads = (*hidden.shape[:-1], -1, attention.head_dim)
    query, key, value = (
        projection(normed).view(heads).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    if cached is not None:
        keys, values, slot = cached
        keys.index_copy_(2, slot, key)
        values.index_copy_(2, slot, value)
        key, value = keys, values
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=cached is None, enable_gqa=True)
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(*hidden.shape[:-1], -1))
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def last_logits(
    model: Any, run_block: BlockForward, ids: Tensor, positions: Tensor, cache: DecodeCache | None = None
) -> Tensor:
    """Logits `(B, 1, V)` of the last tokens of `ids` `(B, M)`, after as many blocks as the model's config says."""
    hidden = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(hidden, position_ids=positions)
    for index, block in enumerate(model.model.layers[: model.config.num_hidden_layers]):
        cached = None if cache is None else (cache.keys[index], cache.values[index], cache.slot)
        hidden = run_block(block, hidden, cos, sin, cached)
    return model.lm_head(model.model.norm(hidden[:, -1:]))


def prefill(model: Any) -> CallOf:
    """Prefill of random tokens; by transformers' own forward where no function runs a block."""
    ids = torch.randint(0, model.config.vocab_size, (WINDOWS, WINDOW), device=model.device)

    def call(run_block: BlockForward | None) -> Call:
        if run_block is None:
            return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        positions = torch.arange(WINDOW, device=model.device)[None]
        return partial(last_logits, model, run_block, ids, positions)

    return call


def decode(model: Any) -> CallOf:
    """One decode step of a random token; all calls with a function that runs a block have the same cache."""
    ids = torch.randint(0, model.config.vocab_size, (1, 1), device=model.device)
    caches: list[DecodeCache] = []

    def call(run_block: BlockForward | None) -> Call:
        if run_block is None:
            return partial(transformers_step, model, ids, *full_static_cache(model, CONTEXT))
        cache = caches[0] if caches else DecodeCache.random(model, CONTEXT)
        caches[:] = [cache]
        return partial(last_logits, model, run_block, ids, cache.slot[None], cache)

    return call


CALLS: dict[str, Callable[[Any], CallOf]] = {"decode": decode, "prefill": prefill}


def full_static_cache(model: Any, length: int) -> tuple[Any, Tensor]:
    """A static cache of batch 1, and the tensor of all its blocks' counts of tokens, to be set before each step."""
    config, like = model.config, next(model.parameters())
    cache: Any = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, like.dtype, like.device)
    counts = torch.zeros(config.num_hidden_layers, dtype=torch.int64, device=like.device)
    for layer, count in zip(cache.layers, counts, strict=True):
        layer.cumulative_length = count
        for states in (layer.keys, layer.values):
            states.normal_()
    return cache, counts


def transformers_step(model: Any, ids: Tensor, cache: Any, counts: Tensor) -> Tensor:
    """One token into the last slot, by transformers' own forward; logits `(1, 1, V)`."""
    counts.fill_(cache.layers[0].keys.shape[2] - 1)
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits
