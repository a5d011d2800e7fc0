"""The audit: a step computed again gives the bits of the record, and where two runs part is found exactly."""

from __future__ import annotations

import hashlib
import json
import shutil
from ast import literal_eval
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from train import cli, events, rerun
from train.data.corpus import held_out
from train.manifest import MANIFEST, SEAL

Folder = Path  # of a run


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Computing again sets what a rank sets for itself; other tests are not to inherit it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def train(overrides: list[str], *more: str) -> Folder:
    arguments = [*overrides, *more]
    assert cli.main(["train", *arguments]) == 0
    settings = dict(argument.split("=", 1) for argument in arguments)
    return Path(settings["runs"]) / settings["name"]


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, ...], Folder]:
    """Runs that several tests look at, by their settings."""
    return {}


@pytest.fixture
def copied(
    tiny: list[str], trained: dict[tuple[str, ...], Folder], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Folder]:
    """A run of six steps with these settings under this name, for a test to do with as it likes."""

    def copied(name: str, *more: str) -> Folder:
        if more not in trained:
            trained[more] = train(tiny, *more, "name=a", f"runs={tmp_path_factory.mktemp('runs')}")
        return Path(shutil.copytree(trained[more], tmp_path / "runs" / name))

    return copied


SMALL = ("devices=2", "model.layers=1")
Said = tuple[int, dict[str, Any]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """A command's exit code and what it says in JSON; where it refuses, its one line."""

    def ask(*arguments: str) -> Said:
        capsys.readouterr()
        code = cli.main([*arguments, "format=json"])
        out, err = capsys.readouterr()
        if code == 2:
            assert len(err.splitlines()) == 1, err
            return code, {"refused": err}
        return code, json.loads(out)

    return ask


def edit(folder: Folder, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "events.jsonl"
    records = list(events.read(path))
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def flip(checkpoint: Path, kind: str, name: str, index: list[int], bit: int) -> tuple[str, str]:
    """Change one bit of one element of a saved tensor and seal the checkpoint anew; the element before and after."""
    for path in checkpoint.glob(f"{kind}-*.safetensors"):
        raw = bytearray(path.read_bytes())
        size = int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8 : 8 + size]).get(name)
        if entry is None:
            continue
        place = 0
        for at, length in zip(index, entry["shape"], strict=True):
            place = place * length + at
        start = 8 + size + entry["data_offsets"][0] + 4 * place
        old = int.from_bytes(raw[start : start + 4], "little")
        raw[start : start + 4] = (old ^ 1 << bit).to_bytes(4, "little")
        path.write_bytes(raw)
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        manifest["files"][path.name]["sha256"] = hashlib.sha256(raw).hexdigest()
        sealed = json.dumps(manifest).encode()
        (checkpoint / MANIFEST).write_bytes(sealed)
        (checkpoint / SEAL).write_text(hashlib.sha256(sealed).hexdigest())
        return f"0x{old:08x}", f"0x{old ^ 1 << bit:08x}"
    raise AssertionError(f"no {name} in {checkpoint}")


def resumed_from(a: Folder, step: int, name: str) -> Folder:
    """A run that has nothing but another's checkpoint and settings; `name` may be resumed to its end."""
    b = a.with_name(name)
    (b / "checkpoints").mkdir(parents=True)
    for file in ("config.yaml", "data.json"):
        shutil.copy(a / file, b / file)
    shutil.copytree(a / f"checkpoints/step-{step:08d}", b / f"checkpoints/step-{step:08d}")
    return b


WEIGHT = "blocks.1.attention.qkv.weight"
ROUGH = ["precision=bf16", "model.dropout=0.2", "batch.micro_batch=1", "sharding=optimizer", "reduce.dtype=bf16"]


