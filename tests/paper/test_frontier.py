"""The reward-KL frontier: its sampler, its estimates, and what it concludes, against enumeration."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from bench.data.fetch_snippets import clean
from bench.paper import sampling, summary
from bench.paper.frontier import Experiment, same_settings
from bench.paper.preferences import Preferences, Trainer, compare, with_rankings
from bench.paper.settings import QUICK, runs
from dpo.errors import UserError
from dpo.model import prepare
from dpo.packing import Group
from tests.train.toy import toy_config

END, VOCABULARY, PROMPT, NEW = 1, 4, 3, 3


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = toy_config(VOCABULARY, bos_token_id=None, eos_token_id=END, pad_token_id=END, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def slow_sample(model: LlamaForCausalLM, prompts: Tensor, seed: int) -> Tensor:
    """Without a cache: the whole sequence at every step."""
    generator = torch.Generator().manual_seed(seed)
    rows = prompts
    for _ in range(NEW):
        probabilities = model(input_ids=rows, use_cache=False).logits[:, -1].softmax(-1)
        token = torch.multinomial(probabilities, 1, generator=generator)
        over = (rows[:, PROMPT:] == END).any(1, keepdim=True)
        rows = torch.cat([rows, token.masked_fill(over, END)], 1)
    return rows


def test_the_sampler_with_a_cache_writes_what_one_without_writes():
    model, prompts = model_of(0), torch.randint(VOCABULARY, (64, PROMPT), generator=torch.Generator().manual_seed(1))
    rows = sampling.sample(model, prompts, NEW, seed=5)
    assert torch.equal(rows, slow_sample(model, prompts, seed=5))
    completions = sampling.completions_of(rows, PROMPT, END)
    assert {len(y) for y in completions} == {1, 2, 3}
    assert all(END not in y[:-1] and (len(y) == NEW or y[-1] == END) for y in completions)


def test_both_estimates_of_the_divergence_have_the_exact_one_as_their_mean():
    """Over all completions, weighted by how likely the policy writes them."""
    policy, reference = model_of(0), model_of(1)
    bodies = itertools.product(range(VOCABULARY), repeat=NEW)
    whole = [y for y in bodies if all(b == END for a, b in itertools.pairwise(y) if a == END)]
    rows = torch.tensor([[2, 0, 3, *y] for y in whole])
    mask = sampling.completion_mask(rows, PROMPT, END)
    logps = []
    for model in (policy, reference):
        with torch.no_grad():
            token = model(input_ids=rows).logits.double().log_softmax(-1)[:, PROMPT - 1 : -1]
        logps.append((token.gather(-1, rows[:, PROMPT:, None])[..., 0] * mask).sum(1))
    weights = logps[0].exp()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-6)
    expected = (weights * (logps[0] - logps[1])).sum().item()
    assert expected > 0.05
    exact, plain = sampling.divergences(policy, reference, rows, PROMPT)
    assert (weights * exact).sum().item() == pytest.approx(expected, abs=1e-6)
    assert (weights * plain).sum().item() == pytest.approx(expected, abs=1e-6)
    assert not torch.allclose(exact, plain, atol=0.01)


def test_best_of_n_is_the_mean_over_all_subsets():
    rewards = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 4, 6):
        subsets = list(itertools.combinations(range(6), n))
        by_hand = torch.stack([rewards[:, list(s)].max(1).values for s in subsets]).mean(0)
        mean, error, kl = sampling.best_of(rewards, n)
        assert mean == pytest.approx(by_hand.mean().item())
        assert error == pytest.approx(by_hand.std().item() / math.sqrt(5))
        assert kl == pytest.approx(math.log(n) - (n - 1) / n)


def test_errors_count_prompts_and_not_samples():
    values = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    assert sampling.mean_and_error(values, 2) == (2.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))


def test_pairs_are_all_that_the_rewards_decide():
    rows = torch.tensor([[0, 2, END], [0, 3, END], [0, 0, 2], [2, 3, 3], [2, END, END], [2, 2, END]])
    rewards = torch.tensor([[0.1, 0.5, 0.1], [0.2, 0.2, 0.2]])
    (group,) = compare(rows, rewards, 1, END)
    assert (group.prompt, group.completions) == ([0], [[2, END], [3, END], [0, 2]])
    assert group.pairs == [(1, 0), (1, 2)]


def point(method: str, setting: str, kl: float, reward: float, seed: int = 0, **more: float) -> summary.Point:
    held = {"method": method, "setting": setting, "seed": seed, "steps": 1}
    return held | {"kl": kl, "kl_se": 0.0, "reward": reward, "reward_se": 0.03} | more


def test_comparisons_at_equal_divergence():
    points = [
        point("reference", "", 0.0, 0.1),
        point("DPO", "beta 1", 1.0, 0.3),
        point("DPO", "beta 0.1", 3.0, 0.5),
        point("preferred-ft", "lr x1", 2.0, 0.2),
        point("unlikelihood", "weight 1", 9.0, 0.2),
    ]
    merged = summary.merge_seeds(points)
    curve = summary.frontier(merged, "DPO")
    assert [p["kl"] for p in curve] == [0.0, 1.0, 3.0]
    assert summary.reward_at(curve, 2.0) == (pytest.approx(0.4), pytest.approx(0.03 / math.sqrt(2)))
    assert summary.reward_at(curve, 9.0) is None
    found = next(p for p in merged if p["method"] == "preferred-ft")
    assert summary.difference(merged, found) == (pytest.approx(0.2), pytest.approx(0.03 * math.sqrt(1.5)))
    text = summary.findings(points)
    assert "DPO: reward rises as beta falls: +0.200" in text
    assert "preferred-ft at equal KL, DPO has more reward at 1 of 1" in text


def test_errors_of_a_divergence_count_through_the_slope():
    low, high = ({"kl": kl, "reward": kl, "reward_se": 0.0, "kl_se": 0.1} for kl in (0.0, 2.0))
    reward, error = summary.reward_at([low, high], 1.0) or (0, 0)
    assert (reward, error) == (1.0, pytest.approx(0.1 / math.sqrt(2)))


def test_seeds_are_averaged_and_their_spread_counts():
    points = [point("DPO", "beta 1", kl, 0.3, seed) for seed, kl in enumerate((1.0, 2.0, 3.0))]
    (merged,) = summary.merge_seeds(points)
    assert merged["kl"] == 2.0
    assert merged["kl_se"] == pytest.approx(1 / math.sqrt(3))
    assert merged["reward_se"] == pytest.approx(0.03 / math.sqrt(3))


def test_methods_are_compared_within_a_seed():
    """Two references of different rewards: the distance of two methods is the same in both."""
    points = []
    for seed, level in enumerate((0.1, 0.7)):
        points += [
            point("reference", "", 0.0, level, seed),
            point("DPO", "beta 1", 2.0, level + 0.4, seed),
            point("DPO", "beta 0.1", 3.0, level + 0.5, seed),
            point("preferred-ft", "lr x1", 0.5, level - 0.3, seed) | {"steps": 30},
            point("preferred-ft", "lr x1", 1.0 + seed, level + 0.1, seed) | {"steps": 60 + seed},
        ]
    found = summary.differences(points)
    assert found["preferred-ft", "lr x1, 1/2 of the steps"] == (
        pytest.approx(0.4),
        pytest.approx(0.03 * math.sqrt(1.625 / 2)),
    )
    assert found["preferred-ft", "lr x1, all steps"] == (pytest.approx(0.2), pytest.approx(0.1))  # 0.1 and 0.3
    rewards = summary.at_equal_kl(points)
    assert rewards["DPO", 1.0] == (pytest.approx(0.6), pytest.approx(0.3))  # 0.3 and 0.9
    reward, _ = rewards["preferred-ft", 0.5] or (0, 0)
    assert reward == pytest.approx(0.4 + (0.05 + 0.025) / 2)  # not through the earlier point
    assert rewards["preferred-ft", 2.0] is None  # beyond the first seed's
    assert summary.rises(points) == {
        name: [(pytest.approx(rise), pytest.approx(error))]
        for name, rise, error in (("kl", 1.0, 0.0), ("reward", 0.1, 0.03))
    }


def test_results_are_written(tmp_path):
    points = [point("reference", "", 0.0, 0.1), point("DPO", "beta 1", 1.0, 0.3), point("DPO", "beta 0.1", 3.0, 0.5)]
    summary.write_results(tmp_path, points, QUICK)
    assert "| DPO | beta 0.1 | 3.00 ± 0.00 | 0.500 ± 0.030 |" in (tmp_path / "frontier.md").read_text()
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert '"seeds": [' in (tmp_path / "frontier.json").read_text()


def test_snippets_are_cleaned_and_counted_once():
    texts = ["A warm  and quiet film , at last .", "a warm and quiet film, at last!", "too short", "naïve " * 8]
    assert clean(texts) == ["A warm and quiet film , at last ."]


def test_orders_of_a_group_are_those_that_its_pairs_leave_open():
    pairs = [(2, 0), (2, 1), (2, 3), (0, 3), (1, 3)]
    (group,) = with_rankings(Preferences([Group([0], [[1]] * 4, pairs)]))
    assert list(group.rankings) == [[2, 0, 1, 3], [2, 1, 0, 3]]


def test_every_run_trains_its_own_loss():
    """The first step's gradient of every run, through the trainer, against its formula on plain log-probs."""
    groups = Preferences(
        Group([2, 3], [[2, END], [3, 3, 2], [0, END]], [(0, 1), (0, 2), (1, 2)], row=k) for k in range(3)
    )
    settings = replace(QUICK, betas=(0.1,), ipo_betas=(0.1,), prompts_per_step=3)
    base = model_of(0)
    trainer = Trainer(base, groups, settings, seed=0)
    found = {run.method: run for run in runs(settings) if run.method != "unlikelihood" or "0.3" in run.setting}
    won, lost = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    formulas = {
        "DPO": lambda d, lp, n: -F.logsigmoid(0.1 * (d[won] - d[lost])).mean(),
        "cDPO": lambda d, lp, n: (
            -(0.9 * F.logsigmoid(0.1 * (d[won] - d[lost])) + 0.1 * F.logsigmoid(0.1 * (d[lost] - d[won]))).mean()
        ),
        "IPO": lambda d, lp, n: (d[won] - d[lost] - 5.0).square().mean(),
        "Plackett-Luce": lambda d, lp, n: sum((0.1 * d[k:]).logsumexp(0) - 0.1 * d[k] for k in range(3)),
        "preferred-ft": lambda d, lp, n: -(lp / n)[won].mean(),
        "unlikelihood": lambda d, lp, n: (0.3 * lp[lost] - lp[won]).mean(),
    }
    formulas["DPO, lower rate"] = formulas["DPO"]
    assert found.keys() == formulas.keys()
    for method, run in found.items():
        (index,) = range(len(trainer.steps))
        policy = copy.deepcopy(base)
        trainer.backward(run, policy, trainer.steps_of(run)[index])
        expected = copy.deepcopy(base)
        prepare(expected, "padded")
        lp = torch.stack([plain_logp(expected, groups[0].prompt, y) for y in groups[0].completions])
        n = torch.tensor([2.0, 3.0, 2.0])
        formulas[method](lp - lp.detach(), lp, n).backward()
        for ours, theirs in zip(policy.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def plain_logp(model: LlamaForCausalLM, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-prob of one completion by the stock model."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return logps[:-1].gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def test_a_second_call_goes_on_and_other_settings_are_refused(tmp_path):
    experiment = Experiment.__new__(Experiment)
    experiment.folder, experiment.seed = tmp_path, 0
    (tmp_path / "points").mkdir()
    called = []

    def compute(name: str, fail: bool = False) -> Iterator[summary.Point]:
        called.append(name)
        yield {"steps": 1, "kl": 1.0, "kl_se": 0.1, "reward": 0.5, "reward_se": 0.1}
        if fail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.once("DPO", "beta 1", lambda: compute("interrupted", fail=True))
    assert experiment.points() == []
    for _ in range(2):
        experiment.once("DPO", "beta 1", lambda: compute("whole"))
    assert called == ["interrupted", "whole"]
    assert [(p["method"], p["setting"], p["kl"]) for p in experiment.points()] == [("DPO", "beta 1", 1.0)]

    same_settings(tmp_path / "settings.json", QUICK)
    same_settings(tmp_path / "settings.json", QUICK)
    with pytest.raises(UserError, match="expected points of the same settings"):
        same_settings(tmp_path / "settings.json", replace(QUICK, lr=1.0))
