"""patch_trl: TRL's DPOTrainer on this package's LM head and loss. The only place that imports trl (1.16).

Shapes: B sequences (all chosen, then all rejected), L length, N completion tokens of the batch, T = B/2 pairs.
Order: what is refused, the trunk and the head, the loss, the metrics, the trainer, the public function.
"""

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import PairCall
from .common import TokenStats
from .head import linear_token_logps
from .losses import LOSSES
from .modules import halves
from .pairs import pair_loss
from .scaling import logit_scaling

STATS = ("entropy", "mean_logit", "max_is_target")
"""What TRL logs beside the log-probs; WPO weights need "log_sum_sq" too."""

TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""Values of loss_type: all, as TRL has them (bco_pair without a running baseline, sft as a mean over tokens)."""

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses for which TRL reads label_smoothing."""

DIVERGENCES = {
    "reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"
}  # fmt: skip
"""f_divergence_type as `pair_loss` names it."""

PLAIN: Mapping[str, Any] = {"padding_free": False, "use_liger_kernel": False, "torch_compile": False}
"""Options that must keep these values (TRL ignores padding_free: nothing is accepted and ignored here)."""


def _refuse(option: str, expected: object, found: object) -> None:
    raise ValueError(f"{option}: patch_trl expected {expected}, found {found!r}")


def check_options(args: Any) -> None:
    """ValueError naming the first option of a DPOConfig that is not honoured, and its value.

    An option that TRL takes and ignores with the losses asked for (label smoothing with sigmoid) is refused too.
    """
    for name, plain in PLAIN.items():
        if getattr(args, name, plain) != plain:
            _refuse(name, plain, getattr(args, name))
    names = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    if not names or not set(names) <= set(TRL_LOSSES):
        _refuse("loss_type", f"out of {', '.join(TRL_LOSSES)}", args.loss_type)
    if args.label_smoothing and not set(names) & set(SMOOTHED):
        _refuse("label_smoothing", f"0 with {', '.join(names)}, for which TRL ignores it", args.label_smoothing)
    if args.discopop_tau != 0.05 and "discopop" not in names:
        _refuse("discopop_tau", f"0.05 with {', '.join(names)}", args.discopop_tau)
    if args.f_divergence_type not in DIVERGENCES:
        _refuse("f_divergence_type", f"one of {', '.join(DIVERGENCES)}", args.f_divergence_type)
    coefficient, alpha = args.f_alpha_divergence_coef, args.f_divergence_type == "alpha_divergence"
    if not (0.0 <= coefficient < 1.0 if alpha else coefficient == 0.5):
        expected = "0 <= value < 1" if alpha else f"0.5 with f_divergence_type {args.f_divergence_type!r}"
        _refuse("f_alpha_divergence_coef", expected, coefficient)
    if args.ld_alpha is not None and not 0.0 <= args.ld_alpha <= 1.0:
        _refuse("ld_alpha", "a number from 0 to 1, or None", args.ld_alpha)
    if args.use_weighting and "sft" in names:
        _refuse("use_weighting", "False with sft, where TRL fails", args.use_weighting)
    for name in names:
        if name != "sft":
            PairCall.check(name, args.beta, "mean", **loss_options(args, name))


def loss_options(args: Any, name: str) -> dict[str, Any]:
    """Options of `pair_loss` that a DPOConfig gives one of its losses."""
    options: dict[str, Any] = {}
    if name in SMOOTHED:
        options["label_smoothing"] = args.label_smoothing
    if name == "discopop":
        options["discopop_tau"] = args.discopop_tau
    if "f_divergence" in LOSSES[name].options:
        options["f_divergence"] = DIVERGENCES[args.f_divergence_type]
        if args.f_divergence_type == "alpha_divergence":
            options["f_alpha"] = 1.0 - args.f_alpha_divergence_coef
    return options


def check_trainer(trainer: Any) -> None:
    """ValueError naming what a trainer has that is not honoured."""
    check_options(trainer.args)
    if trainer.aux_loss_enabled:
        _refuse("router_aux_loss_coef", "0.0 (no auxiliary loss of a mixture of experts)", trainer.router_aux_loss_coef)
    if trainer._is_vlm or trainer._is_vision_dataset:
        _refuse("processing_class", "a tokenizer and text data", type(trainer.processing_class).__name__)
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        if getattr(trainer, name, False):
            _refuse(name, "plain or DDP training", True)
    if trainer.accelerator.parallelism_config is not None:
        _refuse("parallelism_config", "None", trainer.accelerator.parallelism_config)
    for model in _models(trainer):
        head = model.get_output_embeddings()
        if type(getattr(head, "weight", None)) is not torch.nn.Parameter or hasattr(head, "modules_to_save"):
            _refuse("peft_config", "no adapter and no copy (modules_to_save) of the LM head", type(head).__name__)


