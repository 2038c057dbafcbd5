"""Where the loss head leaves what it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_trd.loss.top_k import TopK
from nemo_trd.megatron import loss_head
from nemo_trd.megatron.loss_head import LossHead


def test_top_k_of_servers_comes_to_the_device_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's device without memory takes the GPU's place."""
    monkeypatch.setattr(loss_head, "to_device", lambda tensor: tensor.to("meta"))
    head: Any = object()
    of_servers = TopK(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), torch.zeros(2))
    best = LossHead.teacher_top_k(head, of_servers, torch.zeros(2), k=2, vocab_size=10)
    assert [t.shape for t in (best.ids, best.log_probs, best.label_log_probs)] == [
        (2, 2),
        (2, 2),
        (2,),
    ]
    assert {t.device.type for t in (best.ids, best.log_probs, best.label_log_probs)} == {"meta"}
