"""patch_trl: TRL's trainer with our head and loss against TRL's own, step by step, on the same tiny model and data."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dpo_kernels import patch_trl, trl_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.toy import write_model

pytestmark = pytest.mark.peers

QUIET = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
    "per_device_train_batch_size": 4, "gradient_checkpointing": False, "lr_scheduler_type": "constant",
    "learning_rate": 1e-3, "dataloader_pin_memory": False, "max_length": None,
}  # fmt: skip
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
TIMES |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def trl() -> Any:
    """The peer; its import takes seconds, and only these tests need it."""
    return pytest.importorskip("trl", reason="the peers extra is not installed")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("toy") / "model")


def pairs(count: int = 32, seed: int = 0, note: str = "") -> Dataset:
    """`note` makes an equal data set with another fingerprint, under which TRL caches precomputed log-probs."""
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(1, longest)))

    rows = [{"prompt": text(30) + ":", "chosen": text(20), "rejected": text(8), "note": note} for _ in range(count)]
    return Dataset.from_list(rows)


def build(toy, tmp_path, cls: Any = None, *, model: Any = None, **options: Any) -> Any:
    """A trainer as users make it; `cls` is the class (None: TRL's own)."""
    extra = {name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options}
    args = trl().DPOConfig(output_dir=str(tmp_path / "out"), **QUIET | {"max_steps": 3} | options)
    return (cls or trl().DPOTrainer)(
        model=model or AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32),
        args=args,
        train_dataset=pairs(note=str(tmp_path)),
        processing_class=AutoTokenizer.from_pretrained(toy),
        **extra,
    )


def run(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [
        {k: v for k, v in record.items() if k not in TIMES}
        for record in trainer.state.log_history
        if "loss" in record or "eval_loss" in record
    ]


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float = 2e-5) -> None:
    """Same metrics by name, same values within `tolerance` of their scale over the run."""
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    assert len(ours) > 0
    for name in theirs[0]:
        scale = max(1.0, *(abs(record.get(name, 0.0)) for record in theirs))
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            margins = name.replace("accuracies", "margins")
            tie = margins != name and max(abs(a.get(margins, 0.0)), abs(b.get(margins, 0.0))) < 1e-5
            if name in b and not tie:  # the signs of margins that are rounding say nothing
                assert abs(a[name] - b[name]) <= tolerance * scale, (step, name, a[name], b[name])


def test_twenty_steps_have_trls_curve_and_metrics(toy, tmp_path):
    options = {"max_steps": 20, "eval_dataset": pairs(6, seed=1), "eval_strategy": "steps", "eval_steps": 10}
    theirs = run(build(toy, tmp_path, **options))
    ours = run(patch_trl(build(toy, tmp_path, **options)))
    assert len(theirs) == 22
    assert theirs[0].keys() >= {"loss", "rewards/margins", "logits/chosen", "entropy", "mean_token_accuracy"}
    # the noise: the same trainer with its batches of four taken two by two
    halves = run(build(toy, tmp_path, **options | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}))
    assert theirs[-2]["loss"] < 0.9 * theirs[0]["loss"]  # it learns: there is something to differ in
    for name in ("loss", "rewards/margins", "grad_norm"):
        steps = [k for k, record in enumerate(theirs) if name in record]
        noise = max(abs(halves[k][name] - theirs[k][name]) for k in steps)
        error = max(abs(ours[k][name] - theirs[k][name]) for k in steps)
        assert error <= 3 * noise + 1e-6, (name, error, noise)
    assert_same(ours, theirs, tolerance=1e-4)


def test_the_class_and_the_trainer_compute_the_same_and_step_0_is_exact(toy, tmp_path):
    ours = run(build(toy, tmp_path, patch_trl(trl().DPOTrainer)))
    assert ours == run(patch_trl(build(toy, tmp_path)))
    assert ours[0]["rewards/margins"] == ours[0]["rewards/chosen"] == 0.0
    assert trl().DPOTrainer._compute_loss.__module__.startswith("trl.")  # nothing global was changed


