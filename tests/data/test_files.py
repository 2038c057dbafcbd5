"""Data as it is published: every file of conf/data on small files of the true shape."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import DictConfig, OmegaConf
from tiny_tokenizers import byte_level_tokenizer

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import composed, conf_dir, validate
from nemo_trd.config.schema import Config
from nemo_trd.data.prompts import LoadedPrompts, load_prompts
from nemo_trd.data.types import Prompt
from nemo_trd.verifiers.judgement import AnswerList

TOKENIZER = byte_level_tokenizer()
OPSD = ("algorithm.mode=opsd", "model.teacher=null")


@cache
def shipped(data: str) -> DictConfig:
    return composed([f"data={data}"])


def settings(data: str, path: Path, *overrides: str) -> Config:
    changed = OmegaConf.from_dotlist([f"data.train.path={path}", *overrides])
    merged = OmegaConf.merge(shipped(data), changed)
    assert isinstance(merged, DictConfig)
    return validate(merged)


def load(data: str, path: Path, *overrides: str) -> LoadedPrompts:
    config = settings(data, path, *overrides)
    opsd = config.algorithm.mode == "opsd"
    return load_prompts(config.data.train, "data.train", config.data, TOKENIZER, opsd)


def refused(data: str, path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(data, path, *overrides)
    return str(error.value)


# What conf/data/deepscaler.yaml adds to a problem.
BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def problem_of(prompt: Prompt) -> str:
    return prompt.problem.removesuffix(BOXED)


def known(prompt: Prompt) -> tuple[str, str | None, Any]:
    return problem_of(prompt), prompt.reference_solution, prompt.answer


# --- the files of conf/data ---

USER, GPT = {"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "It is 2."}
TESTS = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[str, str | None, Any]]] = {
    "deepscaler": (
        {"problem": "1 + 1?", "answer": "2", "solution": "One more than 1: $2$."},
        ("1 + 1?", "One more than 1: $2$.", "2"),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        ("How many?", "1 + 1 = <<1+1=2>>2\n#### 2", "2"),
    ),
    "math": (
        {
            "problem": "Half?",
            "level": "Level 1",
            "type": "Algebra",
            "solution": r"\boxed{0}, no: $\boxed{\frac{1}{2}}.$",
        },
        ("Half?", r"\boxed{0}, no: $\boxed{\frac{1}{2}}.$", r"\frac{1}{2}"),
    ),
    "dapo_math": (
        {
            "data_source": "math_dapo",
            "prompt": [{"content": "Solve it.\n\n1 + 1?", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        },
        ("Solve it.\n\n1 + 1?", None, "2"),
    ),
    "openthoughts": (
        {
            "system": "Think first.",
            "conversations": [
                {"from": "user", "value": "1 + 1?"},
                {"from": "assistant", "value": "<|begin_of_thought|> 2"},
            ],
        },
        ("1 + 1?", "<|begin_of_thought|> 2", None),
    ),
    "sharegpt": (
        {"id": "x_0", "conversations": [USER, GPT, {**USER, "value": "Sure?"}, GPT]},
        ("user: 1 + 1?\n\nassistant: It is 2.\n\nuser: Sure?", "It is 2.", None),
    ),
    "taco": (
        {
            "question": "Add 1.",
            "solutions": json.dumps(["print(int(input()) + 1)", "..."]),
            "starter_code": "",
            "input_output": TESTS,
            "tags": "['Math']",
        },
        ("Add 1.", "print(int(input()) + 1)", TESTS),
    ),
}


def test_every_file_of_conf_data_is_tested_here() -> None:
    files = {file.stem for file in (conf_dir() / "data").glob("*.yaml")}
    assert files == {*PUBLISHED, "toy"}


@pytest.mark.parametrize("write", ["jsonl", "parquet"])
@pytest.mark.parametrize("data", PUBLISHED)
def test_published_layouts_are_read_directly(data: str, write: str, tmp_path: Path) -> None:
    row, (problem, reference, answer) = PUBLISHED[data]
    path = tmp_path / f"a.{write}"
    WRITERS[write](path, [row])
    mode = OPSD if reference is not None else ()
    [prompt] = load(data, path, *mode).prompts
    assert prompt.problem.endswith(BOXED) == (data == "deepscaler")
    if data == "taco":
        assert prompt.problem.startswith(f"{problem}\n\nWrite a Python program")
        problem = prompt.problem
    assert known(prompt) == (problem, reference, answer)


def test_rows_of_taco_without_a_solution_are_left_out_where_solutions_are_read(
    tmp_path: Path,
) -> None:
    row = PUBLISHED["taco"][0]
    path = WRITERS["jsonl"](tmp_path / "a.jsonl", [*[row] * 19, {**row, "solutions": "[]"}])
    assert load("taco", path, *OPSD).skipped == {"missing_reference_solution": 1}
    assert load("taco", path).skipped == {}


def test_system_prompts_of_a_column_are_shown_where_asked_for(tmp_path: Path) -> None:
    row = PUBLISHED["openthoughts"][0]
    path = WRITERS["jsonl"](tmp_path / "a.jsonl", [row, {**row, "system": None}])
    ours = ("data.system_prompt=Ours.", "data.train.columns.system=system")
    texts = [TOKENIZER.decode(p.token_ids) for p in load("openthoughts", path, *ours).prompts]
    assert texts == [
        f"<s><|system|>{system}<|end|><|user|>1 + 1?<|end|><|assistant|>"
        for system in ("Think first.", "Ours.")
    ]


# --- formats ---


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_array(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    return path


def zipped(write: Callable[[Path, Sequence[Any]], Path]) -> Callable[[Path, Sequence[Any]], Path]:
    def write_zipped(path: Path, rows: Sequence[Any]) -> Path:
        path.write_bytes(gzip.compress(write(path, rows).read_bytes()))
        return path

    return write_zipped


def write_parquet(path: Path, rows: Sequence[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def write_pandas(path: Path, rows: Sequence[Any]) -> Path:
    """Lists as numpy arrays, an index, integers that a missing one made floats."""
    frame = pandas.DataFrame(
        [{k: numpy.array(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows]
    )
    frame[frame.index % 2 == 0].to_parquet(path)
    return path


def write_shards(path: Path, rows: Sequence[Any]) -> Path:
    path.mkdir()
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    (path / "dataset_info.json").write_text("{}")
    (path / ".cache.json").write_text("{}")
    third = len(rows) // 3
    write_array(path / "shard-0.json", rows[:third])
    write_lines(path / "shard-1.jsonl", rows[third : 2 * third])
    write_parquet(path / "shard-2.parquet", rows[2 * third :])
    return path


def write_single_files(path: Path, rows: Sequence[Any]) -> Path:
    """As Hendrycks' MATH comes: a directory for the split, one of each subject, a file each."""
    for number, row in enumerate(rows):
        for split in ("train", "test"):
            file = path / split / f"subject_{number // 2}" / f"{number}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            changed = row if split == "train" else {**row, "problem": "of the test"}
            file.write_text(json.dumps(changed, indent=4))
    return path


