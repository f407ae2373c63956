"""The Triton backend: importing it needs triton, using it a GPU or an interpreter.

Launchers take plain tensors and launch; operators, autograd and checks of arguments are the callers'.
"""

from .fused import FusedOutputs, fused_backward, fused_forward
from .head import head_backward, head_forward
from .logits import logps_backward, logps_forward
from .losses import KernelCall
from .pairs import PairOutputs, pair_backward, pair_forward
from .probe import interpreter_problem
from .rankings import RankingOutputs, ranking_backward, ranking_forward
from .rows import empty_in_phase

__all__ = [
    "FusedOutputs",
    "KernelCall",
    "PairOutputs",
    "RankingOutputs",
    "empty_in_phase",
    "fused_backward",
    "fused_forward",
    "head_backward",
    "head_forward",
    "interpreter_problem",
    "logps_backward",
    "logps_forward",
    "pair_backward",
    "pair_forward",
    "ranking_backward",
    "ranking_forward",
]
