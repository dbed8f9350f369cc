"""Whether a device computes in bf16, what `precision: auto` makes of that, and how a study goes on elsewhere."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from written_runs import planned, run_and_write

from peft_vit.base.errors import UserError
from peft_vit.runs.records.storage import read_study_file, write_study_file
from peft_vit.runs.scheduling.display import print_plan
from peft_vit.runs.scheduling.plan import smoke_study
from peft_vit.runs.scheduling.scheduler import study_file
from peft_vit.runs.this_machine import machine as precision
from peft_vit.runs.this_machine.machine import Bf16Support, bf16_support, choose_precision, resolve_device

pytestmark = pytest.mark.part("runner")
CPU = torch.device("cpu")
NATIVE, EMULATED = Bf16Support(True, "it has the instructions"), Bf16Support(False, "it lacks the instructions")
SAPPHIRE_RAPIDS = "avx2 avx512f avx512bw avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8"
ZEN_4, ZEN_3 = "avx2 avx512f avx512bw avx512_bf16 avx512_vnni", "avx avx2 fma"


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Let Linux tell other flags of the processor."""

    def pretend(flags: str) -> None:
        file = tmp_path / "cpuinfo"
        core = f"processor\t: 0\nmodel name\t: any avx512_bf16\nflags\t\t: fpu {flags}\nbugs\t\t: amx_bf16\n\n"
        file.write_text(core + core.replace(": 0", ": 1"))
        monkeypatch.setattr(precision, "_CPUINFO", file)

    return pretend


