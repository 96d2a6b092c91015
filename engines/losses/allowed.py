"""What a traced loss may call, by the names that torch.fx gives: an explicit list, and how much each call can grow.

No torch here: a gateway refuses a graph by these names alone, and `engines.losses.rebuilding` finds the functions. What
is missing is missing on purpose: random numbers (a replay would draw others), uninitialised memory, modules, files,
other devices, decompositions whose cost does not follow from their size.
"""

from __future__ import annotations

import enum


class Growth(enum.Enum):
    """How many numbers come out of a call, given the tensors that go in."""

    VIEW = "none: the same numbers, seen otherwise, or their shape"
    POINTWISE = "as many as the tensors broadcast to"
    BOUNDED = "at most as many as went in"
    SORTING = "at most as many as went in, and they are put in order"
    SHAPED = "what the shapes and sizes in the arguments say"
    CONTRACTION = "what the shapes say, each a sum of products"
    PIECES = "as many as went in, in many pieces"
    INDEX = "what the index says"
    PLACES = "the places of what is not zero: one number for each dimension"
    REPEAT = "what the numbers in the second argument say"
    CLASSES = "as many columns as there are classes"
    NORM = "at most as many as went in; of vectors only"


def _named(names: str, growth: Growth, prefix: str = "", suffix: str = "") -> dict[str, Growth]:
    return {f"{prefix}{name}{suffix}": growth for name in names.split()}


# Each of these is a function of torch and a method of its tensors.
_POINTWISE = """
abs absolute acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not
bitwise_or bitwise_right_shift bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div
divide eq erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac ge greater greater_equal
gt heaviside hypot i0 igamma igammac isclose isfinite isinf isnan isneginf isposinf ldexp le lerp less less_equal lgamma
log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill
masked_select maximum minimum mul multiply nan_to_num ne neg negative nextafter not_equal polygamma positive pow rad2deg
reciprocal relu remainder round rsqrt sgn sigmoid sign signbit sin sinc sinh sqrt square sub subtract tan tanh
true_divide trunc xlogy
"""
_BOUNDED = """
all allclose amax amin aminmax any argmax argmin clone count_nonzero cummax cummin cumprod cumsum diff dist equal
flatten flip fliplr flipud gather index_add index_copy index_fill index_put logcumsumexp log_softmax logsumexp max mean
min nanmean nansum prod put ravel reshape roll rot90 scatter scatter_add scatter_reduce softmax std sum take trace tril
triu var
"""
_VIEWS = """
detach diagonal is_floating_point moveaxis movedim narrow numel permute select squeeze swapaxes swapdims t transpose
unflatten unsqueeze
"""
_SORTING = (
    "argsort kthvalue median mode msort nanmedian nanquantile quantile sort topk unique unique_consecutive"
)
_SHAPED = "diag diag_embed diagflat index_select kron outer ger take_along_dim tile"
_CONTRACTION = "addmm addmv addbmm baddbmm bmm dot inner matmul mm mv vdot addr"
_PIECES = "chunk hsplit split tensor_split unbind vsplit"
_PLACES = "argwhere nonzero where"

_BOTH = {
    **_named(_POINTWISE, Growth.POINTWISE),
    **_named(_BOUNDED, Growth.BOUNDED),
    **_named(_VIEWS, Growth.VIEW),
    **_named(_SORTING, Growth.SORTING),
    **_named(_SHAPED, Growth.SHAPED),
    **_named(_CONTRACTION, Growth.CONTRACTION),
    **_named(_PIECES, Growth.PIECES),
    **_named(_PLACES, Growth.PLACES),
    "broadcast_to": Growth.VIEW,
    "repeat_interleave": Growth.REPEAT,
    "norm": Growth.NORM,
}

_FUNCTIONS_ONLY = {
    **_named("rsub", Growth.POINTWISE),
    **_named("bucketize cat concat concatenate cosine_similarity cumulative_trapezoid", Growth.BOUNDED),
    **_named("column_stack dstack fill full_like hstack ones_like pairwise_distance", Growth.BOUNDED),
    **_named("searchsorted stack std_mean trapezoid trapz var_mean vstack zeros_like", Growth.BOUNDED),
    **_named("celu hardshrink prelu selu threshold", Growth.POINTWISE),
    **_named("atleast_1d atleast_2d atleast_3d broadcast_tensors meshgrid", Growth.VIEW),
    **_named("cartesian_prod", Growth.SHAPED),
    **_named("cdist einsum tensordot", Growth.CONTRACTION),
}

_FUNCTIONAL = {
    **_named(
        "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid", Growth.POINTWISE
    ),
    **_named("mish prelu relu relu6 selu sigmoid silu softplus softshrink softsign tanh", Growth.POINTWISE),
    **_named("tanhshrink threshold", Growth.POINTWISE),
    **_named(
        "binary_cross_entropy binary_cross_entropy_with_logits huber_loss kl_div l1_loss", Growth.POINTWISE
    ),
    **_named(
        "margin_ranking_loss mse_loss poisson_nll_loss smooth_l1_loss soft_margin_loss", Growth.POINTWISE
    ),
    **_named("gaussian_nll_loss hinge_embedding_loss triplet_margin_loss", Growth.POINTWISE),
    **_named("cosine_embedding_loss cosine_similarity cross_entropy glu layer_norm", Growth.BOUNDED),
    **_named("log_softmax nll_loss normalize pairwise_distance softmax softmin", Growth.BOUNDED),
    **_named("pad", Growth.SHAPED),
    **_named("linear", Growth.CONTRACTION),
    "one_hot": Growth.CLASSES,
}

