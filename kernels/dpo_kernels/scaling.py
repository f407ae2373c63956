"""What a model's configuration says is done to its logits, read without importing Transformers."""

from typing import Any

_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def logit_scaling(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a text model's Transformers configuration; (1.0, None) where it names neither.

    Cohere has logit_scale, Muse output_multiplier, Falcon-H1 lm_head_multiplier; Granite and MiniCPM divide by
    logits_scaling, HyperCLOVA X multiplies by it; Gemma-2 caps (final_logit_softcapping), and so does
    RecurrentGemma (logits_soft_cap).
    """
    softcap = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
    for name in _SCALES:
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale), softcap
    scale = getattr(config, "logits_scaling", None)
    if scale is None:
        return 1.0, softcap
    return float(scale if config.model_type.startswith("hyperclovax") else 1.0 / scale), softcap