@pytest.mark.parametrize(
    ("limit", "count"), [(None, 8), ("max 100000", 8), ("150000 100000", 2), ("1600000 100000", 8), ("broken", 8)]
)
def test_processors_are_those_that_the_process_and_its_container_may_use(tmp_path, monkeypatch, limit, count) -> None:
    monkeypatch.setattr(precision.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(precision, "_PROCESSOR_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert precision.cpu_count() == count


@pytest.fixture
def machine(monkeypatch):
    """Let the machine compute in bf16, or not."""

    def pretend(support: Bf16Support) -> None:
        monkeypatch.setattr(precision, "bf16_support", lambda device: support)

    return pretend


@pytest.mark.parametrize(
    ("flags", "native", "reason"),
    [
        (SAPPHIRE_RAPIDS, True, "this CPU has AVX512_BF16 and AMX instructions"),
        (ZEN_4, True, "this CPU has AVX512_BF16 instructions"),
        ("avx2 amx_bf16 amx_tile", True, "this CPU has AMX instructions"),
        ("avx2 amx_tile amx_int8 avx512_bf16x", False, "this CPU has neither AVX512_BF16 nor AMX instructions"),
        (ZEN_3, False, "this CPU has neither AVX512_BF16 nor AMX instructions"),
    ],
)
def test_a_processor_is_known_by_its_flags(processor, flags: str, native: bool, reason: str) -> None:
    processor(flags)
    assert bf16_support(CPU) == Bf16Support(native, reason)


def test_a_limit_on_instructions_counts(processor, monkeypatch) -> None:
    processor(ZEN_4)
    without_bf16 = ("AVX2", "avx2", "SSE41", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
    with_bf16 = ("AVX512_CORE_BF16", "AVX512_CORE_AMX", "DEFAULT", "ALL", "no_such_limit")
    for limit in (*without_bf16, *with_bf16):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        support = bf16_support(CPU)
        assert support.native == (limit in with_bf16), limit
        reason = "instructions" if support.native else f"but ONEDNN_MAX_CPU_ISA={limit} leaves them out"
        assert support.reason.endswith(reason)


def test_where_linux_tells_no_flags_nothing_is_known(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    assert not bf16_support(CPU).native
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert not bf16_support(CPU).native


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_asked_without_its_emulation(monkeypatch, native: bool) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU [x]")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert bf16_support(torch.device("cuda")).native == native
    assert "a GPU [x]" in bf16_support(torch.device("cuda")).reason
    assert not bf16_support(torch.device("mps")).native


HAS, LACKS = NATIVE.reason, EMULATED.reason
BEGUN = "precision: {}, as the study was begun, though auto would be {} here: {}"


@pytest.mark.parametrize(
    ("requested", "begun", "support", "chosen", "note"),
    [
        ("auto", None, NATIVE, "bf16", f"precision: auto is bf16: {HAS}"),
        ("auto", None, EMULATED, "fp32", f"precision: auto is fp32: {LACKS}"),
        ("auto", "bf16", NATIVE, "bf16", f"precision: auto is bf16: {HAS}"),
        ("auto", "bf16", EMULATED, "bf16", BEGUN.format("bf16", "fp32", LACKS)),
        ("auto", "fp32", NATIVE, "fp32", BEGUN.format("fp32", "bf16", HAS)),
        ("bf16", None, EMULATED, "bf16", None),
        ("fp32", "bf16", NATIVE, "fp32", None),  # go_on refuses it
    ],
)
def test_auto_takes_what_the_study_has_and_then_what_the_device_computes_in(
    machine, requested, begun, support, chosen, note
) -> None:
    machine(support)
    choice = choose_precision(requested, begun, CPU)
    assert (choice.chosen, choice.note) == (chosen, note)
    assert choice.emulated == (chosen == "bf16" and support is EMULATED)


def begin(plan, folder: Path) -> None:
    (folder / "tiny").mkdir()
    write_study_file(folder / "tiny", study_file(plan.study, (), smoke=False, data_sha256=plan.data_sha256))


def printed(plan) -> str:
    console = Console(width=400, record=True)
    print_plan(plan, console)
    return console.export_text()


def as_asked(config, requested: str):
    return config.model_copy(update={"precision": requested})


@pytest.mark.parametrize(("first", "then", "begun"), [(NATIVE, EMULATED, "bf16"), (EMULATED, NATIVE, "fp32")])
def test_a_study_goes_on_elsewhere_in_its_precision(study, tmp_path, machine, first, then, begun) -> None:
    config = as_asked(study("linear", seeds=(0, 1)), "auto")
    machine(first)
    plan = planned(config, tmp_path)
    assert f"precision: auto is {begun}: {first.reason}\n" in printed(plan)
    assert "SLOW" not in printed(plan)
    begin(plan, tmp_path)
    assert read_study_file(tmp_path / "tiny").configuration.precision == begun
    run_and_write(plan.runs[0].spec, tmp_path)
    machine(then)
    again = planned(config, tmp_path)
    assert [(run.done, run.spec.precision) for run in again.runs] == [(True, begun), (False, begun)]
    assert printed(again).count(f"precision: {begun}, as the study was begun, though auto would be") == 1
    named = planned(as_asked(config, begun), tmp_path)
    assert [run.spec for run in named.runs] == [run.spec for run in again.runs]
    other = {"bf16": "fp32", "fp32": "bf16"}[begun]
    with pytest.raises(UserError, match="was begun with another configuration") as caught:
        planned(as_asked(config, other), tmp_path)
    assert f"-precision: {begun}\n+precision: {other}" in caught.value.details


def test_bf16_where_it_is_emulated_is_told_loudly(study, tmp_path, machine) -> None:
    config = as_asked(study("linear"), "bf16")
    machine(NATIVE)
    assert "SLOW" not in printed(planned(config, tmp_path))
    machine(EMULATED)
    plan = planned(config, tmp_path)
    assert "BF16 MAY BE SLOW HERE: it lacks the instructions.\n" in printed(plan)
    run_and_write(plan.runs[0].spec, tmp_path)
    assert "SLOW" not in printed(planned(config, tmp_path))  # nothing is left to do


@pytest.mark.parametrize(
    ("requested", "small"), [("auto", {"bf16", "fp32"}), ("bf16", {"bf16", "fp32"}), ("fp32", {"fp32"})]
)
def test_no_smoke_study_emulates_bf16(study, tmp_path, machine, requested: str, small: set[str]) -> None:
    config = as_asked(study("linear"), requested)
    chosen = set()
    for support in (NATIVE, EMULATED):
        machine(support)
        plan = planned(config, tmp_path, smoke=True)
        assert not plan.precision.emulated
        chosen.add(plan.study.precision)
    assert chosen == small
    assert smoke_study(config, 8).precision == ("fp32" if requested == "fp32" else "auto")


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    missing = next(n for n in ("mps", "cuda") if not {"mps": torch.backends.mps, "cuda": torch.cuda}[n].is_available())
    with pytest.raises(UserError, match=f"device: {missing} is not available on this machine; use auto or cpu"):
        resolve_device(missing)
