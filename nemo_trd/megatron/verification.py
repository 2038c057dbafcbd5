"""Verifies all bytes of a checkpoint before it is loaded, divided among the ranks."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from nemo_trd.config.schema import Checkpoint
from nemo_trd.distributed.exchange import from_first_rank, own_share
from nemo_trd.records import checksums
from nemo_trd.records.checkpoint_dir import damaged, defects, recorded_checksums, wanted_checkpoints


def verified_checkpoint(settings: Checkpoint, root: Path) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to resume from and verify all its bytes; None to start from step 0.

    Collective: the ranks divide the files. With `checkpoint.resume=auto` a damaged checkpoint is
    passed over.

    Returns:
        The checkpoint, and sentences for the log.

    Raises:
        ConfigError: a named checkpoint, or every one of the run, is damaged; with the file.
    """
    notices, reasons = [], {}
    for candidate in from_first_rank(lambda: wanted_checkpoints(settings, root)):
        reason = damage(candidate)
        if reason is None:
            if not recorded_checksums(candidate):
                notices.append(
                    f"{candidate} was saved without checksums: sizes of its files were compared, "
                    "not their bytes"
                )
            return candidate, notices
        reasons[candidate] = reason
        notices.append(f"passing over checkpoint {candidate}: {reason}")
    if reasons:
        raise damaged(settings, root, reasons)
    return None, notices


def damage(checkpoint: Path) -> str | None:
    """Reason why a checkpoint is damaged, by sizes and SHA-256 of its files; None if it is not.

    Collective.
    """
    reason = from_first_rank(
        lambda: defects(checkpoint) if checkpoint.is_dir() else "there is no such directory"
    )
    if reason is not None:
        return reason
    share = own_share(list(recorded_checksums(checkpoint).items()))
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, checksums.first_difference(checkpoint, dict(share)))
    return next((reason for reason in problems if reason is not None), None)
