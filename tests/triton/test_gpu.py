"""What only a GPU can show of the LM head: no host synchronisation, and CUDA graphs that replay on new inputs.

Values and gradients of compiled kernels are the twins of the interpreted tests; `compute-sanitizer` is in
`test_gpu_check.py`.
"""

import pytest
import torch
from dpo_kernels import linear_dpo_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PLANS = ["frozen", "retain", "recompute"]


class Step:
    """A training step of the head on static tensors: forward, loss, backward."""

    def __init__(self, plan: str):
        with torch.device("cuda"):
            self.hidden = torch.randn(64, 128, dtype=torch.bfloat16).requires_grad_()
            self.weight = torch.randn(5000, 128, dtype=torch.bfloat16).requires_grad_(plan != "frozen")
            self.targets, self.ids = torch.randint(0, 5000, (64,)), torch.arange(64) % 4
            self.index = torch.tensor([0, 2]), torch.tensor([1, 3])
        self.targets[::5] = -100
        self.plan = plan

    def __call__(self) -> list[torch.Tensor]:
        self.hidden.grad = self.weight.grad = None
        rows = self.hidden, self.weight, self.targets, self.ids, None, *self.index
        found = linear_dpo_loss(*rows, num_completions=4, plan=self.plan, backend="triton")
        found.loss.backward()
        parts = found.loss.detach(), self.hidden.grad, self.weight.grad
        return [part for part in parts if part is not None]


@pytest.mark.parametrize("plan", PLANS)
def test_no_host_synchronisation(plan):
    step = Step(plan)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("plan", PLANS)
def test_graph_replay_on_new_inputs(plan):
    step, side = Step(plan), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            step.hidden.copy_(torch.randn_like(step.hidden))
        graph.replay()
        replayed = [part.clone() for part in captured]
        for mine, right in zip(replayed, step(), strict=True):
            assert torch.equal(mine, right)
