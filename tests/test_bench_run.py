"""el4ner-bench run: the folder it leaves, resuming, refusals, copies between pool and gold, sources of data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from el4ner.bench.cli import group
from el4ner.bench.contamination import near_copies, without_copies, word_set
from el4ner.bench.evaluation_data import DataRequest, load_evaluation_data
from el4ner.bench.finished_run import load_run
from el4ner.bench.report import build_report
from el4ner.bench.report_markdown import render_markdown
from el4ner.bench.run import RunRequest, run, run_systems, shown_command
from el4ner.bench.run_folder import RunFolder, _locked
from el4ner.bench.system import Found, Workbench, prediction_of
from el4ner.bench.systems import make_system, short_name
from el4ner.config import make_config
from el4ner.errors import ConfigError, InputError, UsageError
from el4ner.pool import Pool
from el4ner.records import Demonstration, Prediction, Sentence, Span


def line(text: str, *entities: tuple[str, str], **more: Any) -> str:
    """A labelled sentence as a line; entities by surface and label."""
    spans = [{"start": text.index(s), "end": text.index(s) + len(s), "label": label} for s, label in entities]
    return json.dumps({**more, "text": text, "entities": spans}) + "\n"


POOL = [
    line("Ada Lovelace lives in London.", ("Ada Lovelace", "person"), ("London", "place")),
    line("Paris is far from Rome.", ("Paris", "place"), ("Rome", "place")),
    line("Nobody came to town."),
    line("We met Ada Lovelace in Paris.", ("Ada Lovelace", "person"), ("Paris", "place")),
]
TEST = [
    line("Ada Lovelace saw Rome.", ("Ada Lovelace", "person"), ("Rome", "place"), id="a"),
    line("nobody  came to TOWN.", id="b"),
    line("London is big.", ("London", "place"), id="c"),
    line("Berlin is bigger.", ("Berlin", "place"), id="d"),
    line("It rains.", id="e"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "little"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(POOL))
    (data / "test.jsonl").write_text("".join(TEST))
    return data


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[Any]:
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


class Scripted:
    """A system that finds Rome everywhere, can be killed, and remembers what it was asked."""

    name = "scripted"
    kind: Any = "baseline"

    def __init__(self, fail_at: int | None = None, **settings: Any) -> None:
        self.settings: Mapping[str, Any] = settings
        self.asked: list[str] = []
        self.pools: list[list[str]] = []
        self.fail_at = fail_at

    def load(self) -> None:
        pass

    def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
        self.pools.append(sorted(d.text for d in pool.sentences))

    def predict(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        if self.fail_at is not None and len(self.asked) + len(sentences) > self.fail_at:
            raise KeyboardInterrupt
        self.asked += [s.id for s in sentences]
        found = [[Found(Span(s.text.index("Rome"), s.text.index("Rome") + 4), "place")] if "Rome" in s.text else []
                 for s in sentences]  # fmt: skip
        return [prediction_of(s, own, "flat", self.name) for s, own in zip(sentences, found, strict=True)]

    def stages(self) -> list[dict[str, Any]] | None:
        return None

    def models(self) -> dict[str, str]:
        return {}

    def parameters(self) -> int:
        return 7

    def report(self) -> dict[str, Any]:
        return {"threshold": 0.5}


def go(system: Scripted, source: Path | str, out: Path, **data: Any) -> dict[str, Any]:
    command = ("el4ner-bench", "run", *map(str, data.pop("command", ())))
    request = RunRequest(DataRequest(str(source), **data), ["scripted"], out, chunk=2, command=command)
    loaded = load_evaluation_data(request.data)
    return run_systems(request, loaded, Workbench(make_config({}), 4, 0), [system], lambda _: None)


def test_the_folder_has_the_agreed_layout(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = go(Scripted(), folder, out)
    manifest = read(out / "manifest.json")
    assert {"version", "command", "data", "pool", "systems", "k", "seed", "versions", "hardware", "commit",
            "created"} == set(manifest)  # fmt: skip
    assert manifest["data"]["name"] == manifest["data"]["source"] == "little"
    assert manifest["pool"] == {**manifest["pool"], "sentences": 3, "entities": 6, "dropped_duplicates": 1}
    entry = manifest["systems"]["scripted"]
    assert (entry["kind"], entry["report"], entry["parameters"]) == ("baseline", {"threshold": 0.5}, 7)
    assert (entry["commands"], entry["commits"]) == ([manifest["command"]], [manifest["commit"]])
    assert [g["id"] for g in lines(out / "gold.jsonl")] == ["a", "b", "c", "d", "e"]
    assert all(set(p) == {"text", "entities"} for p in lines(out / "pool.jsonl"))
    assert [p["id"] for p in lines(out / "predictions" / "scripted.jsonl")] == ["a", "b", "c", "d", "e"]
    assert {"preparation_s", "prediction_s", "sentences_per_s", "prompt_tokens", "generated_tokens", "peak_memory_mib",
            "memory_before_mib", "threads"} <= set(read(out / "timings.json")["scripted"])  # fmt: skip
    strict = read(out / "metrics.json")["systems"]["scripted"]["strict"]
    assert (strict["precision"], strict["recall"]) == (1.0, 0.25)
    assert strict == metrics["systems"]["scripted"]["strict"]
    assert read(out / "contamination.json")["dropped"] == ["3"]


def test_a_killed_run_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        go(Scripted(fail_at=3), folder, out)
    predictions = out / "predictions" / "scripted.jsonl"
    whole = predictions.read_bytes()
    predictions.write_bytes(whole + b'{"id": "c", "text": "cut off')  # killed while it wrote
    again = Scripted()
    metrics = go(again, folder, out)
    assert again.asked == ["c", "d", "e"]
    assert predictions.read_bytes().startswith(whole)
    timing = read(out / "timings.json")["scripted"]
    assert timing["sentences"] == 5
    assert timing["peak_memory_mib"] is None or timing["peak_memory_mib"] >= timing["memory_before_mib"] > 0
    finished = Scripted()
    assert go(finished, folder, out) == metrics
    assert (finished.asked, finished.pools) == ([], [])
    assert metrics == go(Scripted(), folder, tmp_path / "whole")


def test_two_runs_do_not_write_into_one_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pytest.importorskip("fcntl")
    with RunFolder(out).held(), pytest.raises(UsageError, match="another run is writing here"):
        go(Scripted(), folder, out)
    with (out / ".lock").open("a") as file:  # opened before the run ends, locked after it
        go(Scripted(), folder, out)
        assert _locked(file)
        with pytest.raises(UsageError, match="another run is writing here"):
            go(Scripted(), folder, out)
    go(Scripted(), folder, out)


def test_every_command_that_answers_come_from_is_kept(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        go(Scripted(fail_at=0), folder, out, command=("--no-answer",))
    with pytest.raises(KeyboardInterrupt):
        go(Scripted(fail_at=3), folder, out, command=("--first",))
    go(Scripted(), folder, out, command=("--second",))
    go(Scripted(), folder, out, command=("--nothing-left-to-do",))
    entry = read(out / "manifest.json")["systems"]["scripted"]
    assert [words[-1] for words in entry["commands"]] == ["--first", "--second"]
    assert len(entry["commits"]) == 1


def test_a_system_that_does_not_suit_the_pool_is_named_and_the_others_run(folder: Path, tmp_path: Path) -> None:
    class Refusing(Scripted):
        name = "refusing"

        def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
            raise ConfigError("the pool is too small")

    out = tmp_path / "out"
    request = RunRequest(DataRequest(str(folder)), (), out)
    data, bench = load_evaluation_data(request.data), Workbench(make_config({}), 4, 0)
    systems = [Refusing(), Scripted()]
    refused: dict[str, str] = {}
    metrics = run_systems(request, data, bench, systems, lambda _: None, refused)
    assert (list(metrics["systems"]), refused) == (["scripted"], {"refusing": "the pool is too small"})
    assert read(out / "manifest.json")["systems"]["refusing"]["refused"] == "the pool is too small"
    assert "refusing was not run: the pool is too small" in render_markdown(build_report([load_run(out)]))
    with pytest.raises(ConfigError, match="too small"):
        run_systems(request, data, bench, systems, lambda _: None)


def test_other_settings_and_other_data_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(Scripted(k=4), folder, out)
    with pytest.raises(UsageError, match=r"answers of scripted under other settings \(k: 4 there, 5 now\)"):
        go(Scripted(k=5), folder, out)
    with pytest.raises(UsageError, match=r"another data \(limit: null there, 2 now\)"):
        go(Scripted(k=4), folder, out, limit=2)
    (folder / "train.jsonl").write_text("".join(POOL[:2]))
    with pytest.raises(UsageError, match="another pool"):
        go(Scripted(k=4), folder, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds other files and no manifest\.json"):
        go(Scripted(), folder, tmp_path / "other")
    records = lines(out / "predictions" / "scripted.jsonl")
    records[0]["id"] = "z"
    (out / "predictions" / "scripted.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "train.jsonl").write_text("".join(POOL))
    with pytest.raises(UsageError, match=r"scripted\.jsonl:1: is no answer to sentence 1"):
        go(Scripted(k=4), folder, out)


# Copies


def pool_of(*texts: str) -> list[Demonstration]:
    return [Demonstration(str(i), text, ()) for i, text in enumerate(texts)]


def test_copies_are_found_whatever_case_and_space() -> None:
    kept, dropped = without_copies(pool_of("Ada  came.", "Ada came!", "STRASSE"), pool_of("ada came.", "straße"))
    assert ([d.text for d in kept], [d.text for d in dropped]) == (["Ada came!"], ["Ada  came.", "STRASSE"])


def test_near_copies_are_those_of_brute_force() -> None:
    import random

    rng = random.Random(3)
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]
    pool = pool_of(*(" ".join(rng.choices(words, k=rng.randint(0, 7))) for _ in range(150)))
    tested = pool_of(*(" ".join(rng.choices(words, k=rng.randint(0, 7))) for _ in range(60)))
    for least in (0.5, 0.8, 1.0):
        wanted = {}
        for i, one in enumerate(pool):
            own = word_set(one.text)
            best = max(len(own & word_set(t.text)) / max(1, len(own | word_set(t.text))) for t in tested)
            if own and best >= least - 1e-9:
                wanted[i] = best
        found = {n.pool: n.similarity for n in near_copies(pool, tested, least)}
        assert found == pytest.approx(wanted)
        assert found
    with pytest.raises(ValueError, match="least=0"):
        near_copies(pool, tested, 0)


# Sources


def test_without_train_parts_are_left_out_in_turn(folder: Path, tmp_path: Path) -> None:
    (folder / "train.jsonl").unlink()
    (folder / "test.jsonl").write_text("".join([*TEST, TEST[0]]))
    system = Scripted()
    go(system, folder, tmp_path / "out")
    gold = lines(tmp_path / "out" / "gold.jsonl")
    assert sorted(g["id"] for g in gold) == ["a", "a", "b", "c", "d", "e"]
    assert [g["id"] for g in gold] == system.asked
    assert len(system.pools) == 5  # five texts, each left out alone
    texts = {g["id"]: g["text"] for g in gold}
    for pool, text in zip(system.pools, dict.fromkeys(texts[i] for i in system.asked), strict=True):
        assert text not in pool
        assert len(pool) == 6 - sum(g["text"] == text for g in gold)
    assert read(tmp_path / "out" / "manifest.json")["pool"]["left_out_in_turn"] == 5
    with pytest.raises(UsageError, match="another pool"):
        go(Scripted(), folder, tmp_path / "out", pool_size=2)
    data = load_evaluation_data(DataRequest(str(folder), parts=2))
    assert len(data.parts) == 2
    assert {d.text for d in data.gold} == set(texts.values())


def test_files_of_columns_and_single_files(tmp_path: Path) -> None:
    columns = "Ada B-person\nsleeps O\n\nRome B-place\nburns O\n"
    (tmp_path / "dev.conll").write_text(columns)
    (tmp_path / "train.iob2").write_text("Bob B-person\nsleeps O\n\nada O\nSleeps O\n")
    data = load_evaluation_data(DataRequest(str(tmp_path), "dev"))
    assert [d.text for d in data.gold] == ["Ada sleeps", "Rome burns"]
    assert ([d.text for d in data.pool.sentences], len(data.dropped)) == (["Bob sleeps"], 1)
    data = load_evaluation_data(DataRequest(str(tmp_path / "dev.conll"), pool=str(tmp_path / "train.iob2")))
    assert (data.name, len(data.gold), len(data.pool.sentences)) == ("dev", 2, 1)
    assert load_evaluation_data(DataRequest(str(tmp_path / "dev.conll"))).left_out
    with pytest.raises(InputError, match=r"no split 'test'; there are dev\.conll, train\.iob2"):
        load_evaluation_data(DataRequest(str(tmp_path)))
    with pytest.raises(UsageError, match="train is the pool itself"):
        load_evaluation_data(DataRequest(str(tmp_path), "train"))


def test_samples_and_pools_are_the_same_every_time(folder: Path) -> None:
    draw = DataRequest(str(folder), limit=2, seed=5, pool_size=2)
    first, second = load_evaluation_data(draw), load_evaluation_data(draw)
    assert (first.gold, first.pool.sentences, first.sha256) == (second.gold, second.pool.sentences, second.sha256)
    assert (len(first.gold), len(first.pool.sentences)) == (2, 2)
    assert len(first.dropped) == 1  # a copy of any test sentence, drawn or not


def test_a_saved_dataset_without_train_is_left_out_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path / "cache"))
    columns = {"tokens": [["Ada", "left"], ["Rome", "burns"]], "ner_tags": [["B-person", "O"], ["B-place", "O"]]}
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)}).save_to_disk(str(tmp_path / "saved"))
    data = load_evaluation_data(DataRequest(str(tmp_path / "saved")))
    assert (data.name, len(data.gold), data.left_out) == ("saved", 2, True)


# Systems by name


def test_the_dictionary_takes_the_longest_string(folder: Path, tmp_path: Path) -> None:
    (folder / "train.jsonl").write_text(
        "".join([*POOL, line("Ada came. Ada left. Ada may.", ("Ada", "person")), line("may", ("may", "time"))])
    )
    out = tmp_path / "out"
    done = CliRunner().invoke(group, ["run", "--data", str(folder), "--systems", "dictionary", "--out", str(out)])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert (row["system"], row["precision"], row["recall"]) == ("dictionary", 1.0, 0.75)
    found = lines(out / "predictions" / "dictionary.jsonl")
    assert [(e["text"], e["label"]) for e in found[0]["entities"]] == [("Ada Lovelace", "person"), ("Rome", "place")]
    bench = Workbench(make_config({"overlap": "nested"}), 4, 0)
    loose = make_system("dictionary", bench, {}, {"dictionary": {"least_share": 0.3, "folded": True}})
    loose.prepare(load_evaluation_data(DataRequest(str(folder))).pool, lambda _: None)
    text = "ADA LOVELACE may."
    entities = loose.predict([Sentence("1", text)])[0].entities
    assert [(e.text, e.label) for e in entities] == [("ADA LOVELACE", "person"), ("may", "time")]
    assert entities[1].score == pytest.approx(1 / 2)  # one of the two places where it stands


def test_wrong_names_and_options_are_refused(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(make_config({}), 4, 0)
    for name, options, message in (
        ("magic", {}, "system 'magic'; choose from default"),
        ("member:none", {}, "voters"),
        ("default", {"default": {"k": 3}}, "use --set"),
        ("dictionary", {"dictionary": {"shares": 3}}, "dictionary has least_share, folded"),
        ("dictionary", {"dictionary": {"folded": 3}}, "a valid boolean"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_system(name, bench, {}, options)
    request = RunRequest(DataRequest(str(folder)), ["dictionary"], tmp_path / "o", options={"kate": {"k": 1}})
    with pytest.raises(ConfigError, match="kate is not among --systems"):
        run(request, lambda _: None)
    twice = RunRequest(DataRequest(str(folder)), ["dictionary", "dictionary"], tmp_path / "o")
    with pytest.raises(ConfigError, match="named twice"):
        run(twice, lambda _: None)
    done = CliRunner().invoke(group, ["run", "--data", str(folder), "--out", str(tmp_path), "--option", "kate=3"])
    assert (done.exit_code, "SYSTEM.SETTING=VALUE" in done.output) == (2, True)


def test_the_budget_of_demonstrations_holds_for_all(tmp_path: Path) -> None:
    bench = Workbench(make_config({}), 3, 7)
    file = tmp_path / "mine.yaml"
    file.write_text("retrieve: {k: 8}\nvoters: all\n")
    for name in ("default", "paper", "members", "member:smollm2-ask", str(file)):
        system = make_system(name, bench, {"overlap": "nested"}, {})
        assert system.name == short_name(name)
        settings: Any = system.settings
        assert (settings["retrieve"]["k"], settings["seed"], settings["overlap"]) == (3, 7, "nested")
    assert short_name(str(file)) == "mine"
    members: Any = make_system("members", bench, {}, {}).settings
    assert list(members["voters"]) == ["smollm2-list", "smollm2-ask", "smollm2-define"]


def test_an_operating_point_is_a_system_of_its_own(tmp_path: Path) -> None:
    bench = Workbench(make_config({}), 4, 0)
    file = tmp_path / "a@1" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("voters: all\n")
    for name, target, called in (
        ("default@0.9", 0.9, "default@0.9"), ("member:smollm2-ask@.5", 0.5, "member:smollm2-ask@.5"),
        (f"{file}@0.8", 0.8, "mine@0.8"), (str(file), None, "mine"),
    ):  # fmt: skip
        system = make_system(name, bench, {}, {})
        assert (system.name, system.settings["target_precision"]) == (called, target)
    for name, message in (("kate@0.9", "kate has no calibrated scores"), ("default@1.5", "target_precision"),
                          ("default@high", "choose from")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            make_system(name, bench, {}, {})


@pytest.mark.embedded
def test_a_pool_that_promises_no_precision_stops_no_other_system(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        group, ["run", "--data", str(folder), "--systems", "default@0.9,dictionary", "--set", "members=[]", "--out",
                str(tmp_path / "out")],
    )  # fmt: skip
    assert [json.loads(row)["system"] for row in done.stdout.splitlines()] == ["dictionary"]
    assert "default@0.9 was not run: target_precision=0.9: the pool is too small" in str(done.exception)


def test_a_configuration_file_has_its_own_models() -> None:
    bench = Workbench(make_config({}), 4, 0)
    assert bench.suited_to(make_config({"voters": "all", "retrieve": {"k": 9}})) is bench
    others = make_config({"encoder": "somebody/else"}), make_config({"members": [{"name": "a", "source": "x/y"}]})
    for config in (*others, make_config({"dtype": "bfloat16"})):
        other = bench.suited_to(config)
        assert other is not bench
        assert other.config.encoder == config.encoder
        assert bench.suited_to(config) is other
    assert bench.answered == 0


def test_commands_are_shown_without_this_machines_folders() -> None:
    assert shown_command(["/a/b/el4ner-bench", "run", "--data", "/x/wnut17", "rel/x"]) == [
        "el4ner-bench", "run", "--data", "wnut17", "rel/x",
    ]  # fmt: skip
    assert shown_command(["run", "--data=/a/b/wnut17", "--systems", "default,/a/b/mine.yaml,kate"]) == [
        "run", "--data=wnut17", "--systems", "default,mine.yaml,kate",
    ]  # fmt: skip
    for given in ("server.api_key=sk-1", "server={api_key: sk-1, retries: 2}"):
        assert "sk-1" not in " ".join(shown_command(["run", "--set", given]))


@pytest.mark.embedded
def test_own_systems_leave_their_stages(folder: Path, tmp_path: Path) -> None:
    """Real models: a prompted member without a fit, and the retrieval voter."""
    out = tmp_path / "out"
    request = RunRequest(
        DataRequest(str(folder), limit=2), ["retrieval-voter", "member:smollm2-list"], out, k=2,
        settings={"device": "cpu", "dtype": "float32"}, chunk=1, share=True,
    )  # fmt: skip
    metrics = run(request, lambda _: None)
    assert set(metrics["systems"]) == {"retrieval-voter", "member:smollm2-list"}
    stages = lines(out / "stages" / "member.smollm2-list.jsonl")
    predictions = lines(out / "predictions" / "member.smollm2-list.jsonl")
    assert [s["id"] for s in stages] == [p["id"] for p in predictions]
    for own, prediction in zip(stages, predictions, strict=True):
        assert own["verify"] == [[e["start"], e["end"], e["label"]] for e in prediction["entities"]]
        assert {(a, b) for a, b, _ in own["classify"]} <= {(a, b) for a, b in own["extract"]}
    timing = read(out / "timings.json")["member:smollm2-list"]
    assert timing["prompt_tokens"] > 0
    entries = read(out / "manifest.json")["systems"]
    assert entries["member:smollm2-list"]["models"]["embedded:smollm2"].startswith("embedded:smollm2@")
    assert entries["retrieval-voter"]["parameters"] == 22_713_216
    assert entries["member:smollm2-list"]["parameters"] == 134_515_008 + 22_713_216
