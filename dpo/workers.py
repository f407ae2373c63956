"""Data workers that end with the process that they work for, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent(worker: int) -> None:
    """Call in a data worker (`worker_init_fn`): it ends as soon as the trainer is gone, SIGKILL included.

    torch's workers look whether the process that forked them is there. Where a fork server did (the default of Python
    3.14), that is not the trainer: worker and server would wait for each other for ever.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def wait() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