_SPECIAL = {
    **_named("digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammaln i0 i0e i1 i1e", Growth.POINTWISE),
    **_named("log1p log_ndtr logit ndtr ndtri psi round sinc xlog1py xlogy zeta", Growth.POINTWISE),
    **_named("log_softmax logsumexp softmax", Growth.BOUNDED),
}

_OPERATORS = {
    **_named(
        "abs add and_ eq floordiv ge gt invert le lshift lt mod mul ne neg or_ pos pow", Growth.POINTWISE
    ),
    **_named("rshift sub truediv xor iadd iand ifloordiv ilshift imod imul ior ipow", Growth.POINTWISE),
    **_named("irshift isub itruediv ixor", Growth.POINTWISE),
    **_named("matmul imatmul", Growth.CONTRACTION),
    "getitem": Growth.INDEX,
}

MATH = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees dist erf erfc exp exp2 expm1 fabs floor fmod
    frexp fsum gamma gcd hypot isclose isfinite isinf isnan isqrt lcm ldexp lgamma log log10 log1p log2 modf nextafter
    pow prod radians remainder sin sinh sqrt tan tanh trunc ulp
    """.split()
)
"""Of numbers, and of tensors that hold one."""

FUNCTIONS: dict[str, Growth] = {
    **{f"torch.{name}": growth for name, growth in {**_BOTH, **_FUNCTIONS_ONLY}.items()},
    **{f"torch.nn.functional.{name}": growth for name, growth in _FUNCTIONAL.items()},
    **{f"torch.special.{name}": growth for name, growth in _SPECIAL.items()},
    **{f"operator.{name}": growth for name, growth in _OPERATORS.items()},
    **{f"math.{name}": Growth.BOUNDED for name in MATH},
    "torch.linalg.vector_norm": Growth.BOUNDED,
    "torch.linalg.vecdot": Growth.POINTWISE,
}
"""By canonical name."""

_IN_PLACE = """
abs acos add addcdiv addcmul asin atan atan2 ceil clamp clamp_max clamp_min clip copysign cos div divide eq erf erfc exp
exp2 expm1 fix floor floor_divide fmod frac ge gt ldexp le lerp lgamma log log10 log1p log2 logical_and logical_not
logical_or logit lt masked_fill mul multiply nan_to_num ne neg pow reciprocal relu remainder round rsqrt sgn sigmoid
sign sin sqrt square sub subtract tan tanh true_divide trunc xlogy
"""

METHODS: dict[str, Growth] = {
    **_BOTH,
    **_named(_IN_PLACE, Growth.POINTWISE, suffix="_"),
    **_named("cumprod cumsum fill index_add index_copy index_fill", Growth.BOUNDED, suffix="_"),
    **_named("scatter scatter_add tril triu zero", Growth.BOUNDED, suffix="_"),
    **_named("bfloat16 bool contiguous cpu dim double float half int long", Growth.BOUNDED),
    **_named("ndimension nelement size stride sum_to_size to type type_as", Growth.BOUNDED),
    **_named(
        "expand expand_as new_full new_ones new_zeros repeat reshape_as unfold view view_as", Growth.SHAPED
    ),
}
"""Methods of tensors; `numel` also of shapes."""

ATTRIBUTES = frozenset(
    {
        "H",
        "T",
        "device",
        "dtype",
        "indices",
        "is_cuda",
        "layout",
        "mH",
        "mT",
        "ndim",
        "requires_grad",
        "shape",
        "values",
    }
)
"""What may be read from a tensor, or from what sorting and reducing along a dimension give."""

DTYPES = frozenset(
    {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
     "double", "float", "half", "long", "int", "short"}
)  # fmt: skip
MEMORY_FORMATS = frozenset({"contiguous_format", "preserve_format"})

FORBIDDEN_KEYWORDS = frozenset({"generator", "out", "pin_memory"})
"""Of every function: other places for results and numbers."""

_RENAMED = (
    ("torch._C._nn.", "torch.nn.functional."),
    ("torch._C._special.special_", "torch.special."),
    ("torch._C._linalg.linalg_", "torch.linalg."),
    ("torch.functional.", "torch."),
    ("torch._C._VariableFunctions.", "torch."),
    ("_operator.", "operator."),
)
_ALIASES = {
    "torch.nn.functional.log_sigmoid": "torch.nn.functional.logsigmoid",
    "torch.nn.functional._threshold": "torch.nn.functional.threshold",
    "builtins.getattr": "getattr",
}


def canonical(target: str) -> str:
    """The public name of a function that torch.fx names by where it is defined, which changes between versions."""
    for inner, public in _RENAMED:
        if target.startswith(inner):
            target = public + target[len(inner) :]
            break
    return _ALIASES.get(target, target)
