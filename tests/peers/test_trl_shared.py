"""dpo.patch_trl: TRL's trainer on the packed, prefix-shared forward against TRL's own, step by step."""

from __future__ import annotations

import pytest
import torch
from dpo_kernels import patch_trl as patch_head
from transformers import AutoModelForCausalLM

from dpo import patch_trl
from dpo import trl as hook
from tests.peers.test_trl import assert_same, build, ours_and_theirs, ours_and_theirs_with_adapters, pairs, run, trl
from tests.train.toy import write_model

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("toy") / "model")


def test_twenty_steps_have_trls_curve_and_metrics(toy, tmp_path):
    options = {"max_steps": 20, "eval_dataset": pairs(6, seed=1), "eval_strategy": "steps", "eval_steps": 10}
    theirs = run(build(toy, tmp_path, **options))
    ours = run(patch_trl(build(toy, tmp_path, **options)))
    assert theirs[-2]["loss"] < 0.9 * theirs[0]["loss"]
    assert ours[0]["rewards/margins"] == ours[0]["rewards/chosen"] == 0.0
    assert_same(ours, theirs, tolerance=1e-4)


HONOURED = {
    "beta": {"beta": 0.5},
    "ld_alpha": {"ld_alpha": 0.25},
    "aot": {"loss_type": ["aot", "sft"]},
    "ipo, weighted": {"loss_type": ["ipo"], "use_weighting": True},
    "precompute": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 8},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "prompts that differ": {"max_length": 24, "truncation_mode": "keep_end"},
    "completions cut off": {"max_length": 9},
    "padding": {"pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("options", HONOURED.values(), ids=HONOURED.keys())
@pytest.mark.parametrize("form", ["class", "trainer"])
def test_honoured_options_compute_what_trl_computes(toy, tmp_path, options, form):
    assert_same(*ours_and_theirs(patch_trl, form, toy, tmp_path, options))


@pytest.mark.parametrize("start", ["new", "continued"])
def test_peft_adapters_and_their_reference(toy, tmp_path, start):
    ours, theirs = ours_and_theirs_with_adapters(patch_trl, start, toy, tmp_path)
    assert_same(ours, theirs)
    assert ours[0]["rewards/margins"] == 0.0


def test_the_first_batch_is_compared_without_dropout(toy, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights=False)
    options = {"peft_config": config, "disable_dropout": False, "max_steps": 2}
    found = []

    def spy(model, groups):
        found.append(check(model, groups).noise)

    check = hook.check_sharing
    monkeypatch.setattr(hook, "check_sharing", spy)
    records = run(patch_trl(build(toy, tmp_path, **options)))
    assert len(found) == 1
    assert found[0] < 1e-4
    assert abs(records[0]["rewards/margins"]) > 1e-3  # the policy dropped something


def test_bf16_is_as_near_to_fp32_as_trls(toy, tmp_path):
    truth = run(build(toy, tmp_path))
    # packing needs attention of its own, so the noise is that between attentions of TRL's
    models = [AutoModelForCausalLM.from_pretrained(toy, attn_implementation=name) for name in ("sdpa", "eager")]
    theirs = [run(build(toy, tmp_path, model=model, bf16=True)) for model in models]
    ours = run(patch_trl(build(toy, tmp_path, bf16=True)))
    assert ours[0]["rewards/margins"] == 0.0
    for name in ("loss", "logps/chosen", "entropy"):
        allowed = max(abs(b[name] - t[name]) for records in theirs for b, t in zip(records, truth, strict=True))
        assert max(abs(a[name] - t[name]) for a, t in zip(ours, truth, strict=True)) <= 1.5 * allowed + 1e-4, name


def test_a_prompt_is_computed_once_for_all_of_its_completions(toy, tmp_path, monkeypatch):
    seen, tokens = [], []
    trunk = hook.trunk

    def spy(model, batch):
        seen.append(batch.num_tokens)
        return trunk(model, batch)

    monkeypatch.setattr(hook, "trunk", spy)
    trainer = patch_trl(build(toy, tmp_path, max_steps=1))
    compute = type(trainer)._compute_loss

    def count(self, model, inputs, return_outputs):
        completions = int(inputs["completion_mask"].sum())
        tokens.append((int(inputs["attention_mask"].sum()) - completions) // 2 + completions)
        return compute(self, model, inputs, return_outputs)

    monkeypatch.setattr(type(trainer), "_compute_loss", count)
    trainer.train()
    assert seen == 2 * tokens  # policy and reference


def test_sequences_of_equal_prompts_are_one_group():
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 3, 0, 0], [4, 6, 7, 0, 0], [5, 6, 2, 2, 0], [5, 6, 0, 0, 0]])
    lengths = torch.tensor([5, 3, 3, 4, 2])
    attended = (torch.arange(5) < lengths[:, None]).long()
    rows = (attended.bool() & (torch.arange(5) >= 2))[:, 1:]
    groups, order = hook.groups_of(ids, attended, rows)
    found = [(list(group.prompt), [list(y) for y in group.completions]) for group in groups]
    assert found == [([5, 6], [[7, 8, 9], [3], [2, 2]]), ([4, 6], [[7]])]
    assert order == [0, 1, 3, 2]


@pytest.mark.parametrize("place", ["left", "between", "prompt"])
def test_padding_elsewhere_than_on_the_right_is_refused(place):
    attended = torch.tensor([[1, 1, 1, 1, 0]])
    rows = torch.tensor([[False, True, True, False]])
    if place == "left":
        attended = attended.flip(1)
    elif place == "between":
        rows = torch.tensor([[True, False, True, False]])
    else:
        rows = torch.tensor([[False, True, False, False]])
    with pytest.raises(ValueError, match="expected a prompt, a completion and padding, found others in sequence 0"):
        hook.groups_of(torch.arange(5)[None], attended, rows)


def test_evaluation_gets_the_models_own_logits(toy, tmp_path):
    trainer = patch_trl(build(toy, tmp_path, max_steps=1))
    plain = build(toy, tmp_path, max_steps=1)
    inputs = trainer.data_collator([trainer.train_dataset[k] for k in range(3)])
    held = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(**held).logits, plain.model(**held).logits, rtol=0, atol=0)


def test_what_is_not_honoured_is_refused(toy, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = build(toy, tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="neftune_noise_alpha: patch_trl expected None"):
        patch_trl(trainer)
    assert type(trainer) is trl().DPOTrainer  # and trains as before
    run(trainer)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="peft_config: patch_trl expected adapters of weights"):
        patch_trl(build(toy, tmp_path, peft_config=config))
    dropping = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout 0\.1.*dpo_kernels\.patch_trl"):
        patch_trl(build(toy, tmp_path, model=dropping))
    with pytest.raises(ValueError, match="target: expected a trainer that is not patched"):
        patch_trl(patch_head(build(toy, tmp_path)))
    with pytest.raises(ValueError, match="expected a trainer that is not patched"):
        patch_trl(patch_head(trl().DPOTrainer))
    patched = patch_trl(trl().DPOTrainer)
    assert patch_trl(patched) is patched


def test_a_model_that_packing_gets_wrong_is_stopped(toy, tmp_path, monkeypatch):
    """The first batch is compared with plain forwards."""
    prepare = hook.pack

    def wrong(groups, **options):
        batch = prepare(groups, **options)
        batch.position_ids.zero_()
        return batch

    monkeypatch.setattr("dpo.checks.pack", wrong)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*differ"):
        patch_trl(build(toy, tmp_path)).train()
