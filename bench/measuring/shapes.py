"""The layer shapes of real models, by arithmetic on their published configurations, and the grids that commands run."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ..installation import training

known_models = training("known_models")
ModelSizes = known_models.ModelSizes
MODELS = known_models.KNOWN_MODELS | {
    # 1.1 billion parameters, the sizes of TinyLlama: its layers are what a CPU can time.
    "tinyllama": ModelSizes(2048, 5632, 22, 32, 4, 32000),
    # For the tests, and for a first run anywhere.
    "tiny": ModelSizes(64, 128, 2, 4, 2, 128),
}


class Shape(NamedTuple):
    """One linear layer: weight [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False


def layer_shapes(model: str) -> list[Shape]:
    """The distinct linear layers of a decoder block."""
    m = MODELS[model]
    kv_features = m.hidden_size // m.num_attention_heads * m.num_key_value_heads
    shapes = [
        Shape("q_proj", m.hidden_size, m.hidden_size, m.attention_bias),
        Shape("k,v_proj", kv_features, m.hidden_size, m.attention_bias),
        Shape("gate,up_proj", m.intermediate_size, m.hidden_size),
        Shape("down_proj", m.hidden_size, m.intermediate_size),
    ]
    if m.attention_bias:
        return [*shapes, Shape("o_proj", m.hidden_size, m.hidden_size)]
    return [shapes[0]._replace(name="q,o_proj"), *shapes[1:]]


class BlockShape(NamedTuple):
    """Linear layers that one function may compute."""

    name: str
    layers: tuple[Shape, ...]

    @property
    def in_features(self) -> int:
        return self.layers[0].in_features

    @property
    def outputs(self) -> tuple[int, ...]:
        """The features of each output."""
        last = self.layers[-1:] if self.name == "mlp" else self.layers
        return tuple(layer.out_features for layer in last)


def mlp_shape(hidden: int, intermediate: int) -> BlockShape:
    """A gated MLP."""
    wide = (Shape(name, intermediate, hidden) for name in ("gate_proj", "up_proj"))
    return BlockShape("mlp", (*wide, Shape("down_proj", hidden, intermediate)))


def qkv_shape(hidden: int, kv: int, bias: bool) -> BlockShape:
    """The layers of an attention that share its input; `kv` are the output features of k and of v."""
    sizes = {"q_proj": hidden, "k_proj": kv, "v_proj": kv}
    return BlockShape("qkv", tuple(Shape(name, size, hidden, bias) for name, size in sizes.items()))


BLOCKS = {"mlp": mlp_shape, "qkv": qkv_shape}


def block_sizes(model: str) -> dict[str, dict[str, int | bool]]:
    """By block, the arguments of its shape."""
    m = MODELS[model]
    kv_features = m.hidden_size // m.num_attention_heads * m.num_key_value_heads
    return {
        "mlp": {"hidden": m.hidden_size, "intermediate": m.intermediate_size},
        "qkv": {"hidden": m.hidden_size, "kv": kv_features, "bias": m.attention_bias},
    }


def block_shape(case: dict) -> BlockShape:
    """Of a case as results name it."""
    return BLOCKS[case["block"]](**{name: case[name] for name in block_sizes(case["model"])[case["block"]]})


class ExpertShape(NamedTuple):
    """A layer's experts, each a gated MLP, of which a token goes to `chosen`."""

    experts: int
    chosen: int
    hidden: int
    intermediate: int


class MixtureSizes(NamedTuple):
    """The sizes of a mixture of experts, by transformers' names; every layer is one of Qwen3-MoE's."""

    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int
    num_experts_per_tok: int

    @property
    def queries(self) -> int:
        """Output features of q."""
        return self.head_dim * self.num_attention_heads

    @property
    def keys(self) -> int:
        """Of k, and of v."""
        return self.head_dim * self.num_key_value_heads

    @property
    def experts(self) -> ExpertShape:
        """Those of a layer."""
        return ExpertShape(self.num_experts, self.num_experts_per_tok, self.hidden_size, self.moe_intermediate_size)


MIXTURES = {
    "qwen3-30b-a3b": MixtureSizes(2048, 768, 48, 32, 4, 128, 151936, 128, 8),
    "mixtral-8x7b": MixtureSizes(4096, 14336, 32, 32, 8, 128, 32000, 8, 2),
    "tiny-moe": MixtureSizes(64, 32, 2, 4, 2, 16, 128, 4, 2),
}
EXPERTS = {name: sizes.experts for name, sizes in MIXTURES.items()}
WHOLE = MODELS | MIXTURES
"""What a `Run` names."""


QUANTISED = ("nf4", "fp8", "int4", "nvfp4", "mxfp4")
"""The formats of a base: bitsandbytes' NF4, and those of `training.quantised_linear`."""


class Run(NamedTuple):
    """One training step of a whole model."""

    model: str
    layers: int  # of the model's own number; 0: all
    batch: int
    sequence: int
    rank: int
    checkpointing: bool = False
    quantize: str = ""  # one of `QUANTISED`, or none of them

    @property
    def sizes(self) -> ModelSizes | MixtureSizes:
        """Those of the model, with its own number of layers."""
        return WHOLE[self.model]

    @property
    def is_mixture(self) -> bool:
        return self.model in MIXTURES

    def case(self, dtype: str, compiled: bool = False) -> dict:
        """As results name it: of a mixture with the tokens that an expert of a layer has, all having equally many."""
        named = self._asdict() | {"dtype": dtype, "compiled": compiled}
        if self.is_mixture:
            sizes = self.sizes
            named["tokens an expert"] = self.batch * self.sequence * sizes.num_experts_per_tok / sizes.num_experts
        return named


def model_flops(run: Run) -> int:
    """Of one step: what the frozen base needs, forward (2 a weight and token) and backward to the inputs (2 more).

    Causal attention counts half of its scores, 2·s·h a token and layer forward and twice that backward. Of a mixture
    the router and a token's own experts count. Not counted are the adapter, recomputed activations, and embeddings,
    which are looked up.
    """
    m = run.sizes
    layers, tokens = run.layers or m.num_hidden_layers, run.batch * run.sequence
    if run.is_mixture:
        queries, keys = m.queries, m.keys
        mlp = m.hidden_size * (3 * m.num_experts_per_tok * m.moe_intermediate_size + m.num_experts)
    else:
        queries, keys = m.hidden_size, m.hidden_size // m.num_attention_heads * m.num_key_value_heads
        mlp = 3 * m.hidden_size * m.intermediate_size
    layer_weights = m.hidden_size * (2 * queries + 2 * keys) + mlp
    attention = 6 * run.sequence * queries
    return tokens * (4 * (layers * layer_weights + m.hidden_size * m.vocab_size) + layers * attention)


class Preset(NamedTuple):
    """What `--preset` runs: the grid of `kernels`, `layer` and `block`, and the runs of `model`."""

    models: tuple[str, ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    runs: tuple[Run, ...]
    dtype: str = "bf16"
    shapes: tuple[str, ...] = ()  # names of `layer_shapes`; empty: all
    compiled: bool = False
    reference: bool = False  # on a GPU, also our reference implementation
    repetitions: int = 20
    mixtures: tuple[str, ...] = ()  # names of `EXPERTS`

    def layers(self) -> Iterator[tuple[dict, Shape, int, int]]:
        """What `kernels` and `layer` measure: the case as results name it, the shape, tokens and rank."""
        for model in self.models:
            shapes = [shape for shape in layer_shapes(model) if not self.shapes or shape.name in self.shapes]
            for shape, tokens, rank in itertools.product(shapes, self.tokens, self.ranks):
                case = {
                    "model": model, "layer": shape.name, "out": shape.out_features, "in": shape.in_features,
                    "bias": shape.bias, "tokens": tokens, "rank": rank, "dtype": self.dtype, "compiled": self.compiled,
                }  # fmt: skip
                yield case, shape, tokens, rank

    def blocks(self) -> Iterator[tuple[dict, BlockShape, int, int]]:
        """What `block` measures: the case as results name it, the shape, tokens and rank."""
        for model, tokens, rank in itertools.product(self.models, self.tokens, self.ranks):
            for name, sizes in block_sizes(model).items():
                case = {"model": model, "block": name, **sizes, "tokens": tokens, "rank": rank, "dtype": self.dtype}
                yield case | {"compiled": self.compiled}, BLOCKS[name](**sizes), tokens, rank

    def experts(self) -> Iterator[tuple[dict, ExpertShape, int, int]]:
        """What `experts` measures: the case as results name it, the shape, tokens and rank."""
        for model, tokens, rank in itertools.product(self.mixtures, self.tokens, self.ranks):
            shape = EXPERTS[model]
            case = {"model": model, **shape._asdict(), "tokens": tokens, "rank": rank, "dtype": self.dtype}
            case["tokens an expert"] = tokens * shape.chosen / shape.experts
            yield case | {"compiled": self.compiled}, shape, tokens, rank


PRESETS = {
    "h200": Preset(
        ("llama-3-8b",),
        (512, 8192),
        (16, 384),
        (
            Run("llama-3-8b", 0, 1, 512, 16),
            Run("llama-3-8b", 0, 2, 4096, 16),
            Run("llama-3-8b", 0, 2, 4096, 384, checkpointing=True),
            Run("llama-3-8b", 0, 1, 4096, 384, checkpointing=True),
            Run("qwen3-30b-a3b", 0, 2, 4096, 16, checkpointing=True),
        ),
        mixtures=("qwen3-30b-a3b",),
    ),
    # What `bench day` measures, the first cases first.
    "day": Preset(
        ("llama-3-8b",),
        (8192, 512),
        (16, 384),
        (
            Run("llama-3-8b", 0, 2, 4096, 16),
            Run("llama-3-8b", 0, 2, 4096, 16, checkpointing=True),
            Run("llama-3-8b", 0, 2, 4096, 384, checkpointing=True),
            Run("qwen3-30b-a3b", 0, 2, 4096, 16, checkpointing=True),
        ),
        mixtures=("qwen3-30b-a3b",),
    ),
    # The same on a CPU that stands in for a GPU, in small.
    "rehearsal": Preset(
        ("tiny",),
        (8,),
        (4,),
        (Run("tiny", 0, 2, 8, 4, checkpointing=True), Run("tiny-moe", 0, 2, 8, 8, checkpointing=True)),
        shapes=("down_proj",),
        repetitions=2,
        mixtures=("tiny-moe",),
    ),
    "compile": Preset(("llama-3-8b",), (512, 8192), (16, 384), (Run("llama-3-8b", 8, 2, 4096, 16),), compiled=True),
    "full": Preset(
        ("llama-3-8b", "llama-3-70b", "qwen2.5-7b"),
        (1, 512, 2048, 4096, 8192, 16384),
        (8, 16, 64, 128, 384),
        tuple(
            Run(model, layers, 2, sequence, rank, checkpointing, quantize)
            for model, layers in (("llama-3-8b", 0), ("llama-3-70b", 8), ("qwen2.5-7b", 0))
            for sequence in (512, 2048, 4096)
            for rank in (16, 384)
            for checkpointing in (False, True)
            for quantize in ("", "nf4")
        ),
        reference=True,
        mixtures=("qwen3-30b-a3b", "mixtral-8x7b"),
    ),
    "cpu": Preset(
        ("tinyllama",),
        (512,),
        (16,),
        (Run("tinyllama", 2, 1, 256, 16), Run("tinyllama", 2, 1, 256, 16, checkpointing=True)),
        dtype="fp32",
        shapes=("q,o_proj", "gate,up_proj", "down_proj"),
    ),
    "tiny": Preset(
        ("tiny",), (8,), (4,), (Run("tiny", 0, 2, 8, 4),), dtype="fp32", repetitions=2, mixtures=("tiny-moe",)
    ),
}

BREAK_EVEN = {"day": ((512, 2048, 4096, 8192), (16, 64, 384)), "rehearsal": ((8, 16), (4,))}
"""By preset, the tokens and ranks between which `dispatch` changes its mind."""
