"""The GPU run at tiny size on the CPU, what an interrupted one leaves, and what the results page makes of it."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import gohsp
from gohsp import data
from robustness import child

ROOT = Path(__file__).parents[2]
PARTS = ("smoke", "cifar", "throughput", "oneshot_stages", "overhead")


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "GOHSP_ASSETS": str(out / "none")}
    environment["OMP_NUM_THREADS"] = "1"
    command = ["bash", "benchmarks/gpu/run.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=900)


def run_once_more(out: Path, earlier: Path, *parts: str) -> tuple[int | None, str]:
    """Go on with what was left, in a process that need not import everything again; its exit status and output."""
    printed = out.with_suffix(".txt")
    script = f"""
import os, sys
os.dup2(os.open({str(printed)!r}, os.O_WRONLY | os.O_CREAT), 1)
os.dup2(1, 2)
os.chdir({str(ROOT)!r})
os.environ |= {{"OUT": {str(out)!r}, "GOHSP_ASSETS": {str(out / "none")!r}}}
sys.path[:0] = ["src", "benchmarks"]
sys.argv = {["gpu", "--dry-run", "--continue", str(earlier), *parts]}
from gpu.__main__ import main
sys.exit(main())
"""
    process = child.context().Process(target=exec, args=(script, {}))
    process.start()
    process.join(900)
    return process.exitcode, printed.read_text()


def left(out: Path) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json"))}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("out")
    return out, run(out, "--dry-run")


@pytest.fixture
def of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of ``benchmarks/`` as its scripts see it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    return importlib.import_module


def test_dry_run_leaves_the_results_of_every_part(dry: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, process = dry
    assert process.returncode == 0, process.stdout + process.stderr
    found = left(out)
    assert found.keys() == set(PARTS)
    for name, part in found.items():
        assert part["state"] == "done"
        assert not part["errors"]
        assert part["dry_run"]
        assert part["versions"]["gohsp"] == gohsp.__version__
        assert sum(part["expected_seconds"].values()) > 0
        assert f"== {name}: expected to take" in process.stdout
    checks = found["smoke"]["results"]["checks"]
    assert [*checks] == ["cut", "ADMM", "one-shot", "latency"]
    assert checks["cut"]["divergence_between"] == 0
    assert checks["ADMM"]["weights_differ_by"] == 0
    runs = found["cifar"]["results"]["runs"]
    of_budget = {f"{method} params=-40% seed=0" for method in ("oneshot", "no-ADMM", "peer", "gohsp")}
    assert runs.keys() == {"start seed=0", "dense seed=0", *of_budget}
    for key in of_budget:
        assert runs[key]["params"] <= 0.6 * runs["start seed=0"]["params"]
    assert found["cifar"]["results"]["epochs"] == {"dense": 1, "behind": 2}
    (pair,) = found["throughput"]["results"].values()
    assert [case["batch"] for case in pair["cases"]] == [2, 1]
    (stages,) = found["oneshot_stages"]["results"]["runs"].values()
    assert stages["timings"]["cut"] > 0
    assert stages["peak_memory_mib"] > 0
    (of_model,) = found["overhead"]["results"]["cpu"]["models"].values()
    assert of_model["admm"]["ratio"] > 1
    assert of_model["ranking"]["forward_passes"] > 0


def test_what_it_leaves_can_be_carried_back(dry: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    files = [file for file in dry[0].rglob("*") if file.is_file()]
    assert len(files) <= 8
    assert all(file.stat().st_size < 16 * 2**20 for file in files)


def test_results_page_reads_it_and_tells_what_is_missing(
    dry: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_benchmarks: Any,
) -> None:
    page = of_benchmarks("results_page")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    titles = [title for title, _ in page.GPU_PARTS.values()]
    assert f"Not measured yet: {'; '.join(titles)}." in page.gpu()
    shutil.copytree(dry[0], tmp_path / "gpu")
    text = page.gpu()
    assert [line[4:] for line in text.splitlines() if line.startswith("### ")] == titles
    assert "Not measured yet" not in text
    assert "Not complete" not in text
    assert text.count("A dry run") == len(PARTS)
    rows = ("| cut | yes |", "| **gohsp** |", "| Torch-Pruning, the best of those tried |", "| float32, batch 2 |")
    for row in (*rows, "| test_vit | 0.2 M |", "| test_vit | 2 |"):
        assert row in text
    table = text.rpartition("\n\n")[2]
    assert page.page().endswith(f"{table}\n")  # prose is wrapped there
    (tmp_path / "gpu" / "cifar.json").unlink()
    part = left(tmp_path / "gpu")["smoke"] | {"state": "failed", "reason": "cut off after 60 s", "results": {}}
    (tmp_path / "gpu" / "smoke.json").write_text(json.dumps(part))
    text = page.gpu()
    assert "Not measured yet: CIFAR-10, ViT-Small." in text
    assert "Not complete (failed: cut off after 60 s)." in text


def test_a_second_call_goes_on_and_a_failing_part_stops_no_other(
    dry: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    shutil.copytree(dry[0], earlier)
    before = left(earlier)
    missing = "no-ADMM params=-40% seed=0"
    del before["cifar"]["results"]["runs"][missing]
    before["cifar"]["state"] = "out of time"
    before["smoke"] |= {"state": "failed", "results": []}
    for name in ("cifar", "smoke"):
        (earlier / f"{name}.json").write_text(json.dumps(before[name]))

    status, printed = run_once_more(out, earlier, "smoke", "cifar", "overhead")
    assert status == 1, printed
    found = left(out)
    assert found["smoke"]["state"] == "failed"
    assert "AttributeError" in found["smoke"]["errors"]["smoke"]
    assert found["cifar"]["state"] == "done"
    runs = found["cifar"]["results"]["runs"]
    assert {key: run for key, run in runs.items() if key != missing} == before["cifar"]["results"]["runs"]
    assert runs[missing]["params"] == before["cifar"]["results"]["runs"]["gohsp params=-40% seed=0"]["params"]
    assert found["overhead"] == before["overhead"]
    assert "== overhead: done before" in printed
    shards = [load_file(folder / "cifar_dense-0.safetensors") for folder in (earlier, out)]
    assert all(torch.equal(shards[0][name], shards[1][name]) for name in shards[0])


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda *_: time.sleep(60), "cut off after 1 s"),
        (lambda *_: os._exit(3), "died with exit status 3"),
    ],
)
def test_a_part_that_hangs_or_dies_is_recorded(
    work: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_benchmarks: Any
) -> None:
    driver = of_benchmarks("gpu.__main__")
    monkeypatch.setattr(driver, "measure", work)
    monkeypatch.setattr(driver, "GRACE", 0)
    (tmp_path / "smoke.json").write_text(json.dumps({"state": "failed", "results": {"checks": {"cut": 1}}}))
    call = driver.Call(tmp_path, None, tmp_path, tmp_path, True)
    assert driver.run(call, "smoke", 1) == "failed"
    found = left(tmp_path)["smoke"]
    assert f"Not complete (failed: {reason})." in of_benchmarks("results_page").measured_on(found)
    assert found["results"] == {"checks": {"cut": 1}}


def test_a_step_without_time_is_not_begun(tmp_path: Path, of_benchmarks: Any) -> None:
    part = of_benchmarks("gpu.part")
    late = part.Part("overhead", tmp_path, tmp_path, tmp_path, True, time.monotonic() + 1)
    late.need(0.5, "a short step")
    with pytest.raises(part.OutOfTimeError, match="a long step needs about 2 s, 1 s are left"):
        late.need(2, "a long step")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "cifra"], "unknown part 'cifra'; parts are smoke, cifar"),
        (["--dry-run", "--continue", "nowhere"], "'nowhere' is no folder"),
    ],
)
def test_refusals_of_arguments(
    arguments: list[str], message: str, of_benchmarks: Any, monkeypatch: Any, capsys: Any
) -> None:
    driver = of_benchmarks("gpu.__main__")
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit):
        driver.main()
    assert message in capsys.readouterr().err


def test_a_dry_run_and_a_real_one_share_no_folder(
    tmp_path: Path, of_benchmarks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = of_benchmarks("gpu.__main__")
    (tmp_path / "smoke.json").write_text(json.dumps({"state": "done", "dry_run": True}))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu", "smoke"])
    with pytest.raises(SystemExit):
        driver.main()
    assert f"'{tmp_path}' holds files of a dry run; name another folder" in capsys.readouterr().err


def encoded(shade: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Assets as they are shared, three images a file."""
    folder = tmp_path / "assets"
    (folder / "models").mkdir(parents=True)
    save_file({"weight": torch.tensor([0.5, 0.25])}, folder / "models" / "deit_tiny_patch16_224.safetensors")
    for name, column in (("cifar10/train", "img"), ("cifar10/test", "img"), ("imagenet-1k-mini/train", "image")):
        file = folder / "data" / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        images = [encoded(shade) for shade in (10, 20, 30)]
        pyarrow.parquet.write_table(pyarrow.table({column: images, "label": [1, 0, 1]}), file)
    return folder


