"""Answers judged beside their generation, several at one time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from types import TracebackType

from tqdm import tqdm

from nemo_trd.config.evaluation import EvaluationConfig
from nemo_trd.config.schema import VerifierName
from nemo_trd.verifiers.judgement import Answer, Judge, Judgement
from nemo_trd.verifiers.math import MathJudge
from nemo_trd.verifiers.select import judge_of
from nemo_trd.verifiers.several import judge_answer


class JudgePool:
    """Threads that wait for the processes in which answers are checked, as a context manager.

    Leaving it with an exception gives up what has not been begun.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        workers = config.verification.workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self._futures: list[Future[None]] = []
        self._failure: BaseException | None = None  # the last, in any thread
        self._judges: list[Judge] = []
        self._idle: dict[VerifierName, SimpleQueue[Judge]] = {}
        for name in {benchmark.verifier for benchmark in config.benchmarks.values()}:
            self._idle[name] = SimpleQueue()
            for _ in range(workers):
                timeout = config.verification.math_timeout_seconds
                judge = judge_of(name, config.sandbox, timeout)
                self._judges.append(judge)
                self._idle[name].put(judge)

    def submit(
        self,
        verifier: VerifierName,
        text: str,
        answer: Answer,
        then: Callable[[Judgement], None],
    ) -> None:
        """Judge the answer some time, and hand the judgement to `then` in a thread of the pool.

        Raises what went wrong with an earlier one.
        """
        if self._failure is not None:
            raise self._failure

        def work() -> None:
            try:
                then(self._judged(verifier, text, answer))
            except BaseException as error:
                self._failure = error
                raise

        self._futures.append(self._threads.submit(work))

    def _judged(self, verifier: VerifierName, text: str, answer: Answer) -> Judgement:
        judge = self._idle[verifier].get()
        try:
            return judge_answer(judge, text, answer)
        finally:
            self._idle[verifier].put(judge)

    def finish(self, progress: bool) -> None:
        """Wait for all judgements. Raises what went wrong in a thread."""
        bar = tqdm(total=len(self._futures), desc="verdicts", leave=False, disable=not progress)
        with bar:
            for future in as_completed(self._futures):
                future.result()
                bar.update()

    def __enter__(self) -> JudgePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        for judge in self._judges:
            if isinstance(judge, MathJudge):
                judge.worker.stop()
