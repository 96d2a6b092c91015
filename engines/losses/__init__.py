"""The built-in losses: their names, the tensors that each needs, and their settings. No tensor framework here.

p is the current policy's log-prob of a target token, q the `logprobs` input (the sampler's), A the `advantages`,
r = exp(p - q). A loss is the sum over all tokens of all data; nothing is averaged. `engines.losses.formulas` has them
in torch; an engine may bring its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setting:
    """A number that configures a loss: `default` None means that it must be given; `least` is the smallest allowed."""

    default: float | None
    least: float = 0.0


@dataclass(frozen=True)
class LossSpec:
    """What a loss is called with.

    `inputs` are all needed: `target_tokens` int64 [N], where N is the number of the datum's tokens, or [N, K] for
    losses with `many_targets`; the others float32 of the same shape. `per_token` names settings that a datum may give
    as a tensor of that shape too: it wins over the number. Nothing else is taken. The tokens of a datum are
    independent of each other, unless the loss is `per_sequence`: then its formula is for one datum.
    """

    name: str
    inputs: tuple[str, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    per_token: tuple[str, ...] = ()
    many_targets: bool = False
    per_sequence: bool = False

    def with_defaults(self, config: Mapping[str, float | str]) -> dict[str, float]:
        """Every setting's value, defaults filled in, of a configuration that `engines.checks` has accepted."""
        given = {name: setting.default for name, setting in self.settings.items()} | dict(config)
        return {name: float(value) for name, value in given.items() if value is not None}


_POLICY = ("target_tokens", "logprobs", "advantages")
LOW, HIGH = "clip_low_threshold", "clip_high_threshold"
"""Bounds of r itself, not distances from 1."""
_BOUNDS = {LOW: Setting(0.8), HIGH: Setting(1.2)}

CROSS_ENTROPY = LossSpec("cross_entropy", ("target_tokens", "weights"), many_targets=True)
"""-sum(p * w), w the `weights`, of any sign. With targets [N, K] the sum runs over both axes: soft targets."""

IMPORTANCE_SAMPLING = LossSpec("importance_sampling", _POLICY)
"""-sum(r * A): the policy gradient, corrected for the policy that sampled."""

PPO = LossSpec("ppo", _POLICY, _BOUNDS, (LOW, HIGH))
"""-sum(min(r * A, clamp(r, low, high) * A)). Schulman et al., 2017, arXiv:1707.06347."""

CISPO = LossSpec("cispo", _POLICY, _BOUNDS, (LOW, HIGH))
"""-sum(stopgrad(clamp(r, low, high)) * p * A): every token keeps a gradient. MiniMax, 2025, arXiv:2506.13585."""

DRO = LossSpec("dro", _POLICY, {"beta": Setting(None)})
"""-sum(p * A - beta / 2 * (p - q)^2). Richemond et al., 2024, arXiv:2405.19107."""

GSPO = LossSpec(
    "gspo",
    (*_POLICY, "sequence_ratio_mask"),
    {LOW: Setting(None), HIGH: Setting(None)},
    (LOW, HIGH),
    per_sequence=True,
)
"""-sum(min(s_t * A, clamp(s_t, low, high) * A)), where s_t = s * exp(p - stopgrad(p)), and s = exp of the mean of
stopgrad(p) - q over the tokens of the datum whose `sequence_ratio_mask` is not 0. Zheng et al., 2025, arXiv:2507.18071,
GSPO-token. Useful bounds are some 1e-4 away from 1, so there is no default that would fit."""

LOSSES: dict[str, LossSpec] = {
    spec.name: spec for spec in (CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO)
}

CUSTOM = "custom"
"""A loss that a client has traced and the operation brings with it: `engines.graphs`. Where it is among an engine's
losses, the engine computes such."""

UNKNOWN_FORMULA = {"stable_reinforce"}
"""Losses of the Tinker API whose formula is not public, so that no engine can have them."""


def overflow_of_gradient(norm: float) -> str:
    """What an optimizer step is refused with when the pending gradient is not finite: the same from every engine."""
    return (
        f"the gradient that was added up since the last optim_step has the norm {norm}; it must be finite. The step "
        "had no effect and the gradient is still there: load a checkpoint with load_state, which clears it, and go on "
        "with smaller weights or advantages"
    )