def test_rows_become_a_source(stored: Path, tmp_path: Path, of_benchmarks: Any) -> None:
    part = of_benchmarks("gpu.part")
    real = part.Part("cifar", tmp_path, stored, tmp_path, False, 0.0)
    splits = {"train": part.Rows("cifar10/train", 0, 3), "test": part.Rows("cifar10/test", 1, 1)}
    folder = real.images("made", splits, 4)
    train, test = (data.open_split(gohsp.DataSource(source=str(folder)), name) for name in splits)
    pairs = sorted((label, image.getpixel((0, 0))) for image, label in (train[i] for i in range(len(train))))
    assert pairs == [(0, (20, 20, 20)), (1, (10, 10, 10)), (1, (30, 30, 30))]
    assert [label for _, label in (test[i] for i in range(len(test)))] == [0]
    with pytest.raises(FileNotFoundError, match="GOHSP_ASSETS"):
        real.images("other", {"train": part.Rows("nothing/train", 0, 1)}, 4)


def test_packing_counts_what_travels(
    stored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    of_benchmarks: Any,
) -> None:
    collect = of_benchmarks("gpu.collect")
    out = tmp_path / "packed"
    monkeypatch.setattr(collect, "collect_wheels", lambda folder: folder.mkdir(parents=True))
    monkeypatch.setattr(sys, "argv", ["collect.py", "--out", str(out)])
    monkeypatch.setenv("GOHSP_ASSETS", str(stored))
    collect.main()
    assert "MiB in all, of 64" in capsys.readouterr().out
    packed = load_file(out / "models" / "deit_tiny_patch16_224.safetensors")["weight"]
    assert packed.dtype == torch.float16
    assert packed.tolist() == [0.5, 0.25]
    assert sorted(file.name.split("-")[0] for file in (out / "data" / "cifar10").iterdir()) == ["test", "train"]

    monkeypatch.setattr(collect, "LIMIT", 1000)
    with pytest.raises(SystemExit, match="may travel; leave some of it out"):
        collect.main()
    monkeypatch.setattr(sys, "argv", ["collect.py", "--out", str(stored)])
    with pytest.raises(SystemExit, match="was not made by this script"):
        collect.main()


def test_wheels_are_of_what_the_machine_lacks(of_benchmarks: Any) -> None:
    collect = of_benchmarks("gpu.collect")
    missing = collect.closure(collect.WANTED) - collect.closure(collect.THERE)
    assert {"gohsp", "torch-pruning", "pydantic", "pydantic-core", "tyro", "tomli-w"} <= missing
    assert not {"torch", "numpy", "jinja2", "huggingface-hub"} & missing
