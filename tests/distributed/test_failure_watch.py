"""Ranks leave together, and what one rank alone refuses is told by all."""

from __future__ import annotations

from pathlib import Path

from launch import launch, run_ranks


def test_a_rank_that_is_late_to_leave_still_finds_the_store() -> None:
    launch(2, leave_late, timeout=100)


def leave_late() -> None:
    """Rank 0 has the store. Rank 1 goes on to look at it for a while after all have met."""
    import time
    from datetime import timedelta

    import pytest
    import torch
    import torch.distributed as dist

    from nemo_trd.config.errors import ConfigError
    from nemo_trd.distributed import process
    from nemo_trd.distributed.exchange import fail_together

    process.POLL_SECONDS = 0.05
    watch = process.init_distributed(timeout_minutes=1)
    own = process.new_group([0, 1])._get_backend(torch.device("cpu"))
    assert own.options._timeout == timedelta(minutes=1)  # of torch: 30 minutes

    def refuse() -> list[int]:
        if dist.get_rank() == 1:
            raise ConfigError("max_tokens = 9: rule. Fix: lower it")
        return [1]

    with pytest.raises(ConfigError, match="max_tokens = 9"):
        fail_together(refuse)
    if dist.get_rank() == 1:
        barrier = dist.barrier

        def late_barrier() -> None:
            barrier()
            time.sleep(1)

        dist.barrier = late_barrier  # type: ignore[assignment]
    watch.close()


def test_what_one_rank_refuses_ends_the_others_that_wait_for_it(tmp_path: Path) -> None:
    code, output = run_ranks(2, refused_by_one, str(tmp_path), timeout=100)
    assert code == 1
    assert "rank 1 failed first: ConfigError: weights = 'here': no. Fix: others" in output, output


def refused_by_one(directory: str) -> None:
    """Rank 0 waits in a collective, for longer than this test may."""
    import torch.distributed as dist

    from nemo_trd.config.errors import ConfigError
    from nemo_trd.config.load import compose
    from nemo_trd.run import session

    session.REFUSED_SECONDS = 1.0
    config = compose(["experiment=quickstart", f"run.dir={directory}"])

    def work(stop: session.StopRequest) -> int:
        if dist.get_rank() == 1:
            raise ConfigError("weights = 'here': no. Fix: others")
        dist.barrier()
        return 0

    session.with_all_ranks(config, work)