def _models(trainer: Any) -> list[Any]:
    """The causal LMs to patch, without the wrappers of peft and accelerate."""
    held = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    held = [trainer.accelerator.unwrap_model(model) for model in held]
    return [model.get_base_model() if hasattr(model, "get_base_model") else model for model in held]


class PaddedTrunk:
    """How hidden rows are computed: by the model's own forward of the padded batch."""

    def check(self, trainer: Any, models: Sequence[Any]) -> None:
        """Raises ValueError naming what of the trainer or its causal LMs is not honoured; readies the models."""

    def own_forward(self, model: Any) -> AbstractContextManager:
        """Context in which the model computes as it does without this package."""
        return nullcontext()

    def hidden(self, model: Any, rows: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """[N, H] for the True places of rows [B, L - 1], in row order. inputs: those of the model's forward."""
        return model.base_model(*args, **inputs).last_hidden_state[:, :-1][rows]


_PADDED = PaddedTrunk()


def add_head(
    model: Any, autocast: Callable[[], AbstractContextManager], stats: tuple[str, ...], trunk: PaddedTrunk
) -> None:
    """`model(..., labels=[B, L], fused_lm_head=True)` returns `TokenStats` of the N rows with a label, in row order.

    As TRL's own patch it replaces the instance's `forward`, so that DDP, peft and hooks stay around it; every other
    call goes to the forward that was there. `autocast` makes the context of mixed precision, which accelerate puts
    around the forward that is replaced.
    """
    before = model.forward
    scale, softcap = logit_scaling(model.config.get_text_config())

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            with trunk.own_forward(self):
                return before(*args, **kwargs) if labels is None else before(*args, labels=labels, **kwargs)
        with autocast():
            head = self.get_output_embeddings()
            targets = labels[:, 1:]
            rows = targets != -100
            found = linear_token_logps(
                trunk.hidden(self, rows, *args, **kwargs),
                head.weight,
                targets[rows],
                bias=getattr(head, "bias", None),
                logit_scale=scale,
                softcap=softcap,
                stats=stats,
            )
        return found if isinstance(found, TokenStats) else TokenStats(found)

    vars(forward)["_dpo_trunk"] = trunk
    model.forward = types.MethodType(forward, model)


class _Tokens(NamedTuple):
    """A batch's completion tokens."""

    labels: Tensor
    """[B, L] token ids, -100 outside completions."""
    mask: Tensor
    """[B, L - 1] bool: where position t + 1 is a completion token."""
    weights: Tensor | None
    """[B, L - 1] float64 weight of each token's log-prob (LD-DPO), or None for 1."""

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], ld_alpha: float | None) -> "_Tokens":
        completion = inputs["completion_mask"] != 0
        labels = inputs["input_ids"].masked_fill(~completion, -100)
        mask = completion[:, 1:]
        if ld_alpha is None:
            return cls(labels, mask, None)
        # LD-DPO (arXiv:2409.06411): tokens beyond the length that chosen and rejected share count alpha
        position, length = mask.cumsum(1), mask.sum(1)
        shared = torch.minimum(*length.chunk(2)).repeat(2)
        return cls(labels, mask, torch.where(position <= shared.unsqueeze(1), 1.0, ld_alpha).double())

    def spread(self, values: Tensor) -> Tensor:
        """[N] to [B, L - 1] float64, 0 elsewhere."""
        values = values.double()
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def sums(self, values: Tensor) -> Tensor:
        """[N] summed by sequence, weighted: [B] float64."""
        spread = self.spread(values)
        return (spread if self.weights is None else spread * self.weights).sum(1)


def _inputs_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    ours = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    return {name: value for name, value in inputs.items() if name not in ours} | {"use_cache": False}


def _reference(trainer: Any, inputs: Mapping[str, Any], labels: Tensor, model: Any = None) -> Tensor:
    """Per-token log-probs [N] of the reference: its model, the adapter "ref", or the policy without its adapter."""
    from trl.models.utils import disable_gradient_checkpointing  # pyright: ignore[reportMissingImports]
    from trl.trainer.utils import use_adapter  # pyright: ignore[reportMissingImports]

    adapter: AbstractContextManager = nullcontext()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.ref_model is None and hasattr(policy, "peft_config"):
        adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
    model = model or trainer.ref_model or trainer.model
    checkpointing = disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
    with torch.no_grad(), checkpointing, adapter:
        return model(**_inputs_of(inputs), labels=labels, fused_lm_head=True).logps