WRITERS: dict[str, Callable[[Path, Sequence[Any]], Path]] = {
    "jsonl": write_lines,
    "JSONL": write_lines,
    "json": write_array,
    "lines.json": write_lines,
    "jsonl.gz": zipped(write_lines),
    "json.gz": zipped(write_array),
    "parquet": write_parquet,
    "shards": write_shards,
    "single_files": write_single_files,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_holds_the_same_prompts(kind: str, tmp_path: Path) -> None:
    rows = [{"problem": f"{n} + 1?", "answer": n + 1, "solution": "Ünï"} for n in range(6)]
    path = WRITERS[kind](tmp_path / f"a.{kind}", rows)
    prompts = load("deepscaler", path, *OPSD).prompts
    assert [known(p) for p in prompts] == [(f"{n} + 1?", "Ünï", str(n + 1)) for n in range(6)]
    assert len(load("deepscaler", path, "data.train.limit=5").prompts) == 5


def test_what_pandas_writes_is_read(tmp_path: Path) -> None:
    rows = [{"problem": str(n), "answer": [n, n + 1]} for n in range(4)]
    path = write_pandas(tmp_path / "a.parquet", rows)
    assert [p.answer for p in load("deepscaler", path).prompts] == [
        AnswerList(("0", "1"), "any"),
        AnswerList(("2", "3"), "any"),
    ]
    pandas.DataFrame({"problem": ["a", "b"], "answer": [4, None]}).to_parquet(path)
    loaded = load("deepscaler", path, "data.max_bad_share=0.5")
    assert [p.answer for p in loaded.prompts] == ["4"]
    assert loaded.skipped == {"missing_answer": 1}
    frame = pandas.DataFrame({"problem": ["a", "b"], "answer": [0.1, 4]})
    frame.astype({"answer": "float32"}).to_parquet(path)
    assert [p.answer for p in load("deepscaler", path).prompts] == ["0.1", "4"]


@pytest.mark.parametrize(
    ("kind", "value", "column"),
    [
        (pyarrow.list_(pyarrow.float32()), [0.1], "answer"),
        (pyarrow.large_list(pyarrow.float32()), [0.1], "answer"),
        (pyarrow.struct({"true": pyarrow.float32()}), {"true": 0.1}, "answer.true"),
        (pyarrow.list_(pyarrow.struct({"a": pyarrow.float32()})), [{"a": 0.1}], "answer.0.a"),
    ],
)
def test_short_floats_within_lists_and_structs_stay_short(
    tmp_path: Path, kind: pyarrow.DataType, value: Any, column: str
) -> None:
    path = tmp_path / "a.parquet"
    table = {"problem": ["a"], "answer": pyarrow.array([value], kind)}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    loaded = load("deepscaler", path, f"data.train.columns.answer={column}")
    assert [prompt.answer for prompt in loaded.prompts] == ["0.1"]


def test_links_are_followed_and_shards_that_are_missing_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    shard = tmp_path / "elsewhere" / "train-00000-of-00002-0a1b.jsonl"
    write_lines(shard, [{"problem": "p", "answer": "1"}])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "itself").symlink_to(tmp_path / "elsewhere")
    assert len(load("deepscaler", tmp_path / "set").prompts) == 1
    assert f"1 of the 2 shards {tmp_path / 'set/data'}/train-... are there" in caplog.text
    shard.with_name("train-00001-of-00002-0a1b.jsonl").symlink_to("nowhere")
    assert "train-00001-of-00002-0a1b.jsonl" in refused("deepscaler", tmp_path / "set")


