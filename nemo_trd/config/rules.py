"""The rules between settings, where those of one setting alone stand in `schema.py`."""

from __future__ import annotations

import json
import re
from typing import get_args
from urllib.parse import urlsplit

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import (
    SERVED_RANKS,
    Config,
    Dataset,
    EstimatorName,
    Layout,
    ServedPool,
    Speculation,
    StoredPairs,
    VerifierName,
    Vllm,
    WeightSync,
)


def check_consistent(config: Config) -> None:
    """Rules between fields.

    Raises:
        ConfigError: naming the first rule that is broken.
    """
    _check_models_and_data(config)
    _check_refinement(config)
    _check_training(config)
    _check_loss(config)
    if config.generation.stored is not None:
        _check_stored(config, config.generation.stored)
    _check_precision(config)
    _check_adapter(config)
    _check_moving_teacher(config)
    if config.teacher_is_student:
        _check_shared_modules(config)
    _check_layouts_and_servers(config)


def _check_models_and_data(config: Config) -> None:
    mode, teacher = config.algorithm.mode, config.model.teacher
    if mode == "opd" and teacher is None:
        raise rule_broken(
            "model.teacher",
            None,
            "algorithm.mode=opd distils a separate teacher",
            "set model.teacher.path, or algorithm.mode=opsd",
        )
    if mode == "opsd" and teacher is not None:
        raise rule_broken(
            "model.teacher.path",
            teacher.path,
            "in algorithm.mode=opsd the teacher is the frozen step-0 student",
            "set model.teacher=null, or algorithm.mode=opd",
        )
    train = config.data.train
    if mode == "opsd" and not _has_reference(train):
        raise rule_broken(
            "data.train.columns.reference_solution",
            None,
            "algorithm.mode=opsd shows the reference solution to the teacher",
            "name the column that holds worked solutions; where they are the last turns of "
            "columns.messages, set data.train.last_assistant_turn=reference_solution",
        )
    for split, dataset in (("train", config.data.train), ("validation", config.data.validation)):
        if dataset is not None:
            check_dataset(f"data.{split}", dataset, config.data.verifier)


def _check_refinement(config: Config) -> None:
    refinement = config.refinement
    if refinement.subset != "all" and config.data.verifier == "none":
        raise rule_broken(
            "refinement.subset",
            refinement.subset,
            "choosing wrong or right rollouts needs a verifier",
            "set data.verifier=math, code or exact, or refinement.subset=all",
        )
    if config.algorithm.trajectory == "rollout" and refinement.subset != "all":
        raise rule_broken(
            "refinement.subset",
            refinement.subset,
            "algorithm.trajectory=rollout refines nothing",
            "set refinement.subset=all",
        )