def _loss(trainer: Any, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's loss (scalar) and, for the metrics, sums over its pairs and tokens."""
    tokens = _Tokens.of(inputs, trainer.ld_alpha)
    found: TokenStats = model(**_inputs_of(inputs), labels=tokens.labels, fused_lm_head=True)
    if trainer.precompute_ref_logps:
        ref = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]).double()
        # both sums rounded alike: a policy that equals its reference has margins of exactly 0
        delta = tokens.sums(found.logps).float().double() - ref
    else:
        per_token = _reference(trainer, inputs, tokens.labels)
        ref = tokens.sums(per_token)
        # token by token: two sums of thousands of nats would lose the digits of their difference
        delta = tokens.sums(found.logps.double() - per_token.double())
    weights = _wpo_weights(tokens, found) if trainer.use_weighting else None
    loss = delta.new_zeros((), dtype=torch.float32)
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        loss = loss + weight * _term(trainer, name, tokens, found, delta, ref, weights)
    return loss, _sums(tokens, found, trainer.beta * delta.detach(), inputs)


def _term(
    trainer: Any, name: str, tokens: _Tokens, found: TokenStats, delta: Tensor, ref: Tensor, weights: Tensor | None
) -> Tensor:
    """One of the losses, from log ratios and the reference's log-probs [B] float64."""
    chosen, rejected = halves(len(delta), delta.device)
    if name == "sft":
        return -tokens.spread(found.logps).chunk(2)[0].sum().float() / tokens.mask.chunk(2)[0].sum()
    if LOSSES[name].coupled == "batch":  # sorts log-probs, of policy and reference apart
        policy, base = ref + delta, ref
    else:
        policy, base = delta.float(), torch.zeros_like(delta, dtype=torch.float32)
    options = loss_options(trainer.args, name)
    if PairCall.check(name, trainer.beta, "mean", **options).lengths:
        options["lengths"] = tokens.mask.sum(1)
    return pair_loss(
        policy, base, chosen, rejected, loss=name, beta=trainer.beta, pair_weights=weights, **options
    ).loss.float()


def _wpo_weights(tokens: _Tokens, found: TokenStats) -> Tensor:
    """[T] WPO (arXiv:2406.11827, eq. 2): exp of the mean of lp - log sum p^2, of both completions together."""
    assert found.log_sum_sq is not None
    aligned = tokens.spread((found.logps - found.log_sum_sq).detach()).sum(1)
    chosen, rejected = (aligned / tokens.mask.sum(1).clamp(min=1)).chunk(2)
    return (chosen + rejected).exp().float()


def _sums(tokens: _Tokens, found: TokenStats, rewards: Tensor, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    assert found.entropy is not None
    assert found.mean_logit is not None
    assert found.max_is_target is not None
    logps, logits = tokens.sums(found.logps.detach()).chunk(2), tokens.spread(found.mean_logit).chunk(2)
    lengths = [part.sum() for part in tokens.mask.chunk(2)]
    won, lost = rewards.chunk(2)
    return {
        "pairs": torch.full_like(won, 1.0).sum(),
        "chosen_tokens": lengths[0],
        "rejected_tokens": lengths[1],
        "all_tokens": inputs["attention_mask"].sum(),
        "entropy": found.entropy.double().sum(),
        "correct_tokens": tokens.spread(found.max_is_target).chunk(2)[0].sum(),
        "logits/chosen": logits[0].sum(),
        "logits/rejected": logits[1].sum(),
        "logps/chosen": logps[0].sum(),
        "logps/rejected": logps[1].sum(),
        "rewards/chosen": won.sum(),
        "rewards/rejected": lost.sum(),
        "rewards/accuracies": (won > lost).sum(),
    }


def _log(trainer: Any, sums: Mapping[str, Tensor]) -> None:
    """TRL's metrics, by its names: true means over the pairs and tokens of all ranks, in one transfer."""
    mode = "train" if trainer.model.training else "eval"
    stacked = torch.stack([value.double() for value in sums.values()])
    total = trainer.accelerator.reduce(stacked, reduction="sum")
    s = dict(zip(sums, total.tolist(), strict=True))  # host sync, the only one
    metrics = trainer._metrics[mode]

    def mean(name: str, over: str, of: str | None = None) -> None:
        metrics[name].append(s[of or name] / s[over] if s[over] else 0.0)

    s["tokens"] = s["chosen_tokens"] + s["rejected_tokens"]
    mean("entropy", "tokens")
    if mode == "train":
        trainer._total_train_tokens += int(s["all_tokens"])
    metrics["num_tokens"] = [trainer._total_train_tokens]
    mean("logits/chosen", "chosen_tokens")
    mean("logits/rejected", "rejected_tokens")
    mean("mean_token_accuracy", "chosen_tokens", of="correct_tokens")
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        mean(name, "pairs")
    metrics["rewards/margins"].append(metrics["rewards/chosen"][-1] - metrics["rewards/rejected"][-1])


class _Fused:
    """What `patch_trl` puts in front of DPOTrainer in the order of methods."""

    _dpo_trunk: PaddedTrunk

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        initialize: Any = super().__init__
        options = inspect.signature(initialize).bind_partial(*args, **kwargs).arguments.get("args")
        if options is not None:
            check_options(options)  # before any model is loaded
        initialize(*args, **kwargs)
        _install(self, self._dpo_trunk)

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The reference's completion log-probs (chosen [T], rejected [T]) of a padded batch, fp32."""
        trainer: Any = self
        _install(trainer, self._dpo_trunk)  # DPOTrainer.__init__ precomputes before it returns
        tokens = _Tokens.of(inputs, trainer.ld_alpha)
        return tokens.sums(_reference(trainer, inputs, tokens.labels, model)).float().chunk(2)

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        trainer: Any = self
        loss, sums = _loss(trainer, model, inputs)
        _log(trainer, sums)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**_inputs_of(inputs))