def test_only_completion_rows_reach_the_head(toy, tmp_path, monkeypatch):
    seen = []

    def spy(hidden, weight, targets, **options):
        seen.append((hidden.requires_grad, len(targets), bool((targets >= 0).all())))
        return trl_head(hidden, weight, targets, **options)

    trl_head = trl_hook.linear_token_logps
    monkeypatch.setattr(trl_hook, "linear_token_logps", spy)
    trainer = patch_trl(build(toy, tmp_path, max_steps=1))
    counted = []
    compute = type(trainer)._compute_loss

    def count(self, model, inputs, return_outputs):
        counted.append(int(inputs["completion_mask"].sum()))
        return compute(self, model, inputs, return_outputs)

    monkeypatch.setattr(type(trainer), "_compute_loss", count)
    trainer.train()
    assert seen == [(True, counted[0], True), (False, counted[0], True)]


def ours_and_theirs(
    patch: Callable[[Any], Any], form: str, toy: Path, tmp_path: Path, options: dict[str, Any]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The records of a trainer that `patch` was given as `form` (class or trainer), and of TRL's own."""
    theirs = run(build(toy, tmp_path / "a", **options))
    if form == "class":
        return run(build(toy, tmp_path / "b", patch(trl().DPOTrainer), **options)), theirs
    return run(patch(build(toy, tmp_path / "b", **options))), theirs


HONOURED = {
    "beta": {"beta": 0.5},
    "loss_weights": {"loss_weights": [0.3]},
    "ld_alpha": {"ld_alpha": 0.25},
    "use_weighting": {"use_weighting": True},
    "precompute_ref_log_probs": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 8},
    "precompute with ld_alpha": {"precompute_ref_log_probs": True, "ld_alpha": 0.5},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "truncation": {"max_length": 24},
    "neftune": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("options", HONOURED.values(), ids=HONOURED.keys())
@pytest.mark.parametrize("form", ["class", "trainer"])
def test_honoured_options_compute_what_trl_computes(toy, tmp_path, options, form):
    assert_same(*ours_and_theirs(patch_trl, form, toy, tmp_path, options))


def test_bf16_is_as_near_to_fp32_as_trls(toy, tmp_path):
    truth, theirs, ours = (
        run(trainer)
        for trainer in (
            build(toy, tmp_path),
            build(toy, tmp_path, bf16=True),
            patch_trl(build(toy, tmp_path, bf16=True)),
        )
    )
    assert ours[0]["rewards/margins"] == 0.0
    for name in ("loss", "logps/chosen", "entropy"):
        allowed = max(abs(b[name] - t[name]) for b, t in zip(theirs, truth, strict=True))
        assert max(abs(a[name] - t[name]) for a, t in zip(ours, truth, strict=True)) <= 1.5 * allowed + 1e-4, name
    assert ours[1]["logps/chosen"] != truth[1]["logps/chosen"]  # autocast is on


def ours_and_theirs_with_adapters(
    patch: Callable[[Any], Any], start: str, toy: Path, tmp_path: Path
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The same with an adapter of peft: new, continued (trained by somebody else), or prompt tuning."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=start == "new")
    if start == "prompt tuning":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if start == "continued":
        torch.manual_seed(3)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")

    def options() -> dict[str, Any]:
        if start != "continued":
            return {"peft_config": config}
        plain = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
        return {"model": peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)}

    theirs = run(build(toy, tmp_path, **options()))
    return run(patch(build(toy, tmp_path, **options()))), theirs


@pytest.mark.parametrize("start", ["new", "continued", "prompt tuning"])
def test_peft_adapters_and_their_reference(toy, tmp_path, start):
    ours, theirs = ours_and_theirs_with_adapters(patch_trl, start, toy, tmp_path)
    assert_same(ours, theirs)
    assert (ours[0]["rewards/margins"] == 0.0) == (start != "prompt tuning")


LOSSES = {
    **{name: {"loss_type": [name]} for name in trl_hook.TRL_LOSSES if name != "sigmoid"},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "aot, smoothed": {"loss_type": ["aot"], "label_smoothing": 0.2, "ld_alpha": 0.3},
    "discopop, tau": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ipo, weighted": {"loss_type": ["ipo"], "use_weighting": True},
    "sums": {
        "loss_type": ["sigmoid", "robust", "sft"], "loss_weights": [0.8, 0.2, 0.5], "label_smoothing": 0.1,
        "f_divergence_type": "forward_kl",
    },
    "precomputed": {"loss_type": ["aot", "sigmoid_norm"], "precompute_ref_log_probs": True, "ld_alpha": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_every_loss_computes_what_trl_computes(toy, tmp_path, options):
    options = {"max_steps": 2, **options}
    theirs = run(build(toy, tmp_path / "a", **options))
    assert_same(run(build(toy, tmp_path / "b", patch_trl(trl().DPOTrainer), **options)), theirs)


REFUSED = {
    "loss_type": ["simpo"],
    "f_divergence_type": "hellinger",
    "f_alpha_divergence_coef": 0.3,
    "label_smoothing": 0.1,
    "discopop_tau": 0.1,
    "padding_free": True,
    "use_liger_kernel": True,
    "torch_compile": True,
    "ld_alpha": 1.5,
}


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=REFUSED.keys())
def test_other_options_are_refused_by_name_and_value(toy, tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: patch_trl expected .*found {value!r}".replace("[", r"\[")):
        build(toy, tmp_path, patch_trl(trl().DPOTrainer), **{name: value})
    trainer = build(toy, tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"^{name}: "):
        patch_trl(trainer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["sft"], "use_weighting": True}, "use_weighting: patch_trl expected False with sft"),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
            "f_alpha_divergence_coef: patch_trl expected 0 <= value < 1, found 1.5",
        ),
        ({"loss_type": ["robust"], "label_smoothing": 0.6}, "label_smoothing: expected 0 <= value < 0.5, found 0.6"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trl_hook.check_options(trl().DPOConfig(bf16=False, use_cpu=True, **options))


def test_adapters_of_the_head_and_auxiliary_losses_are_refused(toy, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="peft_config: patch_trl expected no adapter"):
        patch_trl(build(toy, tmp_path, peft_config=config))
    trainer = build(toy, tmp_path)
    trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 0.01
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: patch_trl expected 0.0.*found 0.01"):
        patch_trl(trainer)


@pytest.mark.parametrize("target", [torch.nn.Linear(2, 2), dict, None], ids=str)
def test_something_else_than_a_trainer_is_named(target):
    with pytest.raises(ValueError, match="target: expected trl's DPOTrainer"):
        patch_trl(target)


def test_every_option_of_dpo_config_is_accounted_for():
    """A field that a later TRL adds must be sorted: outside loss and head, honoured, or refused."""
    from transformers import TrainingArguments

    own = set(trl().DPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    outside = {"model_init_kwargs", "trust_remote_code", "disable_dropout", "dataset_num_proc", "max_length"}
    outside |= {"truncation_mode", "pad_to_multiple_of", "activation_offloading", "pad_token"}
    honoured = {"loss_weights", "beta", "use_weighting", "precompute_ref_log_probs", "precompute_ref_batch_size"}
    honoured |= {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"}
    honoured |= {"loss_type", "ld_alpha", "label_smoothing", "discopop_tau"}
    honoured |= {"f_divergence_type", "f_alpha_divergence_coef"}
    assert own == outside | honoured | {"router_aux_loss_coef"} | (set(trl_hook.PLAIN) & own)


DISTRIBUTED = """
import json, sys
from pathlib import Path
import dpo
import dpo_kernels
from tests.peers.test_trl import build, run, trl
patch = {"plain": lambda kind: kind, "head": dpo_kernels.patch_trl, "forward": dpo.patch_trl}[sys.argv[1]]
toy, folder = Path(sys.argv[2]), Path(sys.argv[3])
trainer = build(toy, folder, patch(trl().DPOTrainer), per_device_train_batch_size=2)
assert trainer.accelerator.num_processes == 2
records = run(trainer)
if trainer.accelerator.is_main_process:
    (folder / f"{sys.argv[1]}.json").write_text(json.dumps(records))
"""


@pytest.mark.slow
def test_two_processes_compute_what_trl_computes(toy, tmp_path):
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    for side in ("plain", "head", "forward"):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py")]
        root = Path(__file__).parent.parent.parent
        paths = os.pathsep.join([str(root), str(root / "kernels")])
        subprocess.run(
            [sys.executable, *words, side, str(toy), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True, timeout=300,
        )  # fmt: skip
    theirs, *ours = (json.loads((tmp_path / f"{side}.json").read_text()) for side in ("plain", "head", "forward"))
    assert_same(ours[0], theirs)
    assert_same(ours[1], theirs)
