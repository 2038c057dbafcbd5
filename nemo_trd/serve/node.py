"""Starts the vLLM servers of one model on this node, as a run's settings say, and stays with them.

NEMO_TRD_API_KEY=... python -m nemo_trd.serve.node student --reached-from node1 \\
    experiment=trd_70b model.student.path=/models/...

A node holds `cluster.gpus_per_node` / `cluster.{student,teacher}_server_tp` servers; the jobs of
slurm/ run this on each server node. SIGINT ends the servers. SIGTERM does not: Slurm sends it to
all processes of a job that is preempted or cancelled, and the trainer needs them for its step.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nemo_trd.config.arguments import path
from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.config.server_rules import check_server_tp
from nemo_trd.serve.api_key import read_api_key
from nemo_trd.serve.server import Server, ServerError, start_all, stop_all

Role = Literal["student", "teacher"]


def servers_of_node(config: Config, role: Role, host: str, logs: Path) -> list[Server]:
    """The servers of `role` that one node holds, not started, with their logs below `logs`.

    Raises:
        ConfigError: nothing is generated on servers, there is no key, or a server is larger than
            the node.
    """
    vllm, cluster = config.generation.vllm, config.cluster
    if vllm is None:
        raise rule_broken(
            "generation.backend",
            config.generation.backend,
            f"no {role} servers are asked",
            "choose generation=vllm_nodes, or set aside no nodes for servers",
        )
    api_key = read_api_key(vllm.api_key_env, vllm.api_key_file)
    if api_key is None:
        raise rule_broken(
            "generation.vllm.api_key_env",
            vllm.api_key_env,
            "the variable is not set, and others reach the servers of a node",
            "export it, `openssl rand -hex 32` makes a key",
        )
    pool = vllm.student if role == "student" else vllm.teacher
    tp = cluster.student_server_tp if role == "student" else cluster.teacher_server_tp
    if tp > cluster.gpus_per_node:
        raise rule_broken(
            f"cluster.{role}_server_tp",
            tp,
            f"a server lives on one node, and a node has {cluster.gpus_per_node} GPUs",
            f"use at most {cluster.gpus_per_node}",
        )
    check_server_tp(config, role)
    source = config.model.student if role == "student" else config.teacher_source
    adapter = config.served_adapter
    return [
        Server(
            source.path,
            pool.server.model_copy(update={"tensor_parallel_size": tp}),
            logs / f"{role}-server-{socket.gethostname()}-{number}.log",
            host=host,
            api_key=api_key,
            devices=range(number * tp, (number + 1) * tp),
            weight_backend=vllm.weight_sync.backend if role == "student" else None,
            adapter_rank=adapter.rank if adapter and role == "student" else None,
            trust_remote_code=source.trust_remote_code,
            field=f"generation.vllm.{role}.server",
        )
        for number in range(cluster.gpus_per_node // tp)
    ]


def address_towards(host: str) -> str:
    """The address of this node on the way to `host`. Nothing is sent.

    Raises:
        ConfigError: there is no way.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise rule_broken(
            "--reached-from", host, f"this node has no way to it: {error}", "name a training node"
        ) from error


def _serve(arguments: Sequence[str] | None) -> int:
    """Start the servers and stay; the exit status of the first that ends by itself."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.serve.node",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("role", choices=("student", "teacher"))
    parser.add_argument("overrides", nargs="*", help="as for nemo_trd.train")
    parser.add_argument(
        "--reached-from", required=True, metavar="HOST", help="who asks: decides the address"
    )
    parser.add_argument("--logs", type=path, required=True, metavar="DIR")
    parsed = parser.parse_intermixed_args(arguments)
    servers = servers_of_node(
        compose(parsed.overrides), parsed.role, address_towards(parsed.reached_from), parsed.logs
    )
    start_all(servers)
    try:
        print("ready:", *(server.url for server in servers), flush=True)
        while not (ended := [s for s in servers if s.exit_status() is not None]):
            time.sleep(0.5)
        print(f"nemo_trd: {ended[0].failure()}", file=sys.stderr)
        return ended[0].exit_status() or 1
    finally:
        stop_all(servers)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after SIGINT; 1 when a server did not start, 2 for a bad setting, else a server's own."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the servers inherit this
    try:
        return _serve(arguments)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return 0
    except ConfigError as error:
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
