"""What all tests share: caches of their own, and the same generated examples in every run."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
