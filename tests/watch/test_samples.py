"""--sample-prompts: policy and reference side by side, and the KL between them against an exact sum."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dpo.cli import main
from dpo.loss import Objective
from dpo.metrics import read_json_lines
from dpo.model import prepare
from dpo.samples import SamplePlan, estimate_kl, generate, sample_logps
from tests.train.toy import toy_config, write_model
from tests.watch.runs import even, train, write_rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_model(folder / "model")
    write_rows(folder / "pairs.jsonl", even, 16)
    write_rows(folder / "held_out.jsonl", even, 6, seed=1)
    (folder / "prompts.txt").write_text("0 \n\n12 \n345 \n")
    return folder


def go(toy, output, *flags):
    held_out = "--eval-data", str(toy / "held_out.jsonl"), "--lr", "3e-3", "--sample-tokens", "6"
    return train(toy / "model", toy / "pairs.jsonl", output, *held_out, *flags)


@pytest.mark.parametrize("flags", [(), ("--reference", "online"), ("--padded",), ("--token-budget", "48")], ids=str)
def test_samples_and_their_kl_are_in_the_run_folder(toy, tmp_path, flags):
    asked = "--sample-prompts", str(toy / "prompts.txt"), "--samples-per-prompt", "4", "--eval-every", "2"
    run = go(toy, tmp_path / "run", *asked, *flags)
    records, evals = read_json_lines(run / "samples.jsonl"), read_json_lines(run / "eval.jsonl")
    assert [(r["step"], r["prompt"]) for r in records] == [(k, p) for k in (0, 2, 4) for p in ("0 ", "12 ", "345 ")]
    before, after = records[:3], records[-3:]
    assert all(r["policy"] == r["reference"] for r in before)
    assert all(r["log_ratio"] == [0.0] * 4 for r in before)
    assert [r["reference"] for r in after] == [r["reference"] for r in before]
    assert any(r["policy"] != r["reference"] for r in after)
    assert evals[0]["kl"] == evals[0]["kl_se"] == 0.0
    means = [sum(r["log_ratio"]) / 4 for r in after]
    assert evals[-1]["kl"] == pytest.approx(sum(means) / 3)
    assert evals[-1]["kl_se"] == pytest.approx(torch.tensor(means).std().item() / math.sqrt(3), rel=1e-5)
    assert 0 < evals[-1]["sample_tokens"] <= 6


@pytest.mark.parametrize(
    "flags", [("--lora-r", "4"), ("--lora-r", "4", "--reference", "adapter-off"), ("--loss", "simpo")], ids=str
)
def test_adapters_and_losses_without_a_reference_are_sampled_too(toy, tmp_path, flags):
    asked = "--sample-prompts", "4", "--samples-per-prompt", "8", "--lr", "2e-2", "--eval-every", "2", "--beta", "0.5"
    run = go(toy, tmp_path / "run", *asked, *flags)
    records, evals = read_json_lines(run / "samples.jsonl"), read_json_lines(run / "eval.jsonl")
    assert all(r["policy"] == r["reference"] for r in records[:4])
    assert evals[0]["kl"] == 0.0
    assert [r["reference"] for r in records[-4:]] == [r["reference"] for r in records[:4]]
    assert any(r["policy"] != r["reference"] for r in records[-4:])
    assert evals[-1]["kl"] > 3 * evals[-1]["kl_se"] > 0


def test_log_ratios_are_those_of_plain_forwards(toy, tmp_path):
    run = go(toy, tmp_path / "run", "--sample-prompts", "3", "--sample-temperature", "0.3", "--lr", "1e-2")
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    models = [AutoModelForCausalLM.from_pretrained(folder).double() for folder in (run / "model", toy / "model")]
    checked = 0
    for record in read_json_lines(run / "samples.jsonl")[-3:]:
        prompt = tokenizer(record["prompt"]).input_ids
        completion = tokenizer(record["policy"][0], add_special_tokens=False).input_ids
        if tokenizer.decode(completion) != record["policy"][0] or "�" in record["policy"][0]:
            continue  # bytes that are no text do not come back from it
        ends = [completion, [*completion, tokenizer.eos_token_id]]
        ratios = []
        for ids in ends:
            sums = []
            for model in models:
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.3
                sums.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item())
            ratios.append(sums[0] - sums[1])
        assert min(abs(ratio - record["log_ratio"][0]) for ratio in ratios) < 1e-3
        checked += 1
    assert checked


def test_sampling_disturbs_nothing(toy, tmp_path):
    plain = go(toy, tmp_path / "plain")
    sampled = go(toy, tmp_path / "sampled", "--sample-prompts", "2", "--eval-every", "1")
    losses = [[r["loss"] for r in read_json_lines(run / "metrics.jsonl")] for run in (plain, sampled)]
    assert losses[0] == losses[1]


def test_temperature_0_takes_the_most_likely_token_and_gives_no_kl(toy, tmp_path):
    run = go(toy, tmp_path / "run", "--sample-prompts", "2", "--sample-temperature", "0", "--max-steps", "1")
    assert [r["kl"] for r in read_json_lines(run / "eval.jsonl")] == [None, None]
    record = read_json_lines(run / "samples.jsonl")[0]
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(toy / "model")
    ids = tokenizer(record["prompt"]).input_ids
    for _ in range(6):
        if ids[-1] == tokenizer.eos_token_id:
            break
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert record["policy"] == [tokenizer.decode(ids[-6:], skip_special_tokens=True)]


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(toy_config(5, initializer_range=0.6)).double().eval()


def test_the_estimate_is_the_exact_kl_of_all_sequences():
    """5 tokens, 3 steps: every sequence of policy and reference can be summed."""
    policy, reference = tiny(0), tiny(1)
    plan = SamplePlan(([2, 3],), ("",), 4000, 3, 1.0, 0, 10**5, "shared", (1,))
    ends = [[*ids, 1] for n in range(3) for ids in itertools.product((0, 2, 3, 4), repeat=n)]
    sequences = ends + [list(ids) for ids in itertools.product((0, 2, 3, 4), repeat=3)]
    for model in (policy, reference):
        prepare(model, "shared")
    objective = Objective()
    p, q = (torch.tensor(sample_logps(m, plan, [sequences], objective)) for m in (policy, reference))
    assert p.exp().sum() == pytest.approx(1.0, abs=1e-6)
    exact = (p.exp() * (p - q)).sum().item()
    samples = generate(policy, plan, objective)
    ours, theirs = (sample_logps(m, plan, samples, objective) for m in (policy, reference))
    kl = estimate_kl([a - b for a, b in zip(ours, theirs, strict=True)], 4000)
    assert kl.standard_error is not None
    assert kl.standard_error < 0.1 * exact
    assert abs(kl.mean - exact) < 4 * kl.standard_error
    # and the samples are the policy's own: how often each sequence comes
    found = {tuple(ids): samples[0].count(ids) / 4000 for ids in sequences}
    assert sum(found.values()) == pytest.approx(1.0)
    assert max(abs(found[tuple(ids)] - q.item()) for ids, q in zip(sequences, p.exp(), strict=True)) < 0.04


def test_the_standard_error_by_hand():
    assert estimate_kl([1.0, 3.0, 5.0, 7.0], 2).mean == 4.0
    assert estimate_kl([1.0, 3.0, 5.0, 7.0], 2).standard_error == pytest.approx(2.0)  # means 2 and 6
    assert estimate_kl([1.0, 3.0], 2).standard_error == pytest.approx(1.0)
    assert estimate_kl([1.0], 1).standard_error is None


def test_prompts_of_a_file_are_tokenised_as_for_training(toy, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("0 ", "12 ", "345 ")))
    runs = []
    for name, source in (("txt", toy / "prompts.txt"), ("jsonl", rows)):
        run = go(toy, tmp_path / name, "--sample-prompts", str(source), "--max-steps", "1")
        runs.append([(r["prompt"], r["policy"]) for r in read_json_lines(run / "samples.jsonl")])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "expected"),
        ('{"question": "x"}\n', "row 1: field 'prompt': expected a text or messages, found None"),
        ('{"prompt": ["x"]}\n', "row 1: field 'prompt' is not a list of messages"),
    ],
)
def test_files_without_prompts_get_one_line(toy, tmp_path, capsys, content, message):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        go(toy, tmp_path / "run", "--sample-prompts", str(path))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_sampling_needs_held_out_data(toy, tmp_path, capsys):
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl")]
    with pytest.raises(SystemExit):
        main([*words, "--output", str(tmp_path / "run"), "--sample-prompts", "2"])
    assert "--sample-prompts: expected --eval-data or --eval-fraction beside it" in capsys.readouterr().err
