"""The load-balancing loss of mixtures of experts: Transformers' own, over a whole step, however it is packed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo.cli import main
from dpo.engine import forward_backward, forward_only
from dpo.errors import UserError
from dpo.loss import Objective
from dpo.metrics import read_json_lines
from dpo.model import prepare
from dpo.packing import Group, Layout, pack
from dpo.reference import OnlineReference
from dpo.router import experts_of
from dpo.steps import StepPlan, build_step
from dpo.train import enable_checkpointing
from tests.architectures.families import build
from tests.train.toy import Groups, random_groups, toy_mixture, write_model, write_pairs

WHOLE = StepPlan(token_budget=10_000, two_phase=True)
WEIGHT = 7.0
"""Large, so that a mistake in it shows beside the preference loss."""
# Transformers takes the statistics in fp32, and so do the routers
VALUE_BOUND, GRAD_BOUND = 1e-6, 1e-6
pytestmark = pytest.mark.filterwarnings("ignore")


def groups_of(vocabulary: int) -> Groups:
    return random_groups(6, vocabulary=vocabulary)


def train(
    model: PreTrainedModel, plan: StepPlan = WHOLE, weight: float = WEIGHT, loss_scale: float = 1.0
) -> tuple[float | None, dict[str, Tensor], int]:
    """The router loss of a step, all gradients, and the number of bins."""
    groups = groups_of(model.config.get_text_config().vocab_size)
    objective = Objective(beta=0.3, router_aux_loss=weight)
    prepare(model, plan.layout)
    step = build_step(groups, range(len(groups)), plan)
    model.zero_grad()
    reference = OnlineReference(model, replace(objective, router_aux_loss=0))
    result = forward_backward(model, step, reference, objective, loss_scale)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return (result.routers[0].item() if result.routers else None), grads, len(step.all_bins)


def transformers_own(model: PreTrainedModel, groups: Sequence[Group]) -> Tensor:
    """`load_balancing_loss_func` over plain forwards, a sequence each: of the first completion with the prompt, of the
    others their own tokens."""
    layers: list[list[Tensor]] = []
    for group in groups:
        for index, completion in enumerate(group.completions):
            ids = torch.tensor([[*group.prompt, *completion]])
            logits = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
            start = len(group.prompt) if index else 0
            layers.append([layer.reshape(ids.shape[1], -1)[start:] for layer in logits])
    whole = tuple(torch.cat(layer) for layer in zip(*layers, strict=True))
    return sys.modules[type(model).__module__].load_balancing_loss_func(whole, *experts_of(model))


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    names = sorted(found)
    a, b = (torch.cat([side[name].flatten() for name in names]) for side in (found, expected))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "model_type",
    [
        *("mixtral", "qwen3_moe"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmoe", "qwen2_moe", "granitemoe", "jetmoe")),
    ],
)
def test_value_and_gradient_are_those_of_transformers(model_type: str) -> None:
    model = build(model_type)
    groups = groups_of(model.config.vocab_size)
    model.zero_grad()
    expected = transformers_own(model, groups)
    (WEIGHT * expected).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    value, grads, _ = train(model)
    _, without, _ = train(model, weight=0.0)
    assert value == pytest.approx(expected.item(), rel=VALUE_BOUND)
    assert value != pytest.approx(experts_of(model)[1], rel=1e-3)  # what balanced experts have
    zero = torch.zeros(())
    found = {name: grads[name] - without.get(name, zero) for name in plain}
    assert relative(found, plain) < GRAD_BOUND
    untouched = grads.keys() - plain.keys()
    assert all(torch.equal(grads[name], without[name]) for name in untouched)


@pytest.fixture(scope="module")
def base() -> tuple[float | None, dict[str, Tensor], int]:
    return train(build("mixtral"))


@pytest.mark.parametrize(
    ("change", "checkpointing"),
    [
        ({"token_budget": 120}, False),
        ({"token_budget": 40}, False),  # groups do not fit: parts that repeat the prompt
        ({"token_budget": 40, "layout": "packed"}, True),
        ({"token_budget": 90, "layout": "padded"}, False),
    ],
    ids=str,
)
def test_the_loss_does_not_depend_on_how_a_step_is_packed(
    base: tuple[float, dict[str, Tensor], int], change: dict[str, Any], checkpointing: bool
) -> None:
    model = build("mixtral")
    if checkpointing:
        enable_checkpointing(model)
    value, grads, bins = train(model, replace(WHOLE, **change))
    assert base[2] == 1 < bins
    assert value == pytest.approx(base[0], rel=1e-8)
    assert relative(grads, base[1]) < GRAD_BOUND


def test_its_gradient_is_scaled_with_the_rest(base: tuple[float, dict[str, Tensor], int]) -> None:
    value, grads, _ = train(build("mixtral"), loss_scale=8.0)
    assert value == base[0]
    assert relative({name: grad / 8 for name, grad in grads.items()}, base[1]) < 1e-12


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_every_token_counts_once(layout: Layout) -> None:
    groups = [Group([5, 6, 7], [[8], [9, 10]], []), Group([11], [[12, 13, 14], [15]], [])]
    batch = pack(groups, layout=layout)
    assert sorted(batch.input_ids.flatten()[batch.counted].tolist()) == list(range(5, 16))
    other = pack(groups, layout=layout, counted_prompts=[False, True])
    assert sorted(other.input_ids.flatten()[other.counted].tolist()) == list(range(8, 16))


def test_evaluation_and_a_step_in_one_phase() -> None:
    model = build("mixtral")
    groups = groups_of(model.config.vocab_size)
    prepare(model, "shared")
    plain, objective = Objective(), Objective(router_aux_loss=1.0)
    reference = OnlineReference(model, plain)
    step = build_step(groups, range(len(groups)), WHOLE)
    ours, theirs = (forward_only(model, step, reference, of).sums.sums for of in (objective, plain))
    assert torch.equal(ours, theirs)
    one_phase = build_step(groups, range(len(groups)), replace(WHOLE, two_phase=False))
    with pytest.raises(ValueError, match="router_aux_loss: expected a step in the two-phase form"):
        forward_backward(model, one_phase, reference, objective)


@pytest.mark.parametrize(
    ("model_type", "found"), [("llama", "which has no router"), ("deepseek_v3", "balances otherwise")]
)
def test_models_without_the_loss_are_refused(model_type: str, found: str) -> None:
    with pytest.raises(UserError, match=rf"^--router-aux-loss: expected .* found \w+ForCausalLM, .*{found}"):
        experts_of(build(model_type))


# --- From the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    write_model(folder / "llama")
    write_model(folder / "model")  # for the tokenizer
    toy_mixture().save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    return folder


def run(toy: Path, output: Path, *flags: str, model: str = "model") -> list[dict[str, Any]]:
    words = ["train", "--model", str(toy / model), "--data", str(toy / "pairs.jsonl"), "--output", str(output)]
    main([*words, "--pairs-per-step", "8", "--lr", "1e-3", "--warmup-steps", "0", "--max-steps", "3", *flags])
    return read_json_lines(output / "metrics.jsonl")


def test_the_flag_reaches_the_weights(toy: Path, tmp_path: Path) -> None:
    off = run(toy, tmp_path / "off")
    on = run(toy, tmp_path / "on", "--router-aux-loss", "5")
    small = run(toy, tmp_path / "small", "--router-aux-loss", "5", "--token-budget", "90")
    assert all("router_aux_loss" not in record for record in off)
    assert small[0]["bins"] > on[0]["bins"]
    for ours, theirs in zip(small, on, strict=True):
        for name in ("loss", "grad_norm", "router_aux_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    assert on[0]["loss"] == pytest.approx(off[0]["loss"], rel=1e-6)  # the router loss has a column of its own
    assert on[0]["grad_norm"] != pytest.approx(off[0]["grad_norm"], rel=1e-2)
    gates = [
        {
            n: p
            for n, p in AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").named_parameters()
            if "gate" in n
        }
        for name in ("on", "off")
    ]
    assert not all(torch.equal(gates[0][name], gates[1][name]) for name in gates[0])


def test_a_model_without_routers_is_refused_before_anything_is_written(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(toy, tmp_path / "run", "--router-aux-loss", "0.1", model="llama")
    assert stop.value.code == 2
    assert "--router-aux-loss: expected a mixture of experts, found LlamaForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        run(toy, tmp_path / "run", "--router-aux-loss", "-1")
    assert "--router-aux-loss: expected zero or more, found -1.0" in capsys.readouterr().err
