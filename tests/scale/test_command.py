"""`colossus scale`: tables that were never seen, plans, refusals, clusters, claims; each number with its tag."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from train import cli, compose
from train.checks import Refused
from train.economy import prices
from train.scale.command import predict
from train.scale.failures import goodput
from train.scale.hardware import TAGS, cluster, named
from train.scale.project import project
from train.scale.tables import parse, published, rows
from train.scale.workload import TABLES

NAMES = ("dgx_h100", "grok2_15k", "llama3_16k", "meta_24k", "colossus_100k", "colossus_200k")


def projected(*overrides: str) -> Any:
    return project(compose.config("scale", list(overrides)))


def refused(*overrides: str) -> str:
    with pytest.raises(Refused) as caught:
        projected(*overrides)
    return str(caught.value)


def predicted(tmp_path: Path, text: str) -> list[dict[str, str]]:
    (tmp_path / "in.csv").write_text(text, encoding="utf-8")
    predict(tmp_path / "in.csv", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", sorted(path.name for path in TABLES.glob("*.csv")))
def test_every_table_is_answered_row_by_row(name: str, tmp_path: Path) -> None:
    text = (TABLES / name).read_text(encoding="utf-8")
    before = list(csv.DictReader(text.splitlines()))
    after = predicted(tmp_path, text)
    assert len(after) == len(before)
    for row, old in zip(after, before, strict=True):
        assert {key: row[key] for key in old} == old
        assert bool(row["predicted_step_time_s"]) != bool(row["not_predicted"])


def test_a_table_goes_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = TABLES / "llama3_405b_h100.csv"
    assert cli.main(["scale", f"table={table}", f"out={tmp_path}/out.csv", "format=json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert source["source"] == "Llama 3 Table 4"
    assert source["rows"] == source["predicted"] == 3
    assert (tmp_path / "out.csv").read_text().splitlines()[0].endswith("predicted_step_time_s,not_predicted,assumed")
    assert cli.main(["scale", f"table={table}", f"out={tmp_path}/nowhere/out.csv"]) == 2


def test_a_printed_table_has_a_line_a_source_and_its_reasons_below(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", f"table={TABLES}/misc_runs.csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    reasons = [line for line in lines if line.startswith(" left out")]
    assert " left out  OPT-175B: the row does not say global_batch_seqs (1)" in reasons
    assert max(len(line) for line in lines if line not in reasons) < 120
    names = {run.source for run in map(parse, rows(TABLES / "misc_runs.csv")[1])}
    assert all(sum(line.startswith(f" {name} ") for line in lines) == 1 for name in names)


HEAD = "source,layers,hidden,heads,kv_heads,seq,vocab,ffn,gated,global_batch_seqs,gpus,gpu_type,TP,PP,CP,EP,microbatch,"
HEAD += "recompute,precision,framework,notes,experts,topk,step_time_s\n"
GOOD = "x,32,4096,32,8,8192,128256,14336,1,128,64,H100-80GB-SXM,2,4,1,1,1,,bf16,nemo,,,,3"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("H100-80GB-SXM", "TPUv5"), "gpu_type: 'TPUv5'"),
        ((",bf16,", ",int4,"), "precision: 'int4'"),
        ((",bf16,", ",nvfp4,"), "precision: 'nvfp4'"),
        (("32,4096", ",4096"), "does not say layers"),
        (("32,4096", "many,4096"), "layers: 'many' is no number"),
        (("32,4096", "-3,4096"), "layers: -3 is out of range"),
        (("32,4096", "2.5,4096"), "layers: 2.5 is no count"),
        (("32,4096", "nan,4096"), "layers: nan is out of range"),
        ((",64,H100", ",60,H100"), "60 GPUs are no multiple of TP x PP x CP = 8"),
        (("x,32,4096,32", "x,32,4096,33"), "hidden and heads"),
        (("1,1,1,,bf16", "1,3,1,,bf16"), "EP = 3 does not fit"),
        ((",128,64,", ",129,64,"), "129 is no multiple of 8 replicas"),
        (("H100-80GB-SXM,2,4,1,1,1,,bf16", "A100-80GB-SXM,2,4,1,1,1,,fp8"), "has no fp8"),
    ],
)
def test_a_row_that_cannot_be_done_is_named(tmp_path: Path, change: tuple[str, str], why: str) -> None:
    bad, good = predicted(tmp_path, HEAD + GOOD.replace(*change, 1) + "\n" + GOOD + "\n")
    assert why in bad["not_predicted"]
    assert bad["predicted_step_time_s"] == ""
    assert float(good["predicted_step_time_s"]) > 0


def test_no_cell_makes_it_stumble(tmp_path: Path) -> None:
    """Rows of the published tables with one to four cells replaced by what has no business there."""
    chance = random.Random(1)
    odd = [
        "",
        "0",
        "-1",
        "1e30",
        "nan",
        "inf",
        "abc",
        "1.5",
        "7",
        "1e9",
        "½",
        "1,024",
        "none",
        "1e-9",
        "64",
        "a\nb",
        '"',
    ]
    runs = [run.row for run in published()]
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, runs[0].keys(), extrasaction="ignore", restval="")
        table.writeheader()
        for _ in range(300):
            row = dict(chance.choice(runs))
            table.writerow(row | {key: chance.choice(odd) for key in chance.sample(list(row), chance.randint(1, 4))})
    answer = predict(tmp_path / "in.csv", tmp_path / "out.csv")
    json.dumps(answer, allow_nan=False)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 300
    assert all(bool(row["predicted_step_time_s"]) != bool(row["not_predicted"]) for row in found)
    assert 30 < sum(float(row["predicted_step_time_s"] or 0) > 0 for row in found) < 200


def test_rows_of_other_kinds_are_predicted_and_what_is_assumed_is_said(tmp_path: Path) -> None:
    rows = [
        GOOD,
        GOOD.replace(",1,1,1,,bf16,nemo", ",1,1,,,fp8 rowwise,torchtitan"),
        GOOD.replace(",,,3", ",8,2,3"),
        GOOD.replace("2,4,1,1", "2,1,4,1"),
        GOOD[:-1] + "soon",
        GOOD.replace(",bf16,nemo,,,,3", ",bf16,FSDP"),  # a row that ends early
    ]
    found = predicted(tmp_path, HEAD + "\n".join(rows) + "\n")
    times = [float(row["predicted_step_time_s"]) for row in found]
    assert times[2] > times[0]
    assert times[4] == times[0]
    assert found[0]["assumed"] == "recompute none; VP 8"
    assert "microbatch 4" in found[1]["assumed"], "torchtitan: as many as stages, of 16 sequences a replica"


def test_what_a_row_leaves_open_is_by_its_framework_s_rule(tmp_path: Path) -> None:
    """Megatron-Bridge's "n/a" is a pipeline in one piece; a node's network is as fast as the notes say."""
    text = GOOD.replace("bf16,nemo,", "bf16,{},{}")
    kinds = [("nemo", ""), ("megatron-bridge", ""), ("FSDP", ""), ("FSDP", "400 Gb/s inter-node")]
    nemo, bridge, fast, slow = predicted(tmp_path, HEAD + "\n".join(text.format(*kind) for kind in kinds) + "\n")
    assert (nemo["assumed"], bridge["assumed"]) == ("recompute none; VP 8", "recompute none; VP 1")
    assert float(bridge["predicted_step_time_s"]) > float(nemo["predicted_step_time_s"])
    assert float(slow["predicted_step_time_s"]) > float(fast["predicted_step_time_s"])
    cut = text.format("torchtitan", "").replace(",2,4,1,1,1,", ",2,4,1,1,{},")
    own, said = predicted(tmp_path, HEAD + cut.format("") + "\n" + cut.format(4) + "\n")
    assert own["predicted_step_time_s"] == said["predicted_step_time_s"]


@pytest.mark.parametrize("name", ["H100", "NVIDIA H100 SXM", "h100-80gb-sxm", "H100-SXM5-80GB"])
def test_gpus_as_they_are_written(name: str) -> None:
    found = named(name)
    assert found is not None
    assert found.key == "h100_sxm"
    assert all(named(other) is None for other in ("", "H100-94GB", "H20", "TPUv5", "GB300"))


@pytest.mark.parametrize("name", ["FP8-CS", "MXFP8", "fp8 (current scaling)", "bf16 mixed, te fp8", "Float8"])
def test_precisions_as_they_are_written(name: str, tmp_path: Path) -> None:
    plain, odd, none = predicted(
        tmp_path, HEAD + "\n".join(GOOD.replace(",bf16,", f",{p},") for p in ("fp8", f'"{name}"', ""))
    )
    assert odd["predicted_step_time_s"] == plain["predicted_step_time_s"]
    assert "precision bf16" in none["assumed"]
    assert float(none["predicted_step_time_s"]) > float(plain["predicted_step_time_s"])


def test_a_known_model_fills_what_a_row_leaves_open(tmp_path: Path) -> None:
    head = HEAD.replace("source,", "source,model,")
    whole, none, other = predicted(
        tmp_path,
        head
        + "x,Llama 3.1 8B,"
        + GOOD[2:]
        + "\n"
        + "x,Llama 3.1 8B,,,,,8192,,,,128,64,H100-80GB-SXM,2,4,1,1,1,,bf16,nemo,,,,3\n"
        + "x,Llama 3.1 8B,,5120,,,8192,,,,128,64,H100-80GB-SXM,2,4,1,1,1,,bf16,nemo,,,,3\n",
    )
    assert none["predicted_step_time_s"] == whole["predicted_step_time_s"]
    assert "layers, hidden" in none["assumed"].replace("layers, width", "layers, hidden")
    assert "llama3_8b" in none["assumed"]
    assert "does not say layers" in other["not_predicted"], "a Llama of another width is not that one"


@pytest.mark.parametrize("text", ["", "\n", '"a'])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.csv").write_text(text)
    assert cli.main(["scale", f"table={tmp_path}/in.csv"]) == 2
    assert cli.main(["scale", f"table={tmp_path}/nothing.csv"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_projection_is_whole_and_tagged(name: str) -> None:
    answer = projected(f"cluster={name}", "workload=llama3_8b" if name == "dgx_h100" else "workload=llama3_405b")
    assert answer["plan"]["fits"]
    assert (
        answer["plan"]["gpus"] + answer["job"]["gpus_idle"]
        == cluster(compose.config("scale", [f"cluster={name}"]).cluster).size
    )
    step = answer["step"]["seconds"]["value"]
    assert 0.15 < answer["step"]["mfu"]["value"] / 100 < 0.65
    assert sum(part["value"] for part in answer["where_it_goes"].values()) == pytest.approx(step, rel=1e-6)
    assert all(plan["seconds"] >= step for plan in answer["other_plans"] if plan["fits"])
    for part in ("job", "step", "where_it_goes", "failures", "whole"):
        for figure in answer[part].values():
            if isinstance(figure, dict):
                assert figure["tag"] in (*TAGS, "predicted", "configured")
    exact, simulated = (answer["failures"][k]["value"] for k in ("goodput_restart", "goodput_simulated"))
    assert exact == pytest.approx(simulated, abs=1)
    assert "±" in answer["step"]["seconds"]["about"]


def test_llama_3_as_it_ran() -> None:
    """Its plan on its cluster; 6.72 s by its TFLOP/s (arXiv 2407.21783, Table 4)."""
    answer = projected("cluster=llama3_16k", "workload=llama3_405b", "batch=2048", "tp=8", "pp=16", "cp=1")
    assert answer["step"]["seconds"]["value"] == pytest.approx(6.72, rel=0.25)  # Engine's kernels, not Meta's


def test_a_mixed_cluster_is_as_slow_as_its_slowest_or_better_by_shares() -> None:
    answer = projected("cluster=colossus_200k", "workload=llama3_405b", "batch=8192")
    assert answer["step"]["shares_by_speed"]["value"] < answer["step"]["seconds"]["value"]


def test_prices_are_those_of_the_report() -> None:
    """One table, configs/economy.yaml: a mixed cluster costs what its kinds do, unless its own file says a price."""
    first = {key: offers[0] for key, offers in prices().items()}
    mixed = cluster(compose.config("scale", ["cluster=colossus_200k"]).cluster).figure("price_usd_h")
    assert mixed.value == pytest.approx((3 * first["h100_sxm"]["value"] + first["h200_sxm"]["value"]) / 4)
    assert mixed.tag == "published"
    assert "AWS capacity block" in mixed.source
    entry = compose.config("scale", ["cluster=dgx_h100"]).cluster
    own = entry | {"price_usd_h": {"value": 2, "source": "a contract", "tag": "measured"}}
    assert cluster(own).figure("price_usd_h").value == 2
    assert all(offer["source"] and offer["tag"] in TAGS for offers in prices().values() for offer in offers)


def test_figures_can_be_changed() -> None:
    answer = projected("cluster=colossus_100k", "workload=llama3_8b", "cluster.gpus.h100_sxm.value=1000", "batch=1024")
    assert answer["plan"]["gpus"] <= 1000
    own = projected("model=llama_1b", "cluster=dgx_h100", "batch=64", "tp=1", "pp=1")
    assert own["job"]["parameters"]["tag"] == "configured"
    assert own["job"]["parameters"]["value"] == pytest.approx(1_235_814_400 + 262_668_288, rel=1e-3)  # untied here


def test_a_scenario_says_what_is_not_known() -> None:
    assert "shape" in projected("workload=grok2", "cluster=grok2_15k", "batch=1024")["job"]["unknown"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["workload=gpt5"], ["workload", "llama3_405b"]),
        (["tp=7", "cluster=dgx_h100", "workload=llama3_8b", "pp=3"], ["batch", "no such plan"]),
        (["gpus=9", "cluster=dgx_h100"], ["gpus", "more than the 8"]),
        (["cluster=nope"], ["cluster", "colossus_100k"]),
        (["cluster.gpus.h100_sxm.value=many"], ["cluster.gpus.h100_sxm.value"]),
        (["cluster.pue.tag=sure"], ["cluster.pue.tag"]),
        (["show=all"], ["show", "validation"]),
        (["recompute=some"], ["recompute"]),
        (["precision=fp4"], ["precision"]),
        (["out=x.txt"], ["out", ".html"]),
        (["batch=99999999999999999"], ["batch", "too large"]),
        (["context=99999999999999"], ["context", "too large"]),
        (["cluster.gpus=abc"], ["cluster.gpus", "abc"]),
        (["sharding=some"], ["sharding", "gradients"]),
        (["run=x", "workload=llama3_8b"], ["workload", "run"]),
    ],
)
def test_a_mistake_is_refused(overrides: list[str], words: list[str]) -> None:
    message = refused(*overrides)
    assert all(word in message for word in words), message


def test_here_is_what_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'GPU-a, NVIDIA H100 80GB HBM3, 81559'\necho 'GPU-b, NVIDIA H100 80GB HBM3, 81559'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answer = projected("cluster=here", "model=llama_1b", "batch=64")
    assert answer["job"]["cluster"] == "here: 2 H100 SXM"
    assert "whole" not in answer  # nobody knows what they cost
    smi.write_text("#!/bin/sh\necho 'GPU-a, NVIDIA L4, 23034'\n")
    assert "'NVIDIA L4' has no figures" in refused("cluster=here")


def test_what_fails_more_often_than_it_saves_has_no_goodput() -> None:
    assert goodput(1.0, 1.0, 1e9, 1.0) == pytest.approx(0)
    assert goodput(1e9, 1.0, 1.0, 1.0) == pytest.approx(0)


def test_here_without_a_gpu_or_a_probe_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "colossus probe" in refused("cluster=here")
    (tmp_path / "pocket-colossus").mkdir()
    (tmp_path / "pocket-colossus" / "here.yaml").write_text("name: [")
    assert "cannot be read" in refused("cluster=here")
    (tmp_path / "pocket-colossus" / "here.yaml").unlink()
    assert "nvidia-smi" in refused("cluster=here")


def test_paths_are_quoted_and_a_table_of_faults_is_none() -> None:
    assert compose.config("scale", ["table=~/a b,c.csv"]).table == "~/a b,c.csv"
    assert compose.config("train", ["faults.table={}"]).faults.table == {}


def test_claims_and_help_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", "show=claims", "format=json"]) == 0
    claims = json.loads(capsys.readouterr().out)["claims"]
    with (TABLES / "public_claims.csv").open(newline="", encoding="utf-8") as file:
        assert len(claims) == len(list(csv.DictReader(file)))
    figures = " ".join(claim["figures"] for claim in claims)
    assert all(text in figures for text in ("98.9 EF", "x1.43", "x1.76", "x1.277", "x2.00, x2.22, x2.38", "72k to 96k"))
    assert cli.main(["scale", "--help"]) == 0
    assert "colossus_100k" in capsys.readouterr().out
    assert cli.main(["scale", "workload=llama3_70b", "cluster=llama3_16k"]) == 0
    assert "constant mfu" in capsys.readouterr().out