def test_files_of_another_split_stay_unread(tmp_path: Path) -> None:
    row = {"problem": "p", "answer": "1"}
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        named = [{**row, "problem": split}]
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", named)
    assert [problem_of(p) for p in load("deepscaler", tmp_path).prompts] == ["train"]
    [prompt] = load("deepscaler", tmp_path, "data.train.split=test").prompts
    assert problem_of(prompt) == "test"
    message = refused("deepscaler", tmp_path, "data.train.split=validation")
    assert message.startswith("data.train.split = 'validation'") and "test, train" in message
    write_lines(tmp_path / "data" / "train-00000-of-00001.jsonl", [row])
    message = refused("deepscaler", tmp_path)
    assert "train-00000-of-00001.jsonl and train-00000-of-00001.parquet" in message


def test_rows_that_datasets_cannot_read_are_refused_with_their_number(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    table = pyarrow.table({"problem": texts, "answer": pyarrow.array([1, 2])})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    assert "`datasets` cannot read row" in refused("deepscaler", tmp_path / "saved")


def test_a_directory_that_its_card_divides_is_read_by_datasets(tmp_path: Path) -> None:
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        rows = [{"question": name, "answer": "#### 1"}]
        write_parquet(tmp_path / name / "train-00000-of-00001.parquet", rows)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("main", "socratic")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    [prompt] = load("gsm8k", tmp_path, "data.train.name=socratic").prompts
    assert prompt.problem == "socratic"
    assert "Please pick one" in refused("gsm8k", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"problem\nx\n", "JSON Lines (.jsonl, .ndjson), JSON (.json), both also as .gz"),
        ("a.json", b'[{"problem": "x", "answer": 1},\n {"problem": }]', "a.json line 2"),
        ("a.json", b'[{"problem": "x", "answer": 1}\n {"problem": 1}]', "neither a comma nor"),
        ("a.json", b'[{"problem": "x", "answer": 1}', "a.json line 1"),
        ("a.json", b'[{"problem": "x", "answer": 1}] []', "something follows the end"),
        ("a.json", b'[{"problem": ' + b"[" * 100_000, "line 1: the array cannot be read any"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{"rows": [{"problem": "x"}]}', "there are 'rows'"),
        ("a.json", b'{"problem": "x"', "not valid JSON"),
        ("a.json", b'["x"]', "a JSON str, not an object"),
        ("a.json", b" ", "no prompts left: 0 rows"),
        ("a.jsonl", b'[\n{"problem": "x"}\n]', "one array of objects belongs into a .json file"),
        ("a.jsonl.gz", b"no gzip", "cannot be read as JSON at its beginning"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"problem": "x", "answer": 1}\n' * 9, mtime=0)[:-9],
            "cannot be read as JSON behind",
        ),
        ("a.parquet", b"PAR1", "cannot be read as Parquet at its beginning"),
        ("d/a.txt", b"x", "none of the 1 files in this directory is JSON Lines"),
        ("d/a.parquet", b"x", "cannot be read as Parquet"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    path = file.parent if name.startswith("d/") else file
    message = refused("deepscaler", path, "data.max_bad_share=0.9")
    assert told in message and "Fix: " in message and len(message) < 1500


def test_bad_rows_of_arrays_and_parquet_are_left_out_with_their_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = b'{"problem": "x",\n "answer": 1}'
    rows = [good, b'{"problem": "\xff", "answer": 1}', good, b'{"problem": "\\ud800"}', b"3"]
    (tmp_path / "a.json").write_bytes(b"[" + b",\n".join([*rows, good]) + b"]\n")
    loaded = load("deepscaler", tmp_path / "a.json", "data.max_bad_share=0.5")
    assert [prompt.index for prompt in loaded.prompts] == [0, 2, 5]
    assert loaded.skipped == {"bad_problem": 2, "no_object": 1}
    assert all(f"a.json line {line}" in caplog.text for line in (3, 6, 7))
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"problem": texts, "answer": pyarrow.array([1.0, 2.0, 3.0])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    loaded = load("deepscaler", tmp_path / "a.parquet", "data.max_bad_share=0.5")
    assert [(p.index, problem_of(p), p.answer) for p in loaded.prompts] == [
        (0, "a", "1"),
        (2, "c", "3"),
    ]
    assert loaded.skipped == {"unreadable": 1} and "a.parquet row 2" in caplog.text


# --- columns ---


def test_columns_are_named_by_dotted_paths(tmp_path: Path) -> None:
    row = {
        "extra_info": {"question": "x", "solutions": ["first", "second"]},
        "reward_model": {"ground_truth": 4.0},
        "reward_model.ground_truth": 5,
    }
    path = write_lines(tmp_path / "a.jsonl", [row])
    names = (
        "data.train.columns.problem=extra_info.question",
        "data.train.columns.answer=reward_model.ground_truth",
    )
    solution = "data.train.columns.reference_solution=extra_info.solutions"
    [prompt] = load("deepscaler", path, *OPSD, *names, solution).prompts
    assert known(prompt) == ("x", "first", "5")  # a column of that very name comes first
    [prompt] = load("deepscaler", path, *OPSD, *names, f"{solution}.1").prompts
    assert prompt.reference_solution == "second"
    del row["reward_model.ground_truth"]
    assert load("deepscaler", write_lines(path, [row]), *names).prompts[0].answer == "4"
    message = refused("deepscaler", path, *names, "data.train.columns.answer=reward_model.truth")
    assert "no column 'reward_model.truth'" in message and "'reward_model.ground_truth'" in message


PARTS = [{"type": "text", "text": "1 +"}, {"type": "text", "text": "1?", "image_url": None}]


@pytest.mark.parametrize(
    "conversation",
    [
        [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS[:1]}],
        [{"role": "Human", "content": "1 +\n1?"}, {"from": "gpt", "value": "1 +"}],
        json.dumps([{"role": "user", "content": "1 +\n1?"}, {"from": "bot", "value": "1 +"}]),
        {"from": ["human", "gpt"], "value": ["1 +\n1?", "1 +"]},
        [
            {"role": "system", "content": " "},
            {"role": "user", "content": "1 +\n1?"},
            {"role": "assistant", "content": "1 +"},
        ],
    ],
)
def test_conversations_of_other_layouts_are_the_same(conversation: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"conversations": conversation}])
    [prompt] = load("sharegpt", path, *OPSD).prompts
    assert known(prompt) == ("1 +\n1?", "1 +", None)
    text = TOKENIZER.decode(prompt.token_ids)
    assert text == "<s><|user|>1 +\n1?<|end|><|assistant|>"
    told = refused("sharegpt", path, "data.train.last_assistant_turn=refuse")
    assert "data.train.last_assistant_turn=reference_solution" in told


