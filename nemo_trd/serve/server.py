"""vLLM servers: OpenAI-compatible, in sessions of their own, ended with whoever starts them.

A server runs in vLLM's own environment (`generation.vllm.server.python`). Its API key comes from
an environment variable or a file and goes on in the environment: command lines are public.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pydantic import SecretStr

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import ModelSource, ServedPool, VllmServer, VllmSettings
from nemo_trd.models.dtypes import DTYPE_NAMES
from nemo_trd.serve import guard
from nemo_trd.serve.environment import check_draft_package, find_vllm, server_environment
from nemo_trd.serve.worker import draft_arguments, worker_arguments

log = logging.getLogger(__name__)

SERVED_NAME = "nemo_trd"
REPORT_SECONDS = 10.0
TAIL_LINES = 25
# A seed per request kills the CPU engine when a prefill is chunked.
CPU_ARGUMENTS = ("--enforce-eager", "--no-enable-chunked-prefill")
CPU_BATCHED_TOKENS = 16384
CPU_CACHE_BYTES = 2**30  # keys and values; VLLM_CPU_KVCACHE_SPACE in the environment wins


class ServerError(RuntimeError):
    """A server did not start, or ended by itself. Shows the end of its log."""


class Server:
    """One vLLM server: started by `start` or `with`, ended by `stop`, or when this process ends.

    `url` is known from `start` on. A `port` of 0 is chosen then. With a `weight_backend` it takes
    weights: all of them, or with an `adapter_rank` those of a LoRA adapter of that rank.
    """

    def __init__(
        self,
        model: str,
        settings: VllmServer,
        log_file: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: SecretStr | None = None,
        devices: Sequence[int] = (),
        weight_backend: str | None = None,
        adapter_rank: int | None = None,
        sleeps: bool = False,
        trust_remote_code: bool = False,
        field: str = "generation.vllm.server",
    ) -> None:
        self.model = str(Path(model).absolute())
        self.settings = settings
        self.log_file = log_file
        self.host, self.port = host, port
        self._api_key = api_key
        self._devices = devices
        self._weight_backend = weight_backend
        self._adapter_rank = adapter_rank
        self._sleeps = sleeps
        self._trust_remote_code = trust_remote_code
        self._field = field  # of `settings`, for errors
        self._process: subprocess.Popen[bytes] | None = None
        self._reservation: socket.socket | None = None

    @property
    def url(self) -> str:
        """Where others reach it; bound to every address, it is under this host's name."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def pid(self) -> int:
        """The process that leads the server's session and process group."""
        assert self._process is not None
        return self._process.pid

    def shares_a_gpu(self, other: Server) -> bool:
        """Whether both are told to use the same one."""
        return not set(self._devices).isdisjoint(other._devices)

    def start(self) -> None:
        """Start it; it is not healthy yet.

        Raises:
            ConfigError: no interpreter with vLLM, not such a model directory, or GPUs that this
                process does not see.
            ServerError: the address cannot be bound.
        """
        assert self._process is None
        python, is_cpu = find_vllm(self.settings.python, f"{self._field}.python")
        self._check_drafts(python)
        self._check_adapters(is_cpu)
        command = [python, "-P", "-m", "nemo_trd_api_server"]
        self._reserve_address()
        command += self._arguments(is_cpu)
        grace = f"{self.settings.stop_timeout_seconds:g}"
        watched = [sys.executable, "-I", guard.__file__, str(os.getpid()), grace, *command]
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                watched,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=server_environment(is_cpu, self._api_key, self._devices),
                start_new_session=True,
            )
        log.info("starting a server of %s at %s, log in %s", self.model, self.url, self.log_file)

    def _check_drafts(self, python: str) -> None:
        drafts, field = self.settings.speculation, f"{self._field}.speculation"
        if drafts is None:
            return
        if self._weight_backend is not None:
            raise rule_broken(
                field,
                drafts.model_dump(),
                "a server that is given weights is a student's, and rollouts copy next to nothing",
                "set it to null",
            )
        check_draft_package(drafts, python, field)

    def _check_adapters(self, is_cpu: bool) -> None:
        if self._adapter_rank is not None and self.settings.dtype == "fp32" and not is_cpu:
            raise rule_broken(
                f"{self._field}.dtype",
                "fp32",
                "vLLM's kernels for adapters take bf16 and fp16 on GPUs",
                "set it to bf16, or send whole weights (weight_sync.what=merged)",
            )

    def wait_until_healthy(self) -> None:
        """Wait until it answers, and say every few seconds how far it is.

        Raises:
            ServerError: it ended, or `start_timeout_seconds` passed; it is stopped then.
        """
        started = time.monotonic()
        report = started + REPORT_SECONDS
        limit = self.settings.start_timeout_seconds
        while not self._answers():
            now = time.monotonic()
            if (status := self.exit_status()) is not None:
                raise self._failure(f"ended with status {status} before it answered")
            if now - started > limit:
                self.stop()
                raise self._failure(f"did not answer within {limit:g} s")
            if now > report:
                last = (self._log_tail(1) or ["nothing yet"])[0]
                waited = f"{now - started:.0f} of at most {limit:.0f} s"
                log.info("waiting for %s (%s); its log: %s", self.url, waited, last[-200:])
                report = now + REPORT_SECONDS
            time.sleep(0.2)
        self._release_address()
        log.info("%s answers after %.0f s", self.url, time.monotonic() - started)

    def exit_status(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # SIGTERM may be blocked: see node.py

    def stop(self) -> None:
        """End every process of it: asked first, killed after `stop_timeout_seconds`."""
        self._release_address()
        if self._process is None:
            return
        self.ask_to_stop()
        try:
            self._process.wait(self.settings.stop_timeout_seconds + 5)
        except subprocess.TimeoutExpired:
            log.warning("%s does not end and is killed", self.url)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Server:
        try:
            self.start()
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def failure(self) -> ServerError:
        """The error to raise of a server that ended by itself."""
        return self._failure(f"ended with status {self.exit_status()}")

    def _arguments(self, is_cpu: bool) -> list[str]:
        settings = self.settings
        arguments = ["--model", self.model, "--served-model-name", SERVED_NAME]
        arguments += ["--host", self.host, "--port", str(self.port)]
        arguments += ["--dtype", DTYPE_NAMES.get(settings.dtype, settings.dtype)]
        arguments += ["--tensor-parallel-size", str(settings.tensor_parallel_size)]
        arguments += ["--max-num-seqs", str(settings.max_num_seqs)]
        if settings.quantization is not None:
            arguments += ["--quantization", settings.quantization]
        if settings.max_model_len is not None:
            arguments += ["--max-model-len", str(settings.max_model_len)]
        if self._trust_remote_code:
            arguments.append("--trust-remote-code")
        # Sampling is what a request says, without the defaults that come with a model; log-probs
        # are the model's own, before temperature and top-p, as many as are asked for.
        arguments += ["--generation-config", "vllm", "--logprobs-mode", "raw_logprobs"]
        arguments += ["--max-logprobs", "-1"]
        # Token ids in and out with the versions of the weights: /inference/v1/generate. Of several
        # middlewares the last one comes first: nothing is answered without the key.
        arguments += ["--enable-scale-out"]
        for middleware in ("nemo_trd_scores.AnswerInArrays", "nemo_trd_auth.RequireKey"):
            arguments += ["--middleware", middleware]
        arguments.append("--disable-uvicorn-access-log")
        if self._weight_backend is not None:
            arguments += worker_arguments(self._adapter_rank)
        if self._sleeps and not is_cpu:  # a build for CPUs answers as if it slept, and refuses this
            arguments.append("--enable-sleep-mode")
        if settings.speculation is not None:
            arguments += draft_arguments(settings.speculation, is_cpu)
        if is_cpu:
            longest = max(CPU_BATCHED_TOKENS, settings.max_model_len or self._positions())
            arguments += [*CPU_ARGUMENTS, "--max-num-batched-tokens", str(longest)]
            arguments += ["--kv-cache-memory-bytes", str(CPU_CACHE_BYTES)]
        return arguments + settings.arguments

    def _positions(self) -> int:
        """Positions that the model knows; models of images and text keep them with the text's."""
        config_file = Path(self.model) / "config.json"
        try:
            settings = json.loads(config_file.read_text(encoding="utf-8"))
            text = settings.get("text_config") or {}
            return int({**settings, **text}["max_position_embeddings"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise rule_broken(
                "model of a server",
                self.model,
                f"{config_file.name} gives no max_position_embeddings: {error!r}",
                f"give a Hugging Face directory, or set {self._field}.max_model_len",
            ) from error

    def _reserve_address(self) -> None:
        """Bind the address, so that no other program is given the port while vLLM starts.

        With SO_REUSEADDR on both sides, vLLM can bind it too while this socket does not listen.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._reservation = socket.socket(family)
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._reservation.bind((self.host, self.port))
        except OSError as error:
            self._release_address()
            raise ServerError(
                f"a server cannot bind {self.host} port {self.port}: {error}. Fix: give an "
                "address of this host and a free port, or port 0"
            ) from error
        self.port = self._reservation.getsockname()[1]

    def _release_address(self) -> None:
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None

    def _answers(self) -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        address = f"[{host}]" if ":" in host else host
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"http://{address}:{self.port}/health", timeout=5) as response:
                return response.status == 200
        except (OSError, urllib.error.HTTPError):
            return False

    def _failure(self, what: str) -> ServerError:
        tail = "\n".join(self._log_tail(TAIL_LINES)) or "(it wrote nothing)"
        return ServerError(
            f"the server of {self.model} at {self.url} {what}. The end of {self.log_file}:\n{tail}"
        )

    def _log_tail(self, lines: int) -> list[str]:
        """The last lines of its log, in which the key would be blackened."""
        with self.log_file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 65536))
            text = stream.read().decode(errors="replace")
        if self._api_key is not None:
            text = text.replace(self._api_key.get_secret_value(), "***")
        return [line for line in text.splitlines() if line.strip()][-lines:]


def start_all(servers: Sequence[Server]) -> None:
    """Start servers together and wait for all; on any failure none is left running.

    Those that share a GPU start in turn: vLLM takes what a GPU loses while a server starts for
    that server's own.

    Raises:
        ConfigError, ServerError: of the first that failed.
    """
    turns: list[list[Server]] = []
    for server in servers:
        free = (turn for turn in turns if not any(map(server.shares_a_gpu, turn)))
        turn = next(free, None)
        if turn is None:
            turns.append(turn := [])
        turn.append(server)
    try:
        for turn in turns:
            for server in turn:
                server.start()
            for server in turn:
                server.wait_until_healthy()
    except BaseException:
        stop_all(servers)
        raise


def stop_all(servers: Sequence[Server]) -> None:
    for server in servers:  # told first, so that they end at the same time
        server.ask_to_stop()
    for server in servers:
        server.stop()


def servers_of(
    source: ModelSource,
    pool: ServedPool,
    vllm: VllmSettings,
    log_files: Path,
    api_key: SecretStr | None,
    weight_backend: str | None,
    *,
    adapter_rank: int | None = None,
    sleeps: bool = False,
    field: str = "generation.vllm",
) -> list[Server]:
    """The servers that a run starts itself, not started yet; none where `pool.urls` are given.

    `field` names the pool. Logs go to `log_files`-0.log and so on. Without a `weight_backend` they
    keep their weights. Those that sleep may be told to give the memory of their GPUs back.
    """
    per_server = pool.server.tensor_parallel_size
    return [
        Server(
            source.path,
            pool.server,
            log_files.with_name(f"{log_files.name}-{number}.log"),
            host=vllm.host,
            api_key=api_key,
            devices=pool.devices[number * per_server : (number + 1) * per_server],
            weight_backend=weight_backend,
            adapter_rank=adapter_rank,
            sleeps=sleeps,
            trust_remote_code=source.trust_remote_code,
            field=f"{field}.server",
        )
        for number in range(pool.replicas)
    ]
