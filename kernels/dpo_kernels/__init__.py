"""Fused kernels for Direct Preference Optimization: log-probs, pair losses and the LM head, on plain tensors."""

from .calls import PairCall
from .common import TokenStats
from .fused import LinearPairLoss, dpo_loss_from_logits, linear_dpo_loss
from .head import LoraFactors, linear_token_logps
from .logps import token_logps
from .losses import LOSSES, OPTIONS, LossEntry, LossOptions
from .modules import DPOLoss, LinearDPOLoss
from .pairs import PairLoss, pair_loss
from .paper import dpo_loss
from .plans import Plan, choose_plan
from .rankings import RankingLoss, ranking_loss
from .segments import token_pair_loss
from .trl_hook import patch_trl

__all__ = [
    "LOSSES",
    "OPTIONS",
    "DPOLoss",
    "LinearDPOLoss",
    "LinearPairLoss",
    "LoraFactors",
    "LossEntry",
    "LossOptions",
    "PairCall",
    "PairLoss",
    "Plan",
    "RankingLoss",
    "TokenStats",
    "choose_plan",
    "dpo_loss",
    "dpo_loss_from_logits",
    "linear_dpo_loss",
    "linear_token_logps",
    "pair_loss",
    "patch_trl",
    "ranking_loss",
    "token_logps",
    "token_pair_loss",
]