@pytest.mark.parametrize(
    ("conversation", "reason", "told"),
    [
        (
            [{"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": {}}]}],
            "bad_messages",
            "message 0 holds a part of type 'image_url'",
        ),
        ([{"role": "user", "content": []}], "bad_messages", "content of message 0"),
        ([{"role": "tool", "content": "x"}], "bad_messages", "human, gpt or system"),
        ([{"role": "system", "content": None}], "bad_messages", "nothing but an empty system"),
        ([GPT], "bad_messages", "the last message must be from the user"),
        ([USER], "missing_reference_solution", "does not end with a turn of the assistant"),
        ([USER, {**GPT, "value": "\ud800"}], "bad_messages", "half of a surrogate pair"),
        ([{**USER, "name": "\ud800"}, GPT], "bad_messages", "half of a surrogate pair"),
        ({"from": ["human"], "value": []}, "bad_messages", "must be a list"),
        (None, "missing_messages", "must be a list"),
    ],
)
def test_conversations_that_cannot_be_used_are_bad_rows(
    conversation: Any, reason: str, told: str, tmp_path: Path
) -> None:
    rows = [{"conversations": [USER, GPT]}, {"conversations": conversation}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    message = refused("sharegpt", path, *OPSD)
    assert f"{path} line 2" in message and f"1 {reason}" in message and told in message


def test_of_the_last_turn_and_a_column_one_is_the_reference_solution(tmp_path: Path) -> None:
    for data, override in (
        ("sharegpt", "data.train.columns.reference_solution=x"),
        ("deepscaler", "data.train.last_assistant_turn=reference_solution"),
    ):
        assert refused(data, tmp_path, override).startswith("data.train.last_assistant_turn = ")
