"""What the tests of adapters start from: the toy model, a short run of an adapter, and an adapter of another's."""

from __future__ import annotations

import pytest

from tests.lora.runs import LORA, train, write_adapter, write_small


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True, scope="module")
def without_curves():
    """A picture takes as long as all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo.train.draw_curves", lambda run: None)
        yield


@pytest.fixture(scope="module")
def plain(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "plain"
    flags = "--eval-data", str(toy / "held_out.jsonl"), "--save-every", "2"
    return run, train(toy, run, *LORA, *flags)


@pytest.fixture(scope="module")
def adapter(toy, tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("sft") / "adapter", toy / "model")
