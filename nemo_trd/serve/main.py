"""Start one vLLM server and stay with it, for servers beside a run, such as on other nodes.

NEMO_TRD_API_KEY=... python -m nemo_trd.serve --model DIR --host 10.0.0.3 --port 8000 \\
    --weight-backend nccl tensor_parallel_size=4

What is not given here stands in conf/servers/vllm.yaml.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from omegaconf import OmegaConf
from pydantic import ValidationError

from nemo_trd.config.arguments import path
from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.load import conf_dir
from nemo_trd.config.schema import SERVED_RANKS, VllmServer
from nemo_trd.config.server_rules import check_drafts
from nemo_trd.records.step_lines import write_atomically
from nemo_trd.serve.api_key import read_api_key
from nemo_trd.serve.server import Server, ServerError

log = logging.getLogger(__name__)


class _Stopped(BaseException):
    """SIGTERM or SIGINT came."""


def _stop_on(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)  # cleaning up is not interrupted
    raise _Stopped(signal.Signals(number).name)


def _parse(arguments: Sequence[str] | None) -> tuple[Server, Path | None]:
    defaults = OmegaConf.load(conf_dir() / "servers" / "vllm.yaml")
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--log-file", type=path, default=Path("vllm.log"))
    parser.add_argument("--url-file", type=path, help="written with the URL when it is healthy")
    parser.add_argument("--weight-backend", choices=("nccl", "gloo", "file"))
    parser.add_argument(
        "--adapter-rank",
        type=int,
        metavar="N",
        help="with --weight-backend: take only a LoRA adapter of this rank, not whole weights "
        "(weight_sync.what=adapter)",
    )
    parser.add_argument(
        "--devices", default="", metavar="0,1", help="numbers of visible GPUs; default: all"
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--api-key-env", default=defaults.api_key_env, metavar="NAME")
    parser.add_argument("--api-key-file", metavar="FILE")
    parser.add_argument("--no-api-key", action="store_true", help="answer everybody")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help=f"one of {', '.join(defaults.server)}"
    )
    parsed = parser.parse_args(arguments)
    if not re.fullmatch(r"(\d+(,\d+)*)?", parsed.devices):
        parser.error(f"--devices {parsed.devices}: give numbers of GPUs, as 0,1")
    rank, highest = parsed.adapter_rank, SERVED_RANKS[-1]
    if rank is not None and (parsed.weight_backend is None or not 1 <= rank <= highest):
        parser.error(f"--adapter-rank {rank}: give 1 to {highest}, with a --weight-backend")
    devices = [int(number) for number in parsed.devices.split(",") if number]
    overrides = OmegaConf.from_dotlist(list(parsed.settings))
    merged = OmegaConf.to_container(OmegaConf.merge(defaults.server, overrides), resolve=True)
    try:
        settings = VllmServer.model_validate(merged)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        parser.error("; ".join(wrong))
    check_drafts("speculation", settings.speculation)
    api_key = None
    if not parsed.no_api_key:
        api_key = read_api_key(parsed.api_key_env, parsed.api_key_file)
        if api_key is None:
            raise rule_broken(
                "--api-key-env",
                parsed.api_key_env,
                "the variable is not set, and the server answers everybody without a key",
                "export it, give --api-key-file, or say --no-api-key",
            )
    server = Server(
        parsed.model,
        settings,
        parsed.log_file,
        host=parsed.host,
        port=parsed.port,
        api_key=api_key,
        devices=devices,
        weight_backend=parsed.weight_backend,
        adapter_rank=parsed.adapter_rank,
        trust_remote_code=parsed.trust_remote_code,
    )
    return server, parsed.url_file


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after SIGTERM or SIGINT; 1 when the server ended by itself; 2 for a bad setting."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_on)
    try:
        server, url_file = _parse(arguments)
        with server:
            print(f"ready: {server.url}", flush=True)
            if url_file is not None:
                write_atomically(url_file, f"{server.url}\n")
            while server.exit_status() is None:
                time.sleep(0.5)
            raise server.failure()
    except _Stopped as stopped:
        log.info("%s: stopped", stopped)
        return 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