@pytest.mark.parametrize("more", [["batch.micro_batch=1"], ROUGH], ids=["fp32", "bf16-dropout-sharded"])
def test_a_step_of_three_ranks_is_proved_by_one_process(
    more: list[str], tiny: list[str], ask: Callable[..., Said], capsys: pytest.CaptureFixture[str]
) -> None:
    """k = 2; from initialisation, right after a checkpoint and between two; whole, and a virtual rank of it."""
    folder = train(tiny, *more, "name=a", "devices=3")
    for step, base in ((1, 0), (4, 3), (6, 3)):
        code, said = ask("replay", f"run={folder}", f"step={step}")
        assert (code, said["agrees"], said["from"], said["on_the_way"]) == (0, True, base, [])
        assert [check["what"] for check in said["checks"]] == [
            *("parameters", "tokens", "leaves", "gradient"),
            *("loss", "gradient norm", "learning rate"),
        ]
        assert len(said["sequences"]) == 10
        (recorded,) = [r for r in events.read(folder / "events.jsonl") if r["kind"] == "step" and r["step"] == step]
        losses = [row["loss"] for row in said["sequences"]]
        assert sum(losses) / 10 == pytest.approx(recorded["loss"], rel=1e-5 if more is not ROUGH else 0.2)
        gradients = [layer["gradient"] for layer in said["layers"].values()]
        assert sum(g * g for g in gradients) ** 0.5 == pytest.approx(recorded["grad_norm"], rel=1e-5)
    code, said = ask("replay", f"run={folder}", "step=4", "virtual_rank=4")
    assert (code, said["agrees"]) == (0, True)
    assert [check["what"] for check in said["checks"]] == ["parameters", "tokens", "leaves"]
    assert [(row["virtual_rank"], row["micro_batch"]) for row in said["sequences"]] == [(4, 0), (4, 1)]
    assert cli.main(["replay", f"run={folder}", "step=5", "virtual_rank=2"]) == 0
    shown = capsys.readouterr().out
    assert "virtual rank 2, micro-batch 1, row 0: source 0" in shown
    assert "leaves                       agrees" in shown


def test_a_tampered_record_is_not_proved(copied: Callable[..., Folder], ask: Callable[..., Said]) -> None:
    folder = copied("a", *SMALL)
    original = (folder / "events.jsonl").read_text()

    def altered(kind: str, change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        return lambda record: change(record) if (record["kind"], record.get("step")) == (kind, 5) else None

    def leaf(record: dict[str, Any]) -> None:
        record["leaves"][3] = "0" * 16

    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "loss": altered("step", lambda record: record.update(loss_hex=(1.0).hex())),
        "gradient norm": altered("step", lambda record: record.update(grad_norm=1.0)),
        "gradient": altered("digests", lambda record: record.update(gradient=["0" * 16])),
        "leaves of virtual rank 3": altered("digests", leaf),
    }
    for what, change in changes.items():
        (folder / "events.jsonl").write_text(original)
        edit(folder, change)
        code, said = ask("replay", f"run={folder}", "step=5")
        assert (code, [check["what"] for check in said["checks"] if not check["agrees"]]) == (1, [what])
    code, said = ask("replay", f"run={folder}", "step=6")
    assert (code, said["on_the_way"]) == (1, [5])
    for v, code in ((3, 1), (4, 0)):
        assert ask("replay", f"run={folder}", "step=5", f"virtual_rank={v}")[0] == code


