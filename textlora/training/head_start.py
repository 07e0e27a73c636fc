"""Where a head starts: at what is known of the labels without reading a text."""

import numpy as np
import torch

from textlora.core.config import MULTI_LABEL, REGRESSION
from textlora.training.prepare import Prepared


def start_head(prepared: Prepared) -> None:
    """Start the head's last bias at what is known without reading a text: mean target, or log odds of each
    label (multi-label).

    The network then need not spend its first steps on it; merging and PEFT see an ordinary bias.
    """
    labels, kind = prepared.sets["train"].labels, prepared.schema.problem_type
    bias = list(prepared.model.trainable().values())[-1]
    with torch.no_grad():
        if kind == REGRESSION:
            bias.fill_(float(labels.mean()))
        elif kind == MULTI_LABEL:
            share = np.clip(labels.mean(0), 1e-3, 1 - 1e-3)
            bias.copy_(torch.from_numpy(np.log(share / (1 - share))).to(bias))
