"""The command line: `adaselect doctor` proves the backends, with and without them; wrong arguments are refused clearly."""

import json
import subprocess
import sys
import types

import pytest
import torch

from adaselect_kernels import cli, dispatch, doctor, fused_select, reference
from tests.test_fallbacks import BLOCK

SCHEMA = {
    "ok": bool,
    "problems": list,
    "devices": list,
    "backends": list,
    "extension": (dict, type(None)),
    "versions": dict,
    "environment": dict,
    "missing": list,
}


def run_doctor(program_head: str, blocked: str) -> subprocess.CompletedProcess[str]:
    """`adaselect doctor --json` in a process of its own, which cannot import the module `blocked`."""
    hide = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in blocked else real(name, *rest)
"""
    program = BLOCK + hide + "from adaselect_kernels import cli, doctor\n" + program_head
    program += "\nsys.exit(cli.main(sys.argv[2:]))"
    arguments = [sys.executable, "-c", program, blocked, "doctor", "--json"]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=240)


def report_of(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.stderr == ""
    return json.loads(done.stdout)


def backend(report: dict, impl: str) -> dict:
    return next(entry for entry in report["backends"] if entry["impl"] == impl and entry["device"] == "cpu")


def test_json_report_of_this_machine(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == set(SCHEMA)
    for key, kind in SCHEMA.items():
        assert isinstance(report[key], kind), key
    assert {entry["status"] for entry in report["backends"]} <= {"ok", "unavailable"}
    assert [entry["impl"] for entry in report["backends"] if entry["device"] == "cpu"] == list(dispatch.IMPLS[1:])
    for entry in report["backends"]:
        assert set(entry) == {"device", "impl", "status", "detail"}
        reason = dispatch.unavailable(entry["impl"], torch.device(entry["device"]))
        assert (entry["status"] == "unavailable") == (reason is not None)
        assert reason is None or entry["detail"] == reason
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["environment"]) == set(doctor.ENVIRONMENT)


def test_tables_name_every_backend_and_the_versions(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "Backends",
        "reference",
        "triton",
        "Versions",
        torch.__version__,
        "Everything available here works",
    ):
        assert expected in out


def test_plain_tables_where_rich_is_not_installed(capsys, monkeypatch):
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    report = doctor.examine()
    doctor.render(report)
    out = capsys.readouterr().out
    assert "┃" not in out
    assert "reference  OK" in out
    assert {"what": "rich", "hint": "pip install 'adaselect_kernels[demo]' (for `adaselect demo`)"} in report["missing"]


def test_without_the_extension():
    report = report_of(run_doctor("doctor._extension_file = lambda: None", "adaselect_kernels._C"))
    assert report["ok"]
    assert report["extension"] is None
    assert backend(report, "cpu")["status"] == "unavailable"
    assert "adaselect_kernels._C is blocked" in backend(report, "cpu")["detail"]
    assert report["devices"][0]["auto"] == "reference"
    hint = next(entry["hint"] for entry in report["missing"] if "extension" in entry["what"])
    assert "pip install" in hint


def test_an_extension_that_does_not_load_is_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "EXTENSION", None)
    monkeypatch.setattr(dispatch, "EXTENSION_ERROR", "it does not load: undefined symbol")
    monkeypatch.setattr(dispatch, "_EAGER", {})
    monkeypatch.setattr(doctor, "_extension_file", lambda: "_C.so")
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == ["the extension is built, but it does not load: undefined symbol"]
    assert any("put right what the problem below names" in entry["hint"] for entry in report["missing"])


def test_without_triton():
    report = report_of(run_doctor("", "triton"))
    assert report["ok"]
    assert backend(report, "triton") == {
        "device": "cpu",
        "impl": "triton",
        "status": "unavailable",
        "detail": "the package triton is not installed",
    }
    assert any("adaselect_kernels[triton]" in entry["hint"] for entry in report["missing"])


def wrong_rows(result):
    return ((result[0] + 1) % len(result[1]), *result[1:])


def row_twice(result):
    return (torch.cat([result[0][:-1], result[0][:1]]), *result[1:])


def wrong_losses(result):
    return (*result[:2], result[2] + 0.1, result[3])


def wrong_scores(result):
    return (result[0], result[1] * 1.5, *result[2:])


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (wrong_losses, "losses"),
        (wrong_scores, "scores"),
        (wrong_rows, "rows differ"),
        (row_twice, "rows differ"),
        (None, "RuntimeError: kaput"),
    ],
)
def test_a_wrong_backend_is_reported_as_broken(monkeypatch, capsys, fault, found):
    def faulty_select(*arguments):
        if fault is None:
            raise RuntimeError("kaput")
        return fault(reference.fused_select(*arguments))

    module = types.SimpleNamespace(fused_select=faulty_select, build_info=lambda: {"compiler": "none"})
    monkeypatch.setattr(dispatch, "EXTENSION", module)
    monkeypatch.setattr(dispatch, "_EAGER", {})
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert backend(report, "reference")["status"] == "ok"
    assert backend(report, "cpu")["status"] == "broken"
    assert found in backend(report, "cpu")["detail"]
    assert "cpu on cpu is BROKEN" in report["problems"][0]

    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM: cpu on cpu is BROKEN" in out
    assert "Everything" not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a device that fails")
def test_a_device_that_fails_is_reported_as_broken(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    described = {"device": "cuda:0", "name": "a GPU", "capability": "sm_90", "threads": None}
    assert described.items() <= report["devices"][1].items()
    on_device = {entry["impl"]: entry for entry in report["backends"] if entry["device"] == "cuda:0"}
    assert on_device["reference"]["status"] == "broken"  # torch cannot reach it
    assert on_device["cpu"] == {
        "device": "cuda:0",
        "impl": "cpu",
        "status": "unavailable",
        "detail": dispatch.unavailable("cpu", torch.device("cuda", 0)),
    }


@pytest.mark.parametrize("value", ["fast", "cuda"])
def test_an_override_that_refuses_every_call_is_a_problem(monkeypatch, capsys, value):
    monkeypatch.setenv("ADASELECT_IMPL", value)
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["ADASELECT_IMPL"] == value
    assert f"impl={value!r}" in report["problems"][0] or f"got {value!r}" in report["problems"][0]
    assert report["devices"][0]["auto"] is None


def test_an_override_decides_what_auto_runs(monkeypatch):
    monkeypatch.setenv("ADASELECT_IMPL", "reference")
    assert doctor.examine()["devices"][0]["auto"] == "reference"


def test_compare_choices_tells_near_ties_from_wrong_rows():
    scores = torch.tensor([1.0, 0.5, 0.5 - 1e-6, 0.1])
    same = doctor.compare_choices(torch.tensor([0, 1]), torch.tensor([1, 0]), scores, 1e-4)
    tie = doctor.compare_choices(torch.tensor([0, 1]), torch.tensor([0, 2]), scores, 1e-4)
    wrong = doctor.compare_choices(torch.tensor([0, 1]), torch.tensor([0, 3]), scores, 1e-4)
    fewer = doctor.compare_choices(torch.tensor([0, 1]), torch.tensor([0]), scores, 1e-4)
    assert same == (0, 0)
    assert tie == (2, 0)
    assert wrong == (1, 1)  # row 1 is itself the k-th best
    assert fewer.wrong == 1
    assert doctor.compare_choices(torch.tensor([0, 1]), torch.tensor([0, 0]), scores, 1e-4).wrong == 1


def test_a_choice_is_compared_by_the_reference_scores_of_a_real_batch():
    selection = fused_select(torch.randn(64, 5), torch.randint(5, (64,)), 0.25, methods=("big_loss",))
    worst = selection.scores.argmin()
    spoiled = torch.cat([selection.indices[1:], worst[None]])
    assert doctor.compare_choices(selection.indices, spoiled, selection.scores, 1e-4).wrong >= 1


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["--version"])
    assert exit_code.value.code == 0
    assert capsys.readouterr().out.startswith("adaselect ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--epochs", "0"], "argument --epochs: must be an integer of at least 1, got '0'"),
        (["demo", "--epochs", "2.5"], "argument --epochs: must be an integer of at least 1, got '2.5'"),
        (["demo", "--repeats", "-1"], "argument --repeats: must be an integer of at least 1, got '-1'"),
        (["demo", "--seed", "-1"], "argument --seed: must be an integer of at least 0, got '-1'"),
        (["demo", "--gamma", "0"], "argument --gamma: must be a number in (0, 1], got '0'"),
        (["demo", "--gamma", "1.01"], "argument --gamma: must be a number in (0, 1], got '1.01'"),
        (["demo", "--gamma", "nan"], "argument --gamma: must be a number in (0, 1], got 'nan'"),
        (["demo", "--gamma", "half"], "argument --gamma: must be a number in (0, 1], got 'half'"),
        ([], "the following arguments are required: command"),
        (["bench-marks"], "invalid choice: 'bench-marks'"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_code:
        cli.main(arguments)
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_a_folder(capsys, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for output, message in ((tmp_path / "no" / "such", f"{tmp_path / 'no'} does not exist"), (file, "is not a folder")):
        with pytest.raises(SystemExit) as exit_code:
            cli.main(["demo", "--output", str(output)])
        assert exit_code.value.code == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_a_demo_without_its_packages_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for name in [name for name in sys.modules if name.startswith("adaselect_kernels.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("adaselect_kernels.demo", raising=False)
    assert cli.main(["demo"]) == 1
    assert "pip install 'adaselect_kernels[demo]'" in capsys.readouterr().err


SMALL = ["plan", "--model", "mlp", "--input", "1x4x4", "--batch", "32", "--repeats", "1"]


def test_a_plan_as_a_table_and_as_json(capsys):
    assert cli.main([*SMALL, "--gamma", "0.25", "--policy", "big_loss"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Plan: policy 'big_loss', scorer 'forward', gamma 0.25, 32 rows on cpu")
    assert "break-even gamma" in out
    assert cli.main([*SMALL, "--gamma", "0.25", "--json", "--epochs-per-score", "4", "--autocast", "bfloat16"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["policy"], made["scorer"], made["sampler"]) == ("adaselection", "forward", None)
    assert (made["rows"], made["gamma"], made["epochs_per_score"], made["repeats"]) == (32, 0.25, 4, 1)
    assert made["formula_ratio"] == pytest.approx((made["scoring"] / made["forward"] / 4 + 3 * 0.25) / 3)
    assert made["update"] > 0


@pytest.mark.parametrize("sampler", cli.SAMPLERS)
def test_a_plan_of_a_sampler(capsys, sampler):
    assert cli.main([*SMALL, "--json", "--sampler", sampler, "--rows", "500"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["policy"], made["scorer"], made["sampler"]) == (None, None, sampler)
    assert made["scoring"] == 0
    assert made["draw"] > 0


def test_a_plan_of_the_slim_and_the_small_path(capsys):
    network = ["plan", "--input", "2x8x8", "--batch", "4", "--repeats", "1", "--json", "--classes", "3"]
    assert cli.main([*network, "--scorer", "slim", "--width", "0.5"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["rho"] == pytest.approx(made["share"])
    assert made["psp"] is not None
    assert cli.main([*network, "--scorer", "low_resolution", "--scale", "1.0"]) == 0
    assert json.loads(capsys.readouterr().out)["scorer"] == "low_resolution"


def test_a_plan_of_a_model_of_ones_own_and_its_figure(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5))\n"
        "def fail():\n    raise KeyError('weights')\n"
        "def other():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = ["plan", "--input", "1x4x4", "--batch", "8", "--repeats", "1", "--model"]
    assert cli.main([*own, "own_network:make", "--classes", "5", "--figure", "plan.png"]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        (["own_network:make", "--classes", "6"], "must give logits (8, 6), got (8, 5): see --classes"),
        (["own_network:make", "--input", "17"], "the model fails on inputs (8, 17)"),
        (["own_network:fail"], "--model own_network:fail: KeyError: 'weights'"),
        (["own_network:other"], "must return an nn.Module, got int"),
        (["own_network:nothing"], "AttributeError"),
        (["no_such_module:make"], "ModuleNotFoundError: No module named 'no_such_module'"),
        (["own_network"], "--model must be resnet18, mlp or MODULE:FACTORY, got 'own_network'"),
        (["mlp", "--scorer", "slim"], "the scorer slim needs a slimmable model"),
        (["resnet18", "--input", "16"], "resnet18 takes images, --input CxHxW"),
        (["mlp", "--device", "nowhere"], "nowhere"),
    ):
        capsys.readouterr()
        assert cli.main([*own, *arguments]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("adaselect plan: ")
        assert message in captured.err
        assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "3x0x3"], "argument --input: must be sizes above 0 joined by x, like 3x32x32, got '3x0x3'"),
        (["--input", ""], "argument --input: must be sizes above 0"),
        (["--gamma", "0"], "argument --gamma: must be a number in (0, 1], got '0'"),
        (["--classes", "1"], "argument --classes: must be an integer of at least 2, got '1'"),
        (["--policy", "best"], "argument --policy: invalid choice: 'best'"),
        (["--figure", "plan.txt"], "argument --figure: must end in .png, .svg or .pdf, got 'plan.txt'"),
        (["--figure", "no/such/plan.png"], "no/such does not exist"),
    ],
)
def test_wrong_arguments_of_a_plan(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["plan", *arguments])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


def test_a_sampler_beside_a_scorer_is_refused(capsys):
    assert cli.main([*SMALL, "--sampler", "rs2", "--scorer", "forward"]) == 2
    assert "leave --policy and --scorer out" in capsys.readouterr().err


def test_a_figure_without_matplotlib_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*SMALL, "--figure", str(tmp_path / "plan.png")]) == 1
    assert "pip install 'adaselect_kernels[demo]'" in capsys.readouterr().err
