"""Ranks leave together."""

from __future__ import annotations

from launch import launch


def test_a_rank_that_is_late_to_leave_still_finds_the_store() -> None:
    launch(2, leave_late, timeout=100)


def leave_late() -> None:
    """Rank 0 has the store. Rank 1 goes on to look at it for a while after all have met."""
    import time

    import torch.distributed as dist

    from nemo_trd.distributed import process

    process.POLL_SECONDS = 0.05
    watch = process.init_distributed(timeout_minutes=1)
    if dist.get_rank() == 1:
        barrier = dist.barrier

        def late_barrier() -> None:
            barrier()
            time.sleep(1)

        dist.barrier = late_barrier  # type: ignore[assignment]
    watch.close()
