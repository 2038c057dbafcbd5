"""Which servers a node holds, and how they are reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose
from nemo_trd.serve.node import address_towards, servers_of_node

LOCAL = ["generation=local", "generation.max_staleness=0", "teacher.scoring=megatron"]
RECIPE = ["experiment=trd_8b", "model.student.path=/student", "model.teacher.path=/teacher"]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_TRD_API_KEY", "key")


def test_the_gpus_of_a_node_are_divided_among_its_servers(tmp_path: Path) -> None:
    config = compose([*RECIPE, "cluster.student_server_tp=2"])
    students = servers_of_node(config, "student", "10.0.0.3", tmp_path)
    assert [list(server._devices) for server in students] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert {server.model for server in students} == {"/student"}
    assert {server.settings.tensor_parallel_size for server in students} == {2}
    assert {server._weight_backend for server in students} == {"nccl"}
    (teacher,) = servers_of_node(config, "teacher", "10.0.0.4", tmp_path)
    assert (teacher.model, list(teacher._devices)) == ("/teacher", list(range(8)))
    assert (teacher.host, teacher._weight_backend) == ("10.0.0.4", None)
    assert len({server.log_file for server in [*students, teacher]}) == 5


def test_the_servers_of_a_role_have_its_settings(tmp_path: Path) -> None:
    config = compose(
        [
            *(*RECIPE, "generation.vllm.server.max_num_seqs=64"),
            *("generation.vllm.teacher.server.max_num_seqs=8",),
            *("generation.vllm.teacher.server.quantization=fp8",),
            "generation.vllm.teacher.server.tensor_parallel_size=8",
        ]
    )
    student = servers_of_node(config, "student", "10.0.0.3", tmp_path)[0]
    (teacher,) = servers_of_node(config, "teacher", "10.0.0.4", tmp_path)
    told = [" ".join(server._arguments(is_cpu=False)) for server in (student, teacher)]
    assert "--max-num-seqs 64" in told[0] and "--quantization" not in told[0]
    assert "--max-num-seqs 8 --quantization fp8" in told[1]


def test_the_servers_of_a_student_hold_room_for_its_adapter_where_that_is_sent(
    tmp_path: Path,
) -> None:
    adapter = ["student.adapter=lora", "student.adapter.rank=20"]
    alone = [*RECIPE, *adapter, "generation.vllm.weight_sync.what=adapter"]
    student = servers_of_node(compose(alone), "student", "10.0.0.3", tmp_path)[0]
    told = " ".join(student._arguments(is_cpu=False))
    assert '{"backend": "nemo_trd_adapter"} --enable-lora --max-loras 1' in told
    assert "--max-lora-rank 32" in told and "--lora-modules adapter=" in told
    (teacher,) = servers_of_node(compose(alone), "teacher", "10.0.0.4", tmp_path)
    merged = servers_of_node(compose([*RECIPE, *adapter]), "student", "10.0.0.3", tmp_path)[0]
    assert not any("lora" in " ".join(s._arguments(is_cpu=False)) for s in (teacher, merged))


def test_in_opsd_the_teacher_servers_hold_the_first_student(tmp_path: Path) -> None:
    config = compose(["experiment=trd_70b", "model.student.path=/student"])
    (teacher,) = servers_of_node(config, "teacher", "10.0.0.4", tmp_path)
    assert teacher.model == "/student"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (LOCAL, "generation.backend = 'local'"),
        (["cluster.gpus_per_node=4"], "cluster.teacher_server_tp = 8"),
        (
            ["generation.vllm.teacher.server.tensor_parallel_size=4"],
            "teacher.server.tensor_parallel_size = 4: .*cluster.teacher_server_tp=4",
        ),
        (["generation.vllm.api_key_env=NO_SUCH_KEY"], "generation.vllm.api_key_env"),
    ],
)
def test_servers_that_cannot_be_are_refused(
    overrides: list[str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=named):
        servers_of_node(compose([*RECIPE, *overrides]), "teacher", "10.0.0.4", tmp_path)


def test_the_address_is_the_one_on_the_way_to_those_who_ask() -> None:
    assert address_towards("127.0.0.1").startswith("127.0.0.")
    with pytest.raises(ConfigError, match="reached-from = 'no.such.host.invalid'"):
        address_towards("no.such.host.invalid")
