"""Adapters as files: scoring, merging, and flags that do not go together."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.cli import main
from dpo.metrics import read_json_lines
from tests.lora.runs import LORA, logits, score, train
from tests.train.test_cli import fails
from tests.train.toy import write_model

peft: Any = pytest.importorskip("peft", reason="the lora extra is not installed")


def test_scoring_takes_adapters_wherever_it_takes_models(toy, plain, adapter, tmp_path):
    data = "--data", str(toy / "held_out.jsonl")
    direct = score("--model", str(plain[0] / "model"), "--reference", str(toy / "model"), *data, output=tmp_path / "a")
    last = read_json_lines(plain[0] / "eval.jsonl")[-1]
    assert sum(r["margin"] for r in direct) / len(direct) == pytest.approx(last["margin"], abs=1e-5)
    on_top = "--model", str(toy / "model"), "--adapter", str(plain[0] / "model")
    assert score(*on_top, "--reference", str(toy / "model"), *data, output=tmp_path / "b") == direct
    against = score("--model", str(toy / "model"), "--reference", str(adapter), *data, output=tmp_path / "c")
    assert against[0]["ref_chosen_logps"] != direct[0]["ref_chosen_logps"]


@pytest.mark.parametrize("base", ["model", "tied"])
def test_a_merged_adapter_is_the_model_that_trained(toy, tmp_path, base):
    train(toy, tmp_path / "run", *LORA, model=base)
    merged = tmp_path / "merged"
    main(["merge", "--adapter", str(tmp_path / "run" / "model"), "--output", str(merged)])
    ours = AutoModelForCausalLM.from_pretrained(merged)
    assert ours.config.tie_word_embeddings == (base == "tied")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(merged).eos_token == "<eos>"
    train(toy, tmp_path / "again", "--model", str(merged))


def test_merging_an_adapter_of_a_tied_head_parts_it_from_the_embedding(toy, tmp_path):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(toy / "tied"), config)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "a")
    main(["merge", "--adapter", str(tmp_path / "a"), "--model", str(toy / "tied"), "--output", str(tmp_path / "m")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_merging_keeps_the_precision_asked_for_and_writes_over_nothing(toy, plain, tmp_path, capsys):
    words = ["merge", "--adapter", str(plain[0] / "model"), "--output"]
    main([*words, str(tmp_path / "half"), "--dtype", "bf16"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert "--output" in fails(capsys, *words, str(tmp_path / "half"))
    assert "no adapter_config.json" in fails(
        capsys, "merge", "--adapter", str(toy / "model"), "--output", str(tmp_path / "x")
    )
    write_model(tmp_path / "other", hidden_size=48)
    error = fails(capsys, *words, str(tmp_path / "x"), "--model", str(tmp_path / "other"))
    assert "cannot be put on its base" in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora-r", "0"), "--lora-r: expected a positive number, found 0"),
        (("--lora-alpha", "4"), "--lora-alpha: expected --lora-r beside it, found none"),
        (("--lora-dropout", "0.1"), "--lora-dropout: expected --lora-r beside it"),
        (("--lora-targets", "q_proj"), "--lora-targets: expected --lora-r beside it"),
        (("--reference", "adapter-off"), "--reference adapter-off: expected --lora-r"),
        ((*LORA, "--reference", "adapter-off", "--reference-model", "x"), "expected no --reference-model"),
        (("--load-in-4bit",), "--load-in-4bit: expected --lora-r, --lora-config or --adapter beside it"),
        ((*LORA, "--load-in-4bit", "--device", "cpu"), "--load-in-4bit: expected a CUDA device, found cpu"),
        ((*LORA, "--adapter", "x"), "--lora-r and --adapter: expected one of them"),
        ((*LORA, "--lora-targets", "q_proj,k_porj"), "--lora-targets: expected names of modules of LlamaForCausalLM"),
        ((*LORA, "--lora-targets", "lm_head", "--lora-dropout", "0.1"), "expected no dropout in an adapter of the LM"),
        (("--adapter", "{model}"), "expected adapter_config.json"),
        (("--adapter", "{broken}"), "expected the weights of its configuration"),
        (("--model", "{adapter}"), "--adapter {adapter}"),
        (("--lora-config", "{tmp}/no.json"), "--lora-config {tmp}/no.json: expected adapter_config.json"),
        (("--lora-config", "{tmp}/ia3.json"), "expected peft_type LORA, found IA3"),
        (("--lora-config", "{tmp}/pissa.json"), "init_lora_weights: expected True, False, gaussian, found pissa"),
        (("--lora-config", "{tmp}/bias.json"), "bias: expected none, found all"),
        (("--lora-config", "{tmp}/odd.json"), "expected settings of peft's LoraConfig, found 'rr'"),
    ],
    ids=str,
)
def test_bad_input_gets_one_line_and_status_2(toy, adapter, tmp_path, capsys, flags, message):
    for name, settings in {
        "ia3": {"peft_type": "IA3"},
        "pissa": {"init_lora_weights": "pissa"},
        "bias": {"bias": "all"},
        "odd": {"rr": 3},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"target_modules": ["q_proj"], **settings}))
    shutil.copytree(adapter, tmp_path / "broken")
    held = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "broken" / "adapter_config.json").write_text(json.dumps(held | {"target_modules": ["k_proj"]}))
    places = {"model": toy / "model", "adapter": adapter, "tmp": tmp_path, "broken": tmp_path / "broken"}
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output"]
    error = fails(capsys, *words, str(tmp_path / "run"), *(flag.format(**places) for flag in flags))
    assert message.format(**places) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
