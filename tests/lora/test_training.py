"""LoRA from the command line: training, references, checkpoints, plain peft, adapters of the LM head."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo.adapters import adapter_of, add_adapter, as_reference, head_parts
from dpo.config import TrainConfig
from dpo.errors import UserError
from dpo.inputs import load_policy, objective_of
from dpo.metrics import read_json_lines
from dpo.model import shared_logps, stock_attention
from dpo.packing import Group, pack
from dpo.reference import store_frozen
from tests.lora.runs import LORA, close, logits, score, train

peft: Any = pytest.importorskip("peft", reason="the lora extra is not installed")


def test_a_run_trains_the_adapter_and_nothing_else_and_plain_peft_loads_it(toy, plain):
    run, metrics = plain
    assert metrics[0]["margin"] == 0.0
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics[-1]["loss"] < 0.6
    names = {path.name for path in (run / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    settings = json.loads((run / "model" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (4, 32, "CAUSAL_LM")
    assert settings["base_model_name_or_path"] == str(toy / "model")
    weights = load_file(run / "model" / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2  # A and B of the seven linear layers of both blocks, none of the head
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(run / "model")
    base = AutoModelForCausalLM.from_pretrained(toy / "model")
    assert not torch.equal(logits(loaded), logits(base))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(base))


QUICK_REFERENCES = [(), ("--reference", "adapter-off", "--dtype", "bf16")]
SLOW_REFERENCES = [
    ("--reference", "adapter-off"),
    ("--reference", "online"),
    ("--dtype", "bf16"),
    ("--reference", "adapter-off", "--two-phase"),
    ("--reference", "adapter-off", "--padded"),
]


@pytest.mark.parametrize(
    ("start", "flags"),
    [
        *((start, flags) for start in ("new", "continued") for flags in QUICK_REFERENCES),
        *(
            pytest.param(start, flags, marks=pytest.mark.slow)
            for start in ("new", "continued")
            for flags in SLOW_REFERENCES
        ),
        # an adapter that goes on keeps its own dropout
        pytest.param("new", ("--reference", "adapter-off", "--lora-dropout", "0.5"), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_margins_of_step_0_are_exactly_zero(toy, adapter, tmp_path, start, flags):
    way = LORA if start == "new" else ("--adapter", str(adapter))
    first = train(toy, tmp_path / "run", *way, *flags, "--token-budget", "80")[0]
    assert first["bins"] > 1
    assert first["margin"] == first["chosen_reward"] == first["rejected_reward"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--reference", "adapter-off"),
        ("--reference", "online"),
        ("--two-phase",),
        ("--padded",),
        ("--gradient-checkpointing",),
        ("--token-budget", "60"),
        ("--head-plan", "frozen"),
        ("--head-plan", "recompute"),
    ],
    ids=" ".join,
)
def test_the_trajectory_does_not_depend_on_how_it_is_computed(toy, tmp_path, plain, flags):
    close(train(toy, tmp_path / "run", *LORA, *flags), plain[1])


@pytest.mark.slow
def test_continuing_an_adapter_is_measured_from_its_frozen_copy(toy, adapter, tmp_path):
    cached = train(toy, tmp_path / "cached", "--adapter", str(adapter))
    within = train(toy, tmp_path / "within", "--adapter", str(adapter), "--reference", "adapter-off")
    online = train(toy, tmp_path / "online", "--adapter", str(adapter), "--reference", "online")
    close(within, cached)
    close(online, cached)
    assert cached[-1]["margin"] > 0.1
    # the base itself as the reference is another run
    base = train(toy, tmp_path / "base", "--adapter", str(adapter), "--reference-model", str(toy / "model"))
    assert base[0]["chosen_reward"] != 0.0
    saved = load_file(tmp_path / "within" / "model" / "adapter_model.safetensors")
    start = load_file(adapter / "adapter_model.safetensors")
    assert saved.keys() == start.keys()  # not the frozen copy
    assert all(not torch.equal(saved[name], start[name]) for name in start)


@pytest.mark.parametrize(
    ("start", "reference"),
    [
        ("continued", "cached"),
        pytest.param("new", "cached", marks=pytest.mark.slow),
        pytest.param("new", "adapter-off", marks=pytest.mark.slow),
        pytest.param("continued", "adapter-off", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_adapter(toy, adapter, tmp_path, start, reference):
    way = LORA if start == "new" else ("--adapter", str(adapter))
    flags = *way, "--reference", reference, "--save-every", "2"
    whole = train(toy, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "model")
    resumed = train(toy, tmp_path / "resumed", *flags, *RESUME)
    assert [r["loss"] for r in resumed] == [r["loss"] for r in whole]
    ours, theirs = (load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("resumed", "whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


RESUME = ("--resume", "auto")


def test_the_reference_has_no_dropout_and_the_policy_has(toy, adapter, tmp_path):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(toy / "model"), config).save_pretrained(tmp_path / "a")
    settings = TrainConfig(model=str(toy / "model"), data="x", adapter=str(tmp_path / "a"), padded=True)
    model = load_policy(settings).model
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with as_reference(model):
        assert torch.equal(logits(model), logits(model))
        reference = logits(model)
    assert model.training
    assert all(p.requires_grad == (".default." in name) for name, p in model.named_parameters())
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy / "model"), tmp_path / "a")
    torch.testing.assert_close(reference, logits(plain.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_both_phases_draw_the_same_dropout(toy, tmp_path):
    """Else the second phase would differentiate another network than the one whose loss was taken."""
    flags = *LORA, "--lora-dropout", "0.3", "--token-budget", "60"
    one, two = train(toy, tmp_path / "one", *flags), train(toy, tmp_path / "two", *flags, "--two-phase")
    assert one[0]["bins"] > 1
    close(two, one)
    without = train(toy, tmp_path / "without", *LORA, "--token-budget", "60")
    assert abs(one[-1]["loss"] - without[-1]["loss"]) > 1e-4


@pytest.mark.slow
def test_frozen_weights_in_half_precision_change_no_bit_under_autocast(toy, tmp_path, monkeypatch):
    kept = train(toy, tmp_path / "half", *LORA, "--dtype", "bf16")
    monkeypatch.setattr("dpo.train.store_frozen", lambda model, objective: model)
    assert [r["loss"] for r in kept] == [r["loss"] for r in train(toy, tmp_path / "full", *LORA, "--dtype", "bf16")]
    monkeypatch.undo()
    settings = TrainConfig(model=str(toy / "model"), data="x", lora_r=2, lora_targets="q_proj", dtype="bf16")
    model = store_frozen(load_policy(settings).model, objective_of(settings))
    dtypes = {name: p.dtype for name, p in model.named_parameters() if "layers.0.self_attn" in name or "head" in name}
    assert {dtype for name, dtype in dtypes.items() if "lora" in name or "head" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora" not in name and "head" not in name} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["cached", "adapter-off", "online"])
@pytest.mark.parametrize("start", ["new", "continued"])
def test_samples_are_compared_with_the_reference_that_training_has(toy, adapter, tmp_path, start, reference):
    way = LORA if start == "new" else ("--adapter", str(adapter))
    flags = "--eval-data", str(toy / "held_out.jsonl"), "--sample-prompts", "3", "--sample-tokens", "6"
    train(toy, tmp_path / "run", *way, *flags, "--reference", reference, "--eval-every", "2", "--dtype", "bf16")
    records, evals = (read_json_lines(tmp_path / "run" / name) for name in ("samples.jsonl", "eval.jsonl"))
    assert evals[0]["kl"] == 0.0
    assert evals[-1]["kl"] != 0.0
    assert all(r["reference"] == r["policy"] for r in records if r["step"] == 0)
    before = {r["prompt"]: r["policy"] for r in records if r["step"] == 0}
    assert all(r["reference"] == before[r["prompt"]] for r in records)


@pytest.mark.slow
def test_a_peft_configuration_does_what_the_flags_do(toy, tmp_path, plain):
    shutil.copy(plain[0] / "model" / "adapter_config.json", tmp_path / "lora.json")
    close(train(toy, tmp_path / "run", "--lora-config", str(tmp_path / "lora.json")), plain[1], 1e-6)
    narrow = train(toy, tmp_path / "narrow", *LORA, "--lora-targets", "q_proj,v_proj")
    assert len(load_file(tmp_path / "narrow" / "model" / "adapter_model.safetensors")) == 2 * 2 * 2
    assert narrow[-1]["loss"] != plain[1][-1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--lora-alpha", "8"), ("--lora-r", "2"), ("--lora-dropout", "0.4")], ids=" ".join)
def test_an_option_changes_what_it_says_it_changes(toy, tmp_path, plain, flags):
    assert abs(train(toy, tmp_path / "run", *LORA, *flags)[-1]["loss"] - plain[1][-1]["loss"]) > 1e-6


@pytest.mark.slow
def test_a_copy_of_the_head_may_train_beside_the_adapter(toy, tmp_path):
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    settings.save_pretrained(tmp_path)
    flags = "--lora-config", str(tmp_path / "adapter_config.json")
    cached = train(toy, tmp_path / "cached", *flags)
    within = train(toy, tmp_path / "within", *flags, "--reference", "adapter-off")
    assert within[0]["margin"] == 0.0
    close(within, cached)
    weights = load_file(tmp_path / "within" / "model" / "adapter_model.safetensors")
    assert not torch.equal(
        weights["base_model.model.lm_head.weight"],
        load_file(toy / "model" / "model.safetensors")["lm_head.weight"],
    )


HEAD = "--lora-r", "4", "--lora-targets", "lm_head,q_proj"


def test_an_adapter_of_the_head_has_the_gradients_of_the_models_own_logits(toy):
    model: Any = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float64)
    torch.manual_seed(2)
    config = peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    add_adapter(model, config, str(toy / "model"), "--lora-config")
    model.to(torch.float64)
    prompt, completions = [5, 6, 7], [[9, 4, 1], [30, 2, 8, 1]]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3
    logps = shared_logps(model, pack([Group(prompt, completions, pairs=[(0, 1)])])).completion_logps
    ours = torch.autograd.grad(logps @ torch.tensor([1.0, -2.0], dtype=torch.float64), list(trained.values()))
    sums = []
    with stock_attention(model):
        for completion in completions:
            rows = model(torch.tensor([prompt + completion])).logits[0, 2:-1].log_softmax(-1)
            sums.append(rows.gather(1, torch.tensor(completion)[:, None]).sum())
    torch.testing.assert_close(logps, torch.stack(sums), rtol=1e-7, atol=1e-7)
    theirs = torch.autograd.grad(sums[0] - 2.0 * sums[1], list(trained.values()))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm(), name


def test_an_adapter_of_the_head_trains_resumes_and_scores(toy, tmp_path):
    flags = *HEAD, "--eval-data", str(toy / "held_out.jsonl"), "--save-every", "2"
    whole = train(toy, tmp_path / "whole", *flags)
    assert whole[0]["margin"] == 0.0
    within = train(toy, tmp_path / "within", *HEAD, "--reference", "adapter-off", "--head-plan", "recompute")
    assert within[0]["margin"] == 0.0
    close(within, whole)
    shutil.rmtree(tmp_path / "whole" / "model")
    assert [r["loss"] for r in train(toy, tmp_path / "whole", *flags, *RESUME)] == [r["loss"] for r in whole]
    weights = load_file(tmp_path / "whole" / "model" / "adapter_model.safetensors")
    assert weights["base_model.model.lm_head.lora_B.weight"].abs().max() > 0
    words = "--model", str(tmp_path / "whole" / "model"), "--reference", str(toy / "model")
    records = score(*words, "--data", str(toy / "held_out.jsonl"), output=tmp_path / "scores")
    last = read_json_lines(tmp_path / "whole" / "eval.jsonl")[-1]
    assert sum(r["margin"] for r in records) / len(records) == pytest.approx(last["margin"], abs=1e-5)


def test_four_bits_are_asked_of_transformers_where_they_can_be_had(toy, monkeypatch):
    """The way there: no GPU has run it yet."""
    asked: dict[str, Any] = {}

    def from_pretrained(path: str, **options: Any) -> Any:
        asked.update(options)
        raise OSError("as far as it goes here")

    device = torch.device("cuda", 0)
    monkeypatch.setattr("dpo.inputs.resolve_device", lambda name: device)
    settings = TrainConfig(model=str(toy / "model"), data="x", lora_r=4, load_in_4bit=True)
    monkeypatch.setattr("dpo.load._installed", lambda name: False)
    with pytest.raises(UserError, match="--load-in-4bit: needs the package bitsandbytes"):
        load_policy(settings)
    monkeypatch.setattr("dpo.load._installed", lambda name: True)
    monkeypatch.setattr("dpo.load.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(UserError, match="as far as it goes here"):
        load_policy(settings)
    assert asked["device_map"] == {"": device}
    assert asked["quantization_config"].load_in_4bit
    assert asked["quantization_config"].bnb_4bit_quant_type == "nf4"


def test_head_parts_sees_through_pefts_wrappers(toy):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(toy / "model")
    weight = model.lm_head.weight
    wrapper = peft.get_peft_model(model, config)
    found = head_parts(model.get_output_embeddings())
    assert found.weight is weight
    assert found.lora is not None
    assert (found.lora[0].shape, found.lora[1].shape, found.lora[2]) == ((3, 32), (258, 3), 2.0)
    with wrapper.disable_adapter():
        assert head_parts(model.get_output_embeddings()).lora is None
    assert adapter_of(model) is None  # the trainer did not put it there