def _check_training(config: Config) -> None:
    train = config.train
    if (train.micro_batch_size is None) == (train.max_tokens_per_micro_batch is None):
        raise rule_broken(
            "train.micro_batch_size",
            train.micro_batch_size,
            "exactly one of train.micro_batch_size and train.max_tokens_per_micro_batch is set",
            "set the other one to null",
        )
    data = config.data
    if config.evaluation.wanted and (data.validation is None or data.verifier == "none"):
        missing = "validation" if data.validation is None else "verifier"
        raise rule_broken(
            f"data.{missing}",
            getattr(data, missing),
            "evaluation.at_start, at_end and interval need problems to solve and a verifier",
            f"set data.{missing}, or switch evaluation off (at_start=false, at_end=false, "
            "interval=null)",
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise rule_broken(
            "optimizer.min_lr",
            config.optimizer.min_lr,
            f"it may not exceed optimizer.lr = {config.optimizer.lr}",
            "lower it",
        )


def _check_loss(config: Config) -> None:
    loss = config.loss
    if loss.divergence != "jsd" and loss.beta != 0.5:
        raise rule_broken(
            "loss.beta",
            loss.beta,
            f"loss.divergence={loss.divergence} does not use it",
            "remove it, or set loss.divergence=jsd",
        )
    if loss.divergence not in get_args(EstimatorName):
        return
    for field, value in (("top_k", loss.top_k), ("entry_clip", loss.entry_clip)):
        if value is not None:
            raise rule_broken(
                f"loss.{field}",
                value,
                f"loss.divergence={loss.divergence} looks at the sampled token alone",
                "set it to null, or loss.divergence=reverse_kl",
            )
    samples = f"loss.divergence={loss.divergence} is an estimate where labels are samples of the "
    if config.algorithm.trajectory != "rollout":
        raise rule_broken(
            "algorithm.trajectory",
            config.algorithm.trajectory,
            f"{samples}student, and a rewrite is one of the teacher",
            "set it to rollout, or loss.divergence=reverse_kl",
        )
    if config.generation.stored is not None:
        raise rule_broken(
            "generation.stored",
            config.generation.stored.rollout,
            f"{samples}student that is trained, and stored rollouts are of the one before training",
            "set it to null, or loss.divergence=reverse_kl",
        )


def _check_stored(config: Config, stored: StoredPairs) -> None:
    """Rules for samples that are read: each row of data.train is one pair, of the step-0 models."""
    drawn = "set generation.stored=null to draw samples"
    if stored.refinement is None and config.algorithm.trajectory == "refinement":
        raise rule_broken(
            "generation.stored.refinement",
            None,
            "algorithm.trajectory=refinement trains on rewrites",
            f"name their column, set algorithm.trajectory=rollout, or {drawn}",
        )
    if config.train.rollouts_per_prompt != 1:
        raise rule_broken(
            "train.rollouts_per_prompt",
            config.train.rollouts_per_prompt,
            "with generation.stored each row of data.train holds one rollout",
            f"set it to 1 (several rollouts of a problem are several rows), or {drawn}",
        )
    if config.generation.max_staleness:
        raise rule_broken(
            "generation.max_staleness",
            config.generation.max_staleness,
            "with generation.stored nothing is drawn that could be drawn ahead",
            f"set it to 0, or {drawn}",
        )


def _check_precision(config: Config) -> None:
    """Rules for delayed scaling, which takes a tensor's scale from its history.

    TransformerEngine exchanges the maxima of all tensors over all ranks whenever a forward pass
    ends, since megatron-core names no group: with pipeline stages some ranks are elsewhere then.
    """
    precision = config.precision
    if precision.fp8_recipe != "delayed":
        return
    if precision.teacher_fp8 is not None:
        raise rule_broken(
            "precision.fp8_recipe",
            "delayed",
            "scales follow from backward passes, and the teacher (precision.teacher_fp8 = "
            f"{precision.teacher_fp8}) has none",
            "set it to tensorwise, or precision.teacher_fp8=null",
        )
    stages = config.parallel.student.pipeline_model_parallel_size
    if precision.fp8 is not None and stages > 1:
        raise rule_broken(
            "precision.fp8_recipe",
            "delayed",
            "all ranks exchange maxima after each forward pass, and the stages of a pipeline "
            f"(parallel.student.pipeline_model_parallel_size = {stages}) would wait for each other",
            "set it to tensorwise",
        )


def _check_adapter(config: Config) -> None:
    adapter, precision = config.student.adapter, config.precision
    if adapter is None:
        if config.checkpoint.export_merged:
            raise rule_broken(
                "checkpoint.export_merged",
                True,
                "student.adapter=null trains the weights themselves: export/ has them",
                "set it to false",
            )
        return
    twice = [target for target in adapter.targets if adapter.targets.count(target) > 1]
    if twice:
        raise rule_broken(
            "student.adapter.targets",
            adapter.targets,
            f"a linear layer has one A and one B, and {twice[0]} is named twice",
            "name it once",
        )
    if precision.fp8 is not None and precision.fp8_recipe == "delayed":
        raise rule_broken(
            "precision.fp8_recipe",
            "delayed",
            "checkpoints of an adapter hold nothing of the weights, nor the scales that follow "
            "from their history",
            "set it to tensorwise",
        )
    own_teacher = config.model.teacher is None and config.teacher.ema is None
    if own_teacher and adapter.init not in ("kaiming", "gaussian"):
        raise rule_broken(
            "student.adapter.init",
            adapter.init,
            "in algorithm.mode=opsd the teacher is the step-0 student, and that must be the model "
            "without its adapter",
            "merge the adapter into model.student.path, and set student.adapter.init=kaiming",
        )


def _check_moving_teacher(config: Config) -> None:
    """Rules for a teacher that follows the student."""
    ema = config.teacher.ema
    if ema is None:
        return
    if config.algorithm.mode != "opsd":
        raise rule_broken(
            "teacher.ema",
            ema,
            f"in algorithm.mode={config.algorithm.mode} the teacher is another model, and stays",
            "set it to null, or algorithm.mode=opsd",
        )
    servers = "the teacher's servers have the weights of the step-0 student, and get no others"
    if config.scores_on_servers:
        raise rule_broken(
            "teacher.scoring",
            config.teacher.scoring,
            f"with teacher.ema = {ema:g} the teacher's weights change, and {servers}",
            "set it to megatron, or teacher.ema=null",
        )
    if config.draws_rewrites and config.generation.vllm is not None:
        raise rule_broken(
            "generation.backend",
            config.generation.backend,
            f"with teacher.ema = {ema:g} the teacher that rewrites changes, and {servers}",
            "choose generation=local, algorithm.trajectory=rollout, or teacher.ema=null",
        )


def _check_shared_modules(config: Config) -> None:
    """Rules for a teacher that is the student's own modules: what holds for one holds for both."""
    student, precision = config.parallel.student, config.precision
    setting = "student.adapter" if config.teacher.ema is None else "teacher.ema"
    shared = f"with {setting} the teacher of algorithm.mode=opsd is the student's own modules"
    for field, value in student.model_dump().items():
        other = getattr(config.parallel.teacher, field)
        if other != value:
            raise rule_broken(
                f"parallel.teacher.{field}",
                other,
                f"{shared}, so it is split as that is: parallel.student.{field} = {value}",
                f"set it to {json.dumps(value)}",
            )
    if precision.teacher_fp8 != precision.fp8:
        raise rule_broken(
            "precision.teacher_fp8",
            precision.teacher_fp8,
            f"{shared}, which compute with precision.fp8 = {precision.fp8}",
            f"set it to {json.dumps(precision.fp8)}",
        )
    if config.teacher.offload_weights:
        raise rule_broken(
            "teacher.offload_weights",
            True,
            f"{shared}: there is no second copy to put away",
            "set it to false",
        )


def _check_layouts_and_servers(config: Config) -> None:
    if config.scores_on_servers:
        _check_server_scoring(config)
    if config.teacher.scoring == "generation":
        _check_scoring_by_generation(config)
    for role in ("student", "teacher"):
        forward_only = role == "teacher" and not config.teacher_is_student
        layout = getattr(config.parallel, role)
        _check_layout(f"parallel.{role}", layout, forward_only=forward_only)
        if config.generation.vllm is not None and not (
            role == "teacher" and config.teacher_on_student_servers
        ):
            vllm = config.generation.vllm
            check_pool(f"generation.vllm.{role}", getattr(vllm, role))
    if config.generation.colocate:
        _check_colocated(config)
    if config.generation.vllm is not None:
        _check_run_ahead(config.generation.max_staleness, config.generation.vllm.weight_sync)
        _check_served_adapter(config, config.generation.vllm)
        _check_servers_of_roles(config, config.generation.vllm)
        call_limit = config.generation.vllm.weight_sync.call_timeout_seconds
        if call_limit >= 60 * config.parallel.timeout_minutes:
            raise rule_broken(
                "generation.vllm.weight_sync.call_timeout_seconds",
                call_limit,
                "the other ranks wait for a server in a collective, and that for no longer than "
                f"parallel.timeout_minutes = {config.parallel.timeout_minutes:g}",
                "lower it, or raise parallel.timeout_minutes",
            )


def _check_run_ahead(staleness: int, sync: WeightSync) -> None:
    if staleness > 1 and sync.in_flight != "keep":
        raise rule_broken(
            "generation.vllm.weight_sync.in_flight",
            sync.in_flight,
            f"with generation.max_staleness = {staleness} servers write on while weights change",
            "set it to keep, or generation.max_staleness to 0 or 1",
        )


def _check_colocated(config: Config) -> None:
    """Rules for servers and trainer that take turns on the same GPUs."""
    generation, vllm = config.generation, config.generation.vllm
    apart = "or generation.colocate=false"
    if vllm is None:
        raise rule_broken(
            "generation.colocate",
            True,
            f"servers share GPUs with the trainer, and backend {generation.backend} has none",
            f"choose generation=vllm, {apart}",
        )
    if generation.max_staleness:
        raise rule_broken(
            "generation.max_staleness",
            generation.max_staleness,
            "with generation.colocate servers sleep while the trainer computes",
            f"set it to 0, {apart}",
        )
    if vllm.weight_sync.backend == "nccl":
        raise rule_broken(
            "generation.vllm.weight_sync.backend",
            "nccl",
            "with generation.colocate trainer and server are on one GPU, and NCCL joins no two "
            "processes of one GPU",
            f"set it to gloo or file, {apart}",
        )
    for role, pool, asked in (
        ("student", vllm.student, config.asks_student),
        ("teacher", vllm.teacher, config.asks_teacher),
    ):
        if asked and pool.urls:
            raise rule_broken(
                f"generation.vllm.{role}.urls",
                pool.urls,
                "with generation.colocate the run starts the servers, on the GPUs of its ranks",
                f"set replicas and devices, {apart}",
            )
    stays = config.teacher.scoring == "megatron" and not config.teacher_is_student
    if stays and not config.teacher.offload_weights:
        raise rule_broken(
            "teacher.offload_weights",
            False,
            "with generation.colocate the teacher's weights give their memory to the servers, too",
            f"set it to true, or teacher.scoring=generation, {apart}",
        )


def _check_servers_of_roles(config: Config, vllm: Vllm) -> None:
    """Rules for the student's servers beside the teacher's."""
    served = {address_of(url): url for url in vllm.student.urls}
    shared = [url for url in vllm.teacher.urls if address_of(url) in served]
    if shared and config.asks_teacher:
        raise rule_broken(
            "generation.vllm.teacher.urls",
            shared[0],
            f"generation.vllm.student.urls has the same server ({served[address_of(shared[0])]}), "
            "and that one is given the student's weights after every step",
            "give servers of the teacher alone",
        )
    _check_drafts(config, vllm)
    server = vllm.student.server
    quantized = [a for a in server.arguments if re.match(r"(--quantization|-q)(=|\s|$)", a)]
    if server.quantization is not None or quantized:
        raise rule_broken(
            "generation.vllm.student.server." + ("arguments" if quantized else "quantization"),
            server.arguments if quantized else server.quantization,
            "the student is given new weights after every step, and its rollouts must be samples "
            "of the model that is trained",
            "leave it out of arguments"
            if quantized
            else "set it to null for the student; generation.vllm.teacher.server may have it",
        )


def _check_served_adapter(config: Config, vllm: Vllm) -> None:
    """Rules for what vLLM can add to the weights that it serves."""
    adapter, field = config.student.adapter, "generation.vllm.weight_sync.what"
    if vllm.weight_sync.what == "adapter" and adapter is None:
        raise rule_broken(
            field,
            "adapter",
            "student.adapter=null trains the weights themselves",
            "set it to merged, or student.adapter=lora",
        )
    served = config.served_adapter
    if served is not None and served.rank > SERVED_RANKS[-1]:
        raise rule_broken(
            "student.adapter.rank",
            served.rank,
            f"with {field}=adapter vLLM adds it to the weights, and takes ranks of up to "
            f"{SERVED_RANKS[-1]}",
            f"lower it, or set {field}=merged",
        )
    if config.teacher_on_student_servers:
        student, teacher = (pool.server.model_dump() for pool in (vllm.student, vllm.teacher))
        for name, value in teacher.items():
            if value != student[name]:
                raise rule_broken(
                    f"generation.vllm.teacher.server.{name}",
                    value,
                    "with generation.vllm.teacher.urls=[] and replicas=0 the student's servers "
                    f"answer for the teacher, and generation.vllm.student.server.{name} is "
                    f"{json.dumps(student[name])}",
                    f"set it to {json.dumps(student[name])}, or give servers of the teacher",
                )
    arguments = vllm.student.server.arguments
    own = [a for a in arguments if re.match(r"--(enable-lora|(max-)?lora-|max-(cpu-)?loras)", a)]
    if own:
        raise rule_broken(
            "generation.vllm.student.server.arguments",
            arguments,
            f"{own[0]} is among those that a student's server gets from {field}",
            "leave it out",
        )


def _check_drafts(config: Config, vllm: Vllm) -> None:
    """Rules for servers that check drafts."""
    if vllm.student.server.speculation is not None:
        raise rule_broken(
            "generation.vllm.student.server.speculation",
            vllm.student.server.speculation.model_dump(),
            "drafts are copied from the prompt, and a rollout copies next to nothing of it",
            "set it to null; generation.vllm.teacher.server may have it",
        )
    field = "generation.vllm.teacher.server.speculation"
    check_drafts(field, vllm.teacher.server.speculation)
    if vllm.teacher.server.speculation is not None and config.generation.refinement.min_p > 0:
        raise rule_broken(
            "generation.refinement.min_p",
            config.generation.refinement.min_p,
            f"vLLM does not take it from servers with drafts ({field})",
            f"set it to 0, or {field}=null",
        )


def check_drafts(field: str, drafts: Speculation | None) -> None:
    """Raises ConfigError: settings of `method` are missing, or of another one."""
    if drafts is None:
        return
    longest, shortest = drafts.lookup_max, drafts.lookup_min
    if drafts.method == "ngram" and longest is None:
        raise rule_broken(
            f"{field}.lookup_max",
            None,
            "method ngram looks up the last tokens",
            "set how many at most, for example 4",
        )
    if drafts.method == "suffix" and (longest, shortest) != (None, None):
        raise rule_broken(
            f"{field}.lookup_max",
            longest,
            "method suffix looks up as much as it finds",
            "set lookup_max and lookup_min to null",
        )
    if longest is not None and shortest is not None and shortest > longest:
        raise rule_broken(
            f"{field}.lookup_min", shortest, f"it may not exceed lookup_max = {longest}", "lower it"
        )


def _check_server_scoring(config: Config) -> None:
    """Rules for a teacher on servers: its most likely tokens, at temperature 1."""
    generation, loss, megatron = config.generation, config.loss, "or teacher.scoring=megatron"
    scoring = config.teacher.scoring
    if generation.vllm is None:
        raise rule_broken(
            "teacher.scoring",
            scoring,
            f"vLLM servers score, and generation.backend={generation.backend} has none",
            f"choose generation=vllm, {megatron}",
        )
    if loss.top_k is None and loss.divergence not in get_args(EstimatorName):
        raise rule_broken(
            "loss.top_k",
            None,
            f"with teacher.scoring={scoring} only the teacher's most likely tokens are known",
            f"set how many, for example 64, {megatron}",
        )
    if loss.temperature != 1:
        raise rule_broken(
            "loss.temperature",
            loss.temperature,
            f"with teacher.scoring={scoring} log-probabilities are those at temperature 1",
            f"set it to 1, {megatron}",
        )
    arguments = generation.vllm.teacher.server.arguments
    limits = re.findall(r"--max[-_]logprobs[ =](\d+)", " ".join(arguments))
    top_k = loss.top_k or 1
    if limits and int(limits[-1]) < top_k:
        raise rule_broken(
            "generation.vllm.teacher.server.arguments",
            arguments,
            f"--max-logprobs must allow for loss.top_k = {top_k}",
            "leave it out: servers are started without a limit",
        )
    for field, value, off in (
        ("teacher.offload_weights", config.teacher.offload_weights, False),
        ("teacher.offload_states", config.teacher.offload_states, False),
        ("precision.teacher_fp8", config.precision.teacher_fp8, None),
    ):
        if value != off:
            raise rule_broken(
                field,
                value,
                f"with teacher.scoring={scoring} no teacher is held in Megatron",
                f"set it to {json.dumps(off)}, {megatron}",
            )


def _check_scoring_by_generation(config: Config) -> None:
    """Rules for a teacher that is scored while it writes: it writes y_r, in c_T of the loss."""
    algorithm, refinement, server = config.algorithm, config.refinement, "or teacher.scoring=server"
    if not config.draws_rewrites:
        vanilla = algorithm.trajectory == "rollout"
        raise rule_broken(
            "algorithm.trajectory" if vanilla else "generation.stored",
            algorithm.trajectory if vanilla else "rollout and refinement",
            "with teacher.scoring=generation labels are scored while the teacher writes them, and "
            "here it writes nothing",
            f"set it to {'refinement' if vanilla else 'null'}, {server}",
        )
    if algorithm.teacher_context != "refine":
        raise rule_broken(
            "algorithm.teacher_context",
            algorithm.teacher_context,
            "with teacher.scoring=generation labels are scored in the context in which the teacher "
            "wrote them, the refinement prompt",
            f"set it to refine, {server}",
        )
    scored, written = config.teacher.chat_template_kwargs, refinement.chat_template_kwargs
    written = config.data.chat_template_kwargs if written is None else written
    if scored not in (None, written):
        raise rule_broken(
            "teacher.chat_template_kwargs",
            scored,
            "with teacher.scoring=generation labels are scored in the context in which the teacher "
            f"wrote them, and that has {json.dumps(written)}",
            f"set it to null, {server}",
        )


def _has_reference(dataset: Dataset) -> bool:
    in_messages = dataset.last_assistant_turn == "reference_solution"
    return in_messages or dataset.columns.reference_solution is not None


def check_dataset(field: str, dataset: Dataset, verifier: VerifierName) -> None:
    """Raises ConfigError: columns that contradict each other, or give the verifier nothing."""
    columns = dataset.columns
    if (columns.problem is None) == (columns.messages is None):
        raise rule_broken(
            f"{field}.columns.problem",
            columns.problem,
            "exactly one of columns.problem and columns.messages is set",
            "set the other one to null",
        )
    if dataset.last_assistant_turn == "reference_solution" and (
        columns.messages is None or columns.reference_solution is not None
    ):
        raise rule_broken(
            f"{field}.last_assistant_turn",
            dataset.last_assistant_turn,
            "it takes the solution out of columns.messages, and is its only source",
            "set last_assistant_turn=refuse, or columns.messages and "
            "columns.reference_solution=null",
        )
    if columns.messages is not None and dataset.template is not None:
        raise rule_broken(
            f"{field}.template",
            dataset.template,
            "it is the user's turn, and columns.messages has that already",
            "set template=null, or name columns.problem instead",
        )
    if dataset.template is not None and "{problem}" not in dataset.template:
        raise rule_broken(
            f"{field}.template", dataset.template, "it lacks {problem}", "put it where it belongs"
        )
    if verifier == "code" and dataset.answer_pattern is not None:
        raise rule_broken(
            f"{field}.answer_pattern",
            dataset.answer_pattern,
            "verifier code reads tests from columns.answer, whole",
            "set it to null",
        )
    if isinstance(columns.answer, list) and (verifier != "code" or not columns.answer):
        raise rule_broken(
            f"{field}.columns.answer",
            columns.answer,
            "a list of columns holds the tests of verifier code",
            "name one column",
        )
    if columns.answer is None and dataset.answer_pattern is None:
        if verifier != "none":
            raise rule_broken(
                f"{field}.columns.answer",
                None,
                f"verifier={verifier} compares with an answer",
                "name its column, or set answer_pattern, or verifier=none",
            )
    elif dataset.answer_pattern is not None and not (columns.answer or _has_reference(dataset)):
        raise rule_broken(
            f"{field}.answer_pattern",
            dataset.answer_pattern,
            "it is searched in columns.answer, or else in the reference solution",
            "name columns.answer or columns.reference_solution",
        )


def _check_layout(field: str, layout: Layout, *, forward_only: bool) -> None:
    virtual = layout.virtual_pipeline_model_parallel_size
    if forward_only and virtual is not None:
        raise rule_broken(
            f"{field}.virtual_pipeline_model_parallel_size",
            virtual,
            "the teacher runs forward only and gains nothing from interleaving",
            "set it to null",
        )
    if virtual is not None and layout.pipeline_model_parallel_size < 2:
        raise rule_broken(
            f"{field}.virtual_pipeline_model_parallel_size",
            virtual,
            "the interleaved schedule needs pipeline_model_parallel_size of 2 or more",
            "set it to null, or raise pipeline_model_parallel_size",
        )
    if virtual is not None and layout.pipeline_model_parallel_size == 2 and layout.batch_p2p_comm:
        raise rule_broken(
            f"{field}.batch_p2p_comm",
            True,
            "megatron-core computes silently wrong gradients with the interleaved schedule at "
            "pipeline_model_parallel_size=2 and batched p2p",
            "set it to false",
        )
    if layout.sequence_parallel and layout.tensor_model_parallel_size == 1:
        raise rule_broken(
            f"{field}.sequence_parallel",
            True,
            "it splits sequences over tensor parallel ranks and there is one",
            "set it to false, or raise tensor_model_parallel_size",
        )


def address_of(url: str) -> tuple[str, int] | None:
    """(host, port) of http://HOST:PORT, the same for two spellings of it; None: malformed."""
    if not re.fullmatch(r"https?://[^/@?#\s]+", url):
        return None
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError:
        return None
    host = (parts.hostname or "").rstrip(".")
    return ("localhost" if host in ("127.0.0.1", "0.0.0.0", "::1", "::") else host), port


def check_pool(field: str, pool: ServedPool) -> None:
    """Refuse servers that are named twice, or not at all, or for too few GPUs.

    Raises:
        ConfigError
    """
    gpus = pool.replicas * pool.server.tensor_parallel_size
    if pool.devices and len(set(pool.devices)) != gpus:
        raise rule_broken(
            f"{field}.devices",
            pool.devices,
            f"replicas x {field}.server.tensor_parallel_size = {gpus} GPUs are needed, each once",
            "give that many",
        )
    if bool(pool.urls) == bool(pool.replicas):
        raise rule_broken(
            f"{field}.urls",
            pool.urls,
            f"exactly one of urls and replicas (= {pool.replicas}) names the servers",
            f"set {field}.replicas=0 beside URLs of running servers, or urls=[]",
        )
    for url in pool.urls:
        places = [address_of(other) for other in pool.urls]
        if address_of(url) is None or places.count(address_of(url)) > 1:
            raise rule_broken(
                f"{field}.urls",
                url,
                "each server is given once, as http://HOST:PORT without a path or a password",
                "correct the list",
            )


def check_server_tp(config: Config, role: str) -> None:
    """The cluster's figure holds for servers of a node; another one must not be lost in silence.

    Raises:
        ConfigError
    """
    vllm, cluster = config.generation.vllm, config.cluster
    assert vllm is not None
    tp = cluster.student_server_tp if role == "student" else cluster.teacher_server_tp
    size = (vllm.student if role == "student" else vllm.teacher).server.tensor_parallel_size
    if size not in (1, tp):
        raise rule_broken(
            f"generation.vllm.{role}.server.tensor_parallel_size",
            size,
            f"on nodes of their own servers have cluster.{role}_server_tp = {tp} GPUs",
            f"set cluster.{role}_server_tp={size}",
        )