def test_another_machine_is_said_first(
    copied: Callable[..., Folder], ask: Callable[..., Said], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("a", *SMALL)

    def elsewhere(record: dict[str, Any]) -> None:
        if record["kind"] == "start":
            record["fingerprint"]["torch"] = "1.0"

    edit(folder, elsewhere)
    code, said = ask("replay", f"run={folder}", "step=2")
    assert code == 0
    assert said["fingerprint"] == {"torch": {"recorded": "1.0", "here": torch.__version__}}
    assert cli.main(["replay", f"run={folder}", "step=2"]) == 0
    assert "ANOTHER MACHINE: torch was 1.0" in capsys.readouterr().out


def test_a_run_continued_with_other_settings_is_proved_in_all_its_steps(
    tiny: list[str], ask: Callable[..., Said]
) -> None:
    """Steps 1 … 3 had another schedule and rate than the configuration that was written last."""
    small = [*tiny, "name=a", "devices=2", "model.layers=1"]
    train(small, "steps=3")
    folder = train(small, "steps=6", "optimizer.lr=0.02", "resume.allow=[steps,optimizer.lr]")
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step-00000006":
            shutil.rmtree(path)
    for step in (3, 5):
        code, said = ask("replay", f"run={folder}", f"step={step}")
        assert (code, said["from"], said["on_the_way"]) == (0, 0, [])


def test_settings_are_read_once_for_each_start(copied: Callable[..., Folder]) -> None:
    """Not at each step that is computed again: that takes as long as the step of a small model does."""
    record = rerun.read("a", copied("a", *SMALL))
    assert record.config(1) is record.config(6)
    record.starts[6] = dict(record.starts[6])
    assert record.config(6) == record.config(1)
    assert record.config(6) is not record.config(1)


def test_without_checksums_loss_and_norm_are_compared(tiny: list[str], ask: Callable[..., Said]) -> None:
    folder = train(tiny, "name=a", "devices=2", "evidence.digests=false", "model.layers=1")
    assert not [record for record in events.read(folder / "events.jsonl") if record["kind"] == "digests"]
    code, said = ask("replay", f"run={folder}", "step=5")
    assert code == 0
    assert [check["what"] for check in said["checks"]] == ["loss", "gradient norm", "learning rate"]
    assert cli.main(["replay", f"run={folder}", "step=5", "virtual_rank=1"]) == 2, "there is nothing to compare with"
    other = train(tiny, "name=b", "devices=2", "evidence.digests=false", "model.layers=1", "seed=1")
    code, said = ask("diff", f"run=[{folder},{other}]")
    assert (code, said["step"]) == (1, 1)
    assert said["findings"][0].startswith("their data differ: virtual rank 0, micro-batch 0, row 0")
    assert said["findings"][1].startswith("their parameters differed before the step: ")


def test_runs_that_agree(
    tiny: list[str], copied: Callable[..., Folder], ask: Callable[..., Said], capsys: pytest.CaptureFixture[str]
) -> None:
    a = copied("a", *SMALL)
    b = train(tiny, "name=b", "devices=3", "model.layers=1", "evidence.parameters=true", "log.every=1")
    code, said = ask("diff", f"run=[{a},{b}]")
    assert (code, said["step"], said["steps"]["common"]) == (0, None, 6)
    assert {item["key"] for item in said["settings"]} >= {"name", "devices", "log.every"}
    assert all(item["harmless"] for item in said["settings"] if item["key"] in ("name", "devices", "log.every"))
    assert len(said["compared"]) == 7
    assert cli.main(["diff", f"run=[{a},{b}]"]) == 0
    assert "they agree in all 6 steps that both have" in capsys.readouterr().out

    def forged(record: dict[str, Any]) -> None:
        if (record["kind"], record.get("step")) == ("digests", 6):
            record["parameters"] = ["0" * 16]

    edit(a, forged)
    code, said = ask("diff", f"run=[{a},{b}]")
    assert (code, said["step"], list(said["differs"])) == (1, 6, ["parameters"]), "one checksum against one a parameter"
    assert said["findings"][0] == "their parameters differed before the step"
    assert said["findings"][1].startswith(f"{a} did not record the parameters that checkpoint 3 leads to")


def test_other_seeds_part_at_the_first_step(tiny: list[str], ask: Callable[..., Said]) -> None:
    a, b = (train(tiny, f"name=s{seed}", "devices=2", f"seed={seed}", "steps=2") for seed in (0, 1))
    code, said = ask("diff", f"run=[{a},{b}]")
    assert (code, said["step"]) == (1, 1)
    assert said["differs"]["tokens"] == list(range(5))
    assert {item["key"]: item["harmless"] for item in said["settings"]} == {"name": True, "seed": False}


@pytest.mark.parametrize("recorded", [True, False], ids=["by-the-record", "without-checksums"])
def test_a_flipped_bit_of_a_weight_is_named(
    recorded: bool, tiny: list[str], copied: Callable[..., Folder], ask: Callable[..., Said]
) -> None:
    """Another run's checkpoint with one bit changed: its parameter, element and bit, at the first step after it."""
    more = [] if recorded else ["evidence.digests=false"]
    a = copied("a", "devices=2", *more)
    b = resumed_from(a, 3, "b")
    old, new = flip(b / "checkpoints/step-00000003", "model", WEIGHT, [17, 3], 20)
    train(tiny, *more, "name=b", "devices=3")
    code, said = ask("diff", f"run=[{a},{b}]")
    assert (code, said["step"]) == (1, 4)
    expected = f"their parameters differed before the step: {WEIGHT}[17, 3]: {old} -> {new} (1 element, 1 bit)"
    assert said["findings"][0] == expected
    if recorded:
        assert "tokens" not in said["differs"]
        assert "parameters" in said["differs"]
        assert ask("diff", f"run=[{a},{b}]", "recompute=false") == (
            1,
            {**said, "findings": ["their parameters differed before the step"]},
        )


def test_a_flipped_bit_of_a_moment_is_named(
    tiny: list[str], copied: Callable[..., Folder], ask: Callable[..., Said]
) -> None:
    """It shows a step later, in the parameters."""
    a = copied("a", "devices=2")
    b = resumed_from(a, 3, "b")
    old, new = flip(b / "checkpoints/step-00000003", "optimizer", f"exp_avg_sq.{WEIGHT}", [5, 7], 27)
    train(tiny, "name=b", "devices=1")
    code, said = ask("diff", f"run=[{a},{b}]")
    assert (code, said["step"]) == (1, 5)
    assert said["findings"][0].startswith(f"their parameters differed before the step: {WEIGHT}[5, 7]: ")
    moment = f"the moments differed before step 4: exp_avg_sq.{WEIGHT}[5, 7]: {old} -> {new} (1 element, 1 bit)"
    assert moment in said["findings"]


def test_weights_changed_between_two_steps_convict_the_run_in_which_they_were(
    tiny: list[str], ask: Callable[..., Said]
) -> None:
    """The same folder goes on from its own checkpoint after a bit of it has changed: step 3 does not lead there."""
    a = train(tiny, "name=a", "devices=1", "evidence.parameters=true")
    b = resumed_from(a, 3, "b")
    flip(b / "checkpoints/step-00000003", "model", WEIGHT, [0, 0], 1)
    records = [r for r in events.read(a / "events.jsonl") if r.get("step", 0) <= 3 and r["kind"] != "end"]
    (b / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train(tiny, "name=b", "devices=1", "evidence.parameters=true")
    code, said = ask("diff", f"run=[{a},{b}]")
    assert (code, said["step"]) == (1, 4)
    assert f"{WEIGHT}[0, 0]" in said["findings"][0]
    convicted = [note for note in said["findings"] if "computed again, does not lead" in note]
    assert len(convicted) == 1
    assert convicted[0].startswith(f"{b}: step 3")
    shutil.rmtree(b / "checkpoints")
    shutil.rmtree(a / "checkpoints")
    for folder in (a, b):
        data = json.loads((folder / "data.json").read_text())
        (folder / "data.json").write_text(json.dumps({**data, "stores": ["/gone"]}))
    code, said = ask("diff", f"run=[{a},{b}]")
    assert said["findings"][0] == f"their parameters differed before the step: {WEIGHT}", "by the record alone"
    assert "/gone: is gone" in said["findings"][1]


def test_a_changed_document_is_named_at_the_first_step_that_sees_it(
    tiny: list[str], corpus: Path, tmp_path: Path, ask: Callable[..., Said]
) -> None:
    """A word of one training document becomes another of as many bytes, so that all windows stay where they were."""
    other = tmp_path / "corpus"
    shutil.copytree(corpus, other)
    for path in sorted(other.iterdir()):  # whether a document is held out follows from its content
        old, new = path.read_text(), path.read_text().replace("return", "RETURN")
        if not any(held_out(text.encode(), 0.1) for text in (old, new)):
            break
    path.write_text(new)
    more = ["data.tokenizer.kind=bytes", "model.layers=1", "steps=20", "checkpoint.every=5", "eval.every=0"]
    a = train(tiny, *more, "name=a", "devices=2")
    b = train(tiny, *more, f"data.path={other}", "name=b", "devices=3")
    code, said = ask("diff", f"run=[{a},{b}]")
    assert code == 1
    assert said["data"][0] != said["data"][1]
    v = said["differs"]["tokens"][0]
    assert "parameters" not in said["differs"]
    finding = said["findings"][0]
    assert finding.startswith(f"their data differ: virtual rank {v}, micro-batch ")
    texts = finding.splitlines()[1:]
    sides = [literal_eval(text.split(" shard 0 ")[1]) for text in texts]
    unequal = next(i for i, (x, y) in enumerate(zip(*sides, strict=True)) if x != y)
    assert unequal == min(8, int(finding.split("from token ")[1].split()[0]))
    assert texts[0].upper() == texts[1].upper()
    assert "return" in texts[0]
    assert "RETURN" in texts[1]
    code, replayed = ask("replay", f"run={b}", f"step={said['step']}", f"virtual_rank={v}")
    assert code == 0
    seen = [row for row in replayed["sequences"] if "RETURN" in row["text"]]
    assert f"micro-batch {seen[0]['micro_batch']}, row {seen[0]['row']}" in finding
    assert f"document {seen[0]['document']} of shard 0" in finding
    code, earlier = ask("diff", f"run=[{a},{b}]", "recompute=false")
    assert (earlier["step"], earlier["findings"]) == (said["step"], said["findings"])


def test_arithmetic_that_went_wrong_convicts_the_record_that_is_not_reproduced(
    copied: Callable[..., Folder], ask: Callable[..., Said]
) -> None:
    a, b = (copied(name, *SMALL) for name in "ab")
    original = (b / "events.jsonl").read_text()

    def wrong_leaf(record: dict[str, Any]) -> None:
        if (record["kind"], record.get("step")) == ("digests", 3):
            record["leaves"][2], record["gradient"] = "1" * 16, ["2" * 16]

    def wrong_sum(record: dict[str, Any]) -> None:
        if (record["kind"], record.get("step")) == ("digests", 3):
            record["gradient"] = ["2" * 16]

    for change, sentence in (
        (wrong_leaf, "same data, same parameters, another gradient in virtual rank 2"),
        (wrong_sum, "same data, same parameters, the same gradient in all virtual ranks, another sum: gradient"),
    ):
        (b / "events.jsonl").write_text(original)
        edit(b, change)
        code, said = ask("diff", f"run=[{a},{b}]")
        assert (code, said["step"]) == (1, 3)
        assert said["findings"][0] == sentence
        assert [note.split(":")[0] for note in said["findings"][1:]] == [f"{b} is not reproduced here"]


def test_settings_that_change_the_arithmetic_are_named(tiny: list[str], ask: Callable[..., Said]) -> None:
    small = [*tiny, "devices=1", "steps=3", "model.layers=1"]
    a = train(small, "name=a")
    for name, setting in (("rate", "optimizer.lr=0.02"), ("decay", "optimizer.weight_decay=0.5")):
        b = train(small, f"name={name}", setting)
        code, said = ask("diff", f"run=[{a},{b}]")
        key = setting.split("=")[0]
        assert [item["key"] for item in said["settings"] if not item["harmless"]] == [key]
        if name == "rate":
            assert (code, said["step"]) == (1, 1)
            assert said["findings"][0].startswith("their learning rates differ: ")
        else:
            assert (code, said["step"]) == (1, 2)
            assert f"step 1 agrees, its gradient too: its update differs (settings: {key})" in said["findings"]
    b = train(small, "name=dropout", "model.dropout=0.5")
    code, said = ask("diff", f"run=[{a},{b}]")
    assert (code, said["step"]) == (1, 1)
    assert said["findings"][0].startswith("same data, same parameters, another gradient in virtual rank 0, 1")
    assert "both are reproduced here: settings: model.dropout" in said["findings"]
    assert said["findings"][-1].startswith(
        "same data, same parameters, another gradient in virtual rank 0, micro-batch 0: "
    )
    b = train(small, "name=V", "batch.virtual_ranks=1")
    code, said = ask("diff", f"run=[{a},{b}]")
    assert said["findings"][0].startswith("they cut a step differently: 5 virtual ranks x 1")


def test_what_cannot_be_audited_is_refused_in_one_line(
    tiny: list[str], copied: Callable[..., Folder], ask: Callable[..., Said]
) -> None:
    a = copied("a", *SMALL)
    fast = train(tiny, "name=fast", "devices=2", "steps=2", "model.layers=1", "reduce=fast")
    started = resumed_from(a, 6, "started")
    for arguments, words in (
        (["replay", "run=nobody", "step=1"], "no run 'nobody'"),
        (["replay", f"run={a}", "step=7"], f"{a} has no step 7 (there: 1 … 6)"),
        (["replay", f"run={a}", "step=0"], "the first one is 1"),
        (["replay", f"run={a}", "step=2", "virtual_rank=5"], "none of the 5"),
        (["replay", f"run={fast}", "step=2"], "reduce=fast on 2 ranks"),
        (["replay", f"run={started}", "step=2"], "has no recorded step"),
        (["diff", f"run={a}"], "write run=[a,b]"),
        (["diff", f"run=[{a},nobody]"], "no run 'nobody'"),
    ):
        code, said = ask(*arguments)
        assert code == 2
        assert words in said["refused"]
    late = resumed_from(a, 6, "late")
    train(tiny, "name=late", "devices=1", "steps=10", "model.layers=1", "resume.allow=steps")
    assert "have no step in common" in ask("diff", f"run=[{a},{late}]")[1]["refused"]
    code, said = ask("replay", f"run={late}", "step=7")
    assert code == 2
    assert "nothing that" in said["refused"]
    data = json.loads((a / "data.json").read_text())
    (a / "data.json").write_text(json.dumps({**data, "stores": ["/gone"]}))
    code, said = ask("replay", f"run={a}", "step=2")
    assert (code, "/gone: is gone" in said["refused"]) == (2, True)