def _install(trainer: Any, trunk: PaddedTrunk) -> None:
    """Gives the trainer's models our head, once."""
    check_trainer(trainer)
    stats = (*STATS, "log_sum_sq") if trainer.use_weighting else STATS
    models = _models(trainer)
    new = [(m, needed) for m, needed in zip(models, (stats, ()), strict=False) if not _is_patched(m.forward, trunk)]
    if new:
        trunk.check(trainer, models)
    for model, needed in new:
        add_head(model, trainer.accelerator.autocast, needed, trunk)


def _is_patched(held: Any, trunk: PaddedTrunk) -> bool:
    """Whether a trainer's class or a model's forward is ours already. ValueError if it has another trunk."""
    found = getattr(held, "_dpo_trunk", None)
    if found not in (None, trunk):
        raise ValueError("target: expected a trainer that is not patched, found one with another forward")
    return found is not None


@functools.cache
def _fused(base: type, trunk: PaddedTrunk) -> type:
    named = {"__doc__": base.__doc__, "__module__": base.__module__, "_dpo_trunk": trunk}
    return type(base.__name__, (_Fused, base), named)


def patch_trl(target: Any, *, trunk: PaddedTrunk = _PADDED) -> Any:
    """TRL's DPOTrainer with this package's LM head and loss: same arguments, metrics and results, less time and memory.

    target: a trainer (`patch_trl(trainer)`, after which `trainer.train()` runs here; returned too), or the class or a
    subclass of it (`DPOTrainer = patch_trl(DPOTrainer)`, a new class: nothing global changes). Only completion tokens
    reach the LM head, for policy and reference; log ratios are summed token by token in float64. Honoured: every
    loss_type and option of the loss, precompute_ref_log_probs (through the class also the precomputation itself),
    sync_ref_model, peft adapters (not of the head), mixed precision, DDP, and whatever lies outside loss and head.
    ValueError names any other option and its value, and any that TRL ignores. trunk: how hidden rows are computed;
    `dpo.patch_trl` passes one that packs the batch and computes each prompt once.
    """
    trl = importlib.import_module("trl")
    if not trl.__version__.startswith("1.16."):
        raise ValueError(f"trl: expected version 1.16, whose trainer this replaces parts of, found {trl.__version__}")
    DPOTrainer = trl.DPOTrainer
    if isinstance(target, type) and issubclass(target, DPOTrainer):
        return target if _is_patched(target, trunk) else _fused(target, trunk)
    if not isinstance(target, DPOTrainer):
        found = target.__name__ if isinstance(target, type) else type(target).__name__
        raise ValueError(f"target: expected trl's DPOTrainer, a subclass, or a trainer of it, found {found}")
    _install(target, trunk)  # or refuses it and leaves it as it is
    if not _is_patched(type(target), trunk):
        target.__class__ = _fused(type(target), trunk)
    return target
