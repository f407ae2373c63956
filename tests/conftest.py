"""What all tests share: caches of their own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
