"""`dpo doctor`: what it says is what training does, and a kernel that is wrong makes it fail."""

from __future__ import annotations

import json

import dpo_kernels.reference
import pytest
import torch

import dpo.attention
import dpo.doctor
from dpo.cli import main
from dpo.doctor import attention_choice, backends
from dpo.machine import free_memory
from dpo.packing import Group, pack
from dpo.selftest import Check, check_kernels
from tests.train.toy import write_model


@pytest.fixture
def no_child(monkeypatch):
    """Leaves out the process of Triton's interpreter, which takes seconds."""
    monkeypatch.setattr(dpo.doctor, "_interpreted", lambda start: "not run: in this test")


def run(capsys, *flags: str) -> tuple[int, str]:
    try:
        main(["doctor", *flags])
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_a_healthy_machine_is_ready_and_every_kernel_is_tested_on_both_backends(capsys):
    status, out = run(capsys, "--json", "--device", "cpu")
    report = json.loads(out)
    assert (status, report["ok"], report["problems"]) == (0, True, [])
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["threads"] == torch.get_num_threads()
    checks = report["self_test"]["checks"]
    assert {"torch, cpu", "triton interpreted, cpu", "packed forward, cpu"} == {check["where"] for check in checks}
    for where in ("torch, cpu", "triton interpreted, cpu"):
        names = {check["name"].split()[0].rstrip(",") for check in checks if check["where"] == where}
        expected = {"token_logps", "linear_token_logps", "pair_loss", "ranking_loss"}
        assert names == expected | {"dpo_loss_from_logits", "linear_dpo_loss"}
    assert all(check["ok"] for check in checks)


def test_tables_for_people_and_a_model_that_cannot_be_packed(capsys, no_child, tmp_path):
    folder = write_model(tmp_path / "model")
    status, out = run(capsys, "--device", "cpu", "--model", str(folder))
    assert status == 0
    assert "LlamaForCausalLM" in out
    assert "layout shared" in out
    assert "ready" in out
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": config["vocab_size"]})
    )
    status, out = run(capsys, "--device", "cpu", "--model", str(folder), "--json")
    report = json.loads(out)
    assert report["model"]["layout"] == "padded"
    assert any("ALiBi" in line and "--padded" in line for line in report["advice"])


def test_a_kernel_that_is_wrong_is_a_problem_and_status_1(capsys, no_child, monkeypatch):
    true = dpo.selftest.token_logps
    monkeypatch.setattr("dpo.selftest.token_logps", lambda *args, **options: true(*args, **options) * (1 + 1e-4))
    status, out = run(capsys, "--json", "--device", "cpu")
    report = json.loads(out)
    assert status == 1
    assert any("token_logps fp32 is" in line for line in report["problems"])

    def broken(*args, **options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("dpo.selftest.token_logps", broken)
    status, out = run(capsys, "--device", "cpu")
    assert status == 1
    assert "problem: self-test, torch, cpu: RuntimeError: no kernel image is available" in out


def test_an_error_that_is_not_a_number_fails():
    assert not Check("x", float("nan"), 1.0).ok
    assert Check("x", 1.0, 1.0).ok


@pytest.mark.parametrize("error", [3e-5, -3e-5])
def test_the_self_test_sees_small_errors_in_every_gradient(monkeypatch, error):
    true = dpo_kernels.reference.shape_logits
    wrong = lambda *args, **options: true(*args, **options) * (1 + error)  # noqa: E731
    monkeypatch.setattr(dpo_kernels.reference, "shape_logits", wrong)
    checks = check_kernels("torch", "cpu", half=False)
    failed = {check.name.split(",")[0].rsplit(" ", 1)[0] for check in checks if not check.ok}
    assert failed >= {"token_logps", "linear_token_logps frozen", "linear_token_logps recompute"}


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_named_is_the_attention_called(monkeypatch, dtype, softcap):
    called = []
    for name in ("flash_segments", "eager_segments"):
        monkeypatch.setattr(dpo.attention, name, lambda q, *args, name=name: called.append(name) or q.transpose(1, 2))
    segments = pack([Group([1], [[2, 3]], ())]).segments
    q = torch.zeros(1, 2, 3, 4, dtype=dtype)
    dpo.attention.segment_attention(torch.nn.Module(), q, q, q, softcap=softcap, segments=segments)
    assert called == [attention_choice("cpu", dtype, softcap)[0] + "_segments"]


def test_cuda_without_flash_attn_names_what_has_no_soft_capping(monkeypatch):
    monkeypatch.setattr("dpo.varlen.importlib.util.find_spec", lambda name: None)
    assert attention_choice("cuda", torch.bfloat16, None)[0] == "torch varlen"
    assert attention_choice("cuda", torch.float32, None)[0] == "eager"
    uses, why = attention_choice("cuda", torch.bfloat16, 50.0)
    assert uses == "none"
    assert "flash-attn" in why
    monkeypatch.setattr("dpo.varlen.importlib.util.find_spec", lambda name: object())
    assert attention_choice("cuda", torch.bfloat16, 50.0)[0] == "flash varlen"


def test_the_kernel_backend_named_is_the_one_resolved(monkeypatch):
    rows = {row["what"]: row for row in backends(torch.device("cpu"), [])}
    assert rows["loss kernels, fp32"]["uses"] == "torch"
    assert rows["loss kernels, fp32"]["why"].startswith("triton ")
    monkeypatch.setenv("DPO_KERNELS_BACKEND", "torch")
    rows = {row["what"]: row for row in backends(torch.device("cpu"), [])}
    assert rows["loss kernels, bf16"]["why"] == "DPO_KERNELS_BACKEND=torch"


def test_versions_out_of_range_are_problems(capsys, no_child, monkeypatch):
    monkeypatch.setattr(dpo.doctor, "_requirements", lambda: ["torch>=99", "no-such-package", "x; extra == 'lora'"])
    status, out = run(capsys, "--json")
    assert status == 1
    problems = json.loads(out)["problems"]
    assert problems[0].startswith("torch: expected >=99, found ")
    assert problems[1] == "no-such-package: expected it installed, found none"
    assert len(problems) == 2


def test_free_memory_is_less_than_all_of_it():
    free, total = free_memory()
    assert (free is None) == (total is None)
    assert free is None or total is None or 0 < free < total


def test_devices_that_are_not_there_get_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--device", "toaster"])
    assert stop.value.code == 2
    assert "--device: expected" in capsys.readouterr().err
